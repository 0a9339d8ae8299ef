"""Faster at a price, on krea2-nano: error and speed of every choice that is not exact.

    PYTHONPATH=ComfyUI python -P benchmarks/lossy.py     # prints JSON

All are off unless chosen. Errors are mean differences of pixels, in 255ths, from the pictures
without them; speed is that of whole runs, in turns. Attention in 8 bits needs a GPU for speed: its
error is that of the same arithmetic, written out in torch.
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

THRESHOLDS = (0.02, 0.05, 0.1)
FEWER_STEPS = (18, 14)
TURNS = 4
PROMPTS = (
    "a red circle on white",
    "a small green star above a purple ring on white",
    "a blue square on the left and an orange triangle on the right",
)
NANO, RAW = "krea2-nano (built in)", "krea2-nano Raw (built in)"


def rounded(tensor, tokens: int):
    """To int8 and back with one scale for so many tokens of a head, as SageAttention has it."""
    import torch

    parts = []
    for part in tensor.split(tokens, dim=-2):
        scale = part.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-9) / 127
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, dim=-2)


def attention_in_8_bits(function, query, key, value, *args, **options):
    """Queries and keys in 8 bits, the rest as it was."""
    return function(rounded(query, 128), rounded(key, 64), value, *args, **options)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="krea2-lossy-") as folder:
        in_process.start(Path(folder))
        import torch
        from comfy_extras.nodes_easycache import EasyCacheNode

        run = in_process.run_node
        with torch.inference_mode():
            clip = run("K2TextEncoderLoader", file=NANO)[0]
            vae = run("K2VAELoader", file=NANO)[0]
            raw = run("K2ModelLoader", file=RAW)[0]
            latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]

            def encode(**options):
                return [run("K2TextEncode", clip=clip, prompt=prompt, negative="", **options)
                        for prompt in PROMPTS]  # fmt: skip

            whole = encode()

            def paint(model=raw, texts=whole, steps=28):
                started, pictures = time.perf_counter(), []
                for seed, (positive, negative) in enumerate(texts):
                    samples = run("K2Sampler", model=model, positive=positive, negative=negative,
                                  latent=latent, seed=seed, preset="custom", steps=steps,
                                  guidance=3.5)[0]  # fmt: skip
                    pictures.append(samples)
                seconds = time.perf_counter() - started
                decoded = [run("K2VAEDecode", samples=s, vae=vae)[0] for s in pictures]
                return torch.cat(decoded) * 255, seconds

            emulated = raw.clone()
            options = emulated.model_options["transformer_options"]
            options["optimized_attention_override"] = attention_in_8_bits
            choices = {
                f"evaluate {every}": {"model": run("K2Approximate", model=raw, evaluate=every)[0]}
                for every in ("every 2nd step", "every 3rd step")
            }
            choices |= {f"{steps} steps": {"steps": steps} for steps in FEWER_STEPS}
            for threshold in THRESHOLDS:
                cached = EasyCacheNode.execute(raw, threshold, 0.15, 0.95, False).result[0]
                choices[f"ComfyUI's EasyCache at {threshold}"] = {"model": cached}
            for dtype in ("fp8_scaled", "int8", "int8_convrot"):
                choices[f"dtype {dtype}"] = {
                    "model": run("K2ModelLoader", file=RAW, dtype=dtype)[0]
                }
            choices["attention in 8 bits"] = {"model": emulated}
            choices["max_tokens 8"] = {"texts": encode(max_tokens=8)}

            results = []
            for name, changed in choices.items():
                ratios = []
                for turn in range(TURNS):
                    exact, plain_seconds = paint()
                    lossy, seconds = paint(**changed)
                    if turn:  # the first is for warming up
                        ratios.append(plain_seconds / seconds)
                error = (lossy - exact).abs().mean().item()
                results.append({"choice": name, "error": error, "ratios": ratios})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
