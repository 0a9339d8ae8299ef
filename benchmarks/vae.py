"""The VAE at full width with random weights: encoding and decoding beside core and diffusers.

    PYTHONPATH=ComfyUI python -P benchmarks/vae.py [--pixels 512]     # prints JSON

Ours and core's run as ComfyUI loads them, through VAEEncode and VAEDecode, in float32 on a CPU;
diffusers' module is called directly. Peaks are of anonymous memory beyond what was there before.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

from load_memory import Peak  # noqa: E402

import in_process  # noqa: E402

BASE = Path(tempfile.mkdtemp(prefix="krea2-vae-"))
in_process.start(BASE)

import torch  # noqa: E402
from diffusers import AutoencoderKLQwenImage  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

run = in_process.run_node


def write_random_vae(folder: Path):
    """A full-size VAE under diffusers' names, as a file for both loaders; the module itself."""
    torch.manual_seed(0)
    module = AutoencoderKLQwenImage().eval().requires_grad_(False)
    keys = in_process.pack_module("krea2_model.checkpoints.vae_keys")
    config = in_process.pack_module("krea2_model.config").VAEConfig()
    state = module.state_dict()
    tensors = {ours: state[theirs].contiguous() for ours, theirs in keys.vae_key_map(config).items()
               if theirs in state}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "qwen_image_vae.safetensors")
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with torch.inference_mode():
        theirs = write_random_vae(BASE / "models" / "vae")
        ours = run("K2VAELoader", file="qwen_image_vae.safetensors")[0]
        core = run("VAELoader", vae_name="qwen_image_vae.safetensors")[0]
        side = options.pixels
        pixels = torch.rand(1, side, side, 3)
        latents = torch.randn(1, 16, 1, side // 8, side // 8)
        frame = (pixels * 2 - 1).movedim(-1, 1)[:, :, None]
        runs = {
            "decode": {
                "ours": lambda: run("VAEDecode", vae=ours, samples={"samples": latents}),
                "core": lambda: run("VAEDecode", vae=core, samples={"samples": latents}),
                "diffusers": lambda: theirs.decode(latents).sample,
            },
            "encode": {
                "ours": lambda: run("VAEEncode", vae=ours, pixels=pixels),
                "core": lambda: run("VAEEncode", vae=core, pixels=pixels),
                "diffusers": lambda: theirs.encode(frame).latent_dist.mode(),
            },
        }
        results = {}
        for what, functions in runs.items():
            results[what] = {name: {"seconds": [], "peak": 0} for name in functions}
            for turn in range(options.pairs + 1):
                for name, function in functions.items():
                    with Peak() as peak:
                        started = time.perf_counter()
                        function()
                        seconds = time.perf_counter() - started
                    if turn:  # the first is for warming up
                        results[what][name]["seconds"].append(seconds)
                    found = results[what][name]
                    found["peak"] = max(found["peak"], peak.most[0])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
