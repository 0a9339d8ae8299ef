"""Faster at a price: ComfyUI's feature caching (EasyCache) on krea2-nano Raw, error and speed.

    PYTHONPATH=ComfyUI python -P benchmarks/lossy.py     # prints JSON

Off unless its node is used. Errors are mean differences of pixels, in 255ths, from the pictures
without it; speed is that of whole runs, in turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts")]

import in_process  # noqa: E402

THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
PROMPTS = (
    "a red circle on white",
    "a small green star above a purple ring on white",
    "a blue square on the left and an orange triangle on the right",
)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="krea2-lossy-") as folder:
        in_process.start(Path(folder))
        import torch
        from comfy_extras.nodes_easycache import EasyCacheNode

        run = in_process.run_node
        nano = "krea2-nano (built in)"
        with torch.inference_mode():
            clip = run("K2TextEncoderLoader", file=nano)[0]
            vae = run("K2VAELoader", file=nano)[0]
            raw = run("K2ModelLoader", file="krea2-nano Raw (built in)")[0]
            texts = [run("K2TextEncode", clip=clip, prompt=p, negative="") for p in PROMPTS]
            latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]

            def paint(model):
                started, pictures = time.perf_counter(), []
                for seed, (positive, negative) in enumerate(texts):
                    samples = run("K2Sampler", model=model, positive=positive, negative=negative,
                                  latent=latent, seed=seed, preset="custom", steps=28,
                                  guidance=3.5)[0]  # fmt: skip
                    pictures.append(samples)
                seconds = time.perf_counter() - started
                decoded = [run("K2VAEDecode", samples=s, vae=vae)[0] for s in pictures]
                return torch.cat(decoded) * 255, seconds

            results = []
            for threshold in THRESHOLDS:
                cached = EasyCacheNode.execute(raw, threshold, 0.15, 0.95, False).result[0]
                ratios = []
                for turn in range(4):
                    exact, plain_seconds = paint(raw)
                    lossy, seconds = paint(cached)
                    if turn:  # the first is for warming up
                        ratios.append(plain_seconds / seconds)
                error = (lossy - exact).abs().mean().item()
                results.append({"threshold": threshold, "error": error, "ratios": ratios})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
