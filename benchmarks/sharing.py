"""Positive and negative of different length in one call of the model, or in two: which is faster?

    PYTHONPATH=ComfyUI python -P benchmarks/sharing.py     # prints JSON

krea2-nano Raw with guidance at several sizes; the rule in
krea2_model/transformer/shared_calls.py comes from here.
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

SIZES = (128, 256, 384, 512, 768)
NEVER, ALWAYS = 0, 10**9


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="krea2-sharing-") as folder:
        in_process.start(Path(folder))
        import torch

        model_module, run = in_process.pack_module("nodes.managed.model"), in_process.run_node
        results = []
        with torch.inference_mode():
            clip = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
            prompt = "a small green star above a purple ring on white"
            positive, negative = run("K2TextEncode", clip=clip, prompt=prompt, negative="")
            model = run("K2ModelLoader", file="krea2-nano Raw (built in)")[0]
            for pixels in SIZES:
                latent = run("K2EmptyLatent", aspect="custom", width=pixels, height=pixels)[0]
                seconds: dict = {"one": [], "two": []}
                for turn in range(4):
                    for calls, limit in (("one", ALWAYS), ("two", NEVER)):
                        model_module.SMALL_IMAGE = limit
                        started = time.perf_counter()
                        run("K2Sampler", model=model, positive=positive, negative=negative,
                            latent=latent, preset="custom", steps=6, guidance=3.5)  # fmt: skip
                        if turn:  # the first is for warming up
                            seconds[calls].append(time.perf_counter() - started)
                results.append({"tokens": (pixels // 16) ** 2, "seconds": seconds})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
