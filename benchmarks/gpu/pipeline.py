"""Section "pipeline": whole images without ComfyUI, parts in turn and by blocks.

An fp8 transformer and an encoder in bf16 lie in main memory. The pictures have to be the same
however the parts come to the device, and a limit has to hold.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import comfy
import torch

from krea2_model import Krea2Pipeline
from krea2_model.checkpoints.checkpoint import Checkpoint
from krea2_model.checkpoints.text_encoder import load_text_encoder
from krea2_model.checkpoints.transformer import load_transformer
from krea2_model.checkpoints.vae import load_vae
from krea2_model.memory.machine import GB

from . import measure, models, weights

PROMPT = "a lighthouse on a rocky coast at dusk, seen from the sea"
# Of the device, in GB: what cards have that hold no fp8 transformer.
LIMIT_GB = 12.0
# Of the picture's difference from the one of parts that all stay.
LARGEST_ERROR = 1e-3


def parts_in_main_memory(worker) -> tuple:
    """The released sizes in random numbers, quantised on the device and then kept on the host."""
    sizes, device, dtype = worker.sizes, worker.device, worker.models.dtype

    def on_host(tensors: dict[str, Any], name: str) -> Checkpoint:
        # Copies, since other sections make theirs in inference mode.
        copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        return Checkpoint(Path(name), copies)

    tokenizer = Path(comfy.__path__[0], "text_encoders", "qwen25_tokenizer")
    transformer = load_transformer(
        on_host(worker.models.tensors_in("fp8"), models.NAME.name), dtype=dtype, keep_quantised=True
    )
    encoder = load_text_encoder(
        on_host(weights.encoder_tensors(sizes.encoder, device, dtype), "qwen3vl_4b.safetensors"),
        tokenizer=tokenizer,
    )
    vae = on_host(weights.vae_tensors(sizes.vae, device, dtype), "qwen_image_vae.safetensors")
    return transformer, encoder, load_vae(vae)


def run_pipeline(worker) -> None:
    with torch.inference_mode(False), torch.no_grad():
        parts = parts_in_main_memory(worker)
        # On a CPU nothing is a device's memory, and the limit is one that the small parts exceed.
        limit = 0.45 if worker.tiny else LIMIT_GB
        runs = (("auto", None), ("parts", None), ("blocks", limit))
        pictures: dict[str, torch.Tensor] = {}
        for mode, most in runs:
            worker.attempt(
                mode, functools.partial(painted, worker, parts, mode, most, pictures), mode=mode
            )


def painted(worker, parts, mode: str, limit: float | None, pictures: dict) -> None:
    """Paint, and again where the first time does what later ones need not: copy or pack weights."""
    pipeline = Krea2Pipeline(*parts, device=worker.device, offload=mode, max_memory=limit)
    pixels, steps = worker.sizes.image, 2 if worker.tiny else 8
    options = {"width": pixels, "height": pixels, "steps": steps, "guidance": 0.0}
    run = functools.partial(pipeline, PROMPT, output_type="pt", seed=1, **options)
    seconds: list[float] = []

    def timed() -> None:
        spent = measure.milliseconds(lambda: pictures.update({mode: run()}))
        seconds.append(spent / 1e3)

    free = measure.free_bytes()
    peak = measure.peak_bytes(timed)
    if mode != "parts":
        timed()
    pipeline._offload.take_away()
    left = (free - measure.free_bytes()) / GB
    error = measure.error_of(pictures[mode], pictures["auto"])
    passed = error <= LARGEST_ERROR and left < 0.1
    if limit is not None and not worker.tiny:
        passed = passed and peak <= limit * GB
    worker.row(
        what=pipeline._offload.plan.text, mode=mode, pixels=pixels, seconds=seconds[-1],
        first_s=seconds[0], peak_gb=peak / GB, limit_gb=limit, left_gb=left, error=error,
        passed=passed,
    )  # fmt: skip
