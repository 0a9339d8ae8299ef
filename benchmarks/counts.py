"""What a run of krea2-nano does and takes, beside core and diffusers: calls, tokens, fusions, time.

PYTHONPATH=ComfyUI python -P benchmarks/counts.py     # prints JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts")]

import in_process  # noqa: E402

PROMPT = "a small green star above a purple ring on white"
STEPS, GUIDANCE = 28, 3.5
TURNS = 5


def watch(module, tokens_of, fusion) -> dict:
    """Counts of calls from here on: the model's, those of its fusion, and its longest sequence."""
    counts = {"calls": 0, "fusions": 0, "tokens": 0}

    def block(_, arguments, options):
        counts["calls"] += 1
        counts["tokens"] = max(counts["tokens"], tokens_of(arguments, options))

    def fused(*_):
        counts["fusions"] += 1

    module.register_forward_pre_hook(block, with_kwargs=True)
    fusion.register_forward_pre_hook(fused)
    return counts


def hidden_tokens(arguments, options) -> int:
    return (arguments[0] if arguments else options["hidden_states"]).shape[1]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="krea2-counts-") as folder:
        base = Path(folder)
        in_process.start(base)
        import torch

        nano = in_process.pack_module("krea2_model.nano")
        run = in_process.run_node
        name = "krea2-nano Raw (built in)"
        models = base / "models" / "diffusion_models"
        models.mkdir(parents=True)
        (models / nano.TRANSFORMERS["raw"].name).symlink_to(nano.TRANSFORMERS["raw"])
        results = {}
        with torch.inference_mode():
            clip = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
            positive, negative = run("K2TextEncode", clip=clip, prompt=PROMPT, negative="")
            latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
            ours = run("K2ModelLoader", file=name)[0]
            core = run(
                "UNETLoader", unet_name=nano.TRANSFORMERS["raw"].name, weight_dtype="default"
            )[0]
            paint: dict[str, Callable[[], object]] = {}
            for who, model in (("ours", ours), ("core", core)):
                inner = model.model.diffusion_model
                results[who] = watch(inner.blocks[0], hidden_tokens, inner.txtfusion)
                paint[who] = lambda model=model: run(
                    "KSampler", model=model, seed=1, steps=STEPS, cfg=GUIDANCE + 1,
                    sampler_name="euler", scheduler="simple", positive=positive,
                    negative=negative, latent_image=latent)  # fmt: skip
            results["diffusers"], paint["diffusers"] = diffusers_run(base / "diffusers")
            for call in paint.values():  # counts, and warms up
                call()
            results = {who: {**counts, "seconds": []} for who, counts in results.items()}
            for _ in range(TURNS):
                for who, call in paint.items():
                    started = time.perf_counter()
                    call()
                    results[who]["seconds"].append(time.perf_counter() - started)
    print(json.dumps(results))


def diffusers_run(folder: Path) -> tuple[dict, Callable[[], object]]:
    """The same by diffusers' pipeline, from a folder that our converter wrote, and its counts.

    Its text encoder runs too, which in ComfyUI is a node of its own; on nano that is a hundredth.
    """
    import torch
    from diffusers import Krea2Pipeline

    convert = in_process.pack_module("krea2_model.tools.convert").convert
    nano = in_process.pack_module("krea2_model.nano")
    storage = in_process.pack_module("krea2_model.checkpoints.storage")
    from safetensors.torch import load_file, save_file

    parts = {"model.diffusion_model.": load_file(nano.TRANSFORMERS["raw"]),
             "text_encoders.qwen3vl_4b.transformer.": load_file(nano.text_encoder_file()),
             "vae.": load_file(nano.VAE)}  # fmt: skip
    whole = folder.parent / "nano_raw.safetensors"
    save_file({prefix + n: t.contiguous() for prefix, part in parts.items()
               for n, t in part.items()}, whole)  # fmt: skip
    convert(whole, folder)
    assert storage.weight_files(folder / "transformer")
    pipeline = Krea2Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.transformer
    counts = watch(model.transformer_blocks[0], hidden_tokens, model.text_fusion)
    return counts, lambda: pipeline(
        PROMPT, height=128, width=128, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        output_type="latent")  # fmt: skip


if __name__ == "__main__":
    main()
