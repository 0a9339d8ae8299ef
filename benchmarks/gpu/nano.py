"""Section "nano": krea2-nano's pictures through the nodes, on this device and on the CPU.

python -P -m benchmarks.gpu.nano OUT.npz     # the CPU's pictures, in a process of its own
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from .worker import in_process, start_comfyui

PROMPT = "a small green star above a purple ring on white"
MODELS = {"turbo": "krea2-nano (built in)", "raw": "krea2-nano Raw (built in)"}
# In 255ths. float32 on both; in the dtype that a user gets, rounding shows more.
LIMIT = 2.0


def paint(variant: str, dtype: str) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1] at the model's own settings."""
    run = in_process.run_node
    model = run("K2ModelLoader", file=MODELS[variant], dtype=dtype)[0]
    clip = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
    vae = run("K2VAELoader", file="krea2-nano (built in)", dtype=dtype)[0]
    positive, negative = run("K2TextEncode", clip=clip, prompt=PROMPT, negative="")
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
    samples = run("K2Sampler", model=model, positive=positive, negative=negative, latent=latent,
                  seed=3)[0]  # fmt: skip
    return run("K2VAEDecode", samples=samples, vae=vae)[0][0].float().cpu().numpy()


def run_nano(worker) -> None:
    variants = ("turbo",) if worker.tiny else tuple(MODELS)
    file = worker.base / "cpu.npz"
    other = None
    if not worker.tiny:  # all is on the CPU then, in this process too
        flags = ["-P"] * sys.flags.safe_path + ["-S"] * sys.flags.no_site
        command = [sys.executable, *flags, "-m", "benchmarks.gpu.nano", str(file)]
        other = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        pictures = {(v, d): paint(v, d) for v in variants for d in ("fp32", "auto")}
        if other is not None and other.wait(timeout=worker.seconds_left):
            raise RuntimeError(f"The process for the CPU's pictures ended with {other.returncode}.")
    finally:
        if other is not None and other.poll() is None:
            other.kill()
    expected = np.load(file) if file.is_file() else {v: paint(v, "fp32") for v in variants}
    for (variant, dtype), picture in pictures.items():
        error = 255 * float(np.abs(picture - expected[variant]).max())
        row = {"what": f"krea2-nano {variant}, {dtype}", "largest_difference": error}
        if dtype == "fp32":
            row |= {"limit": LIMIT, "passed": error <= LIMIT and float(picture.std()) > 0.02}
        worker.row(**row)


def main() -> None:
    import torch

    with tempfile.TemporaryDirectory(prefix="krea2-nano-") as folder:
        start_comfyui(Path(folder), "--cpu")
        with torch.inference_mode():
            np.savez(sys.argv[1], **{variant: paint(variant, "fp32") for variant in MODELS})


if __name__ == "__main__":
    main()
