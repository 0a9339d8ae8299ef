"""Sections "vae" and "encoder": the other two parts, through their nodes, in turns with core."""

from __future__ import annotations

import torch

import in_process

from . import measure, models, rooflines, weights

WORDS = "fox snow birch light glass river stone lantern "


def run_vae(worker) -> None:
    config, device = worker.sizes.vae, worker.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tensors = weights.vae_tensors(config, device, dtype)
    ours, core = models.our_vae(tensors, None), models.core_vae(tensors, None)
    theirs = models.diffusers_vae(config, tensors)
    run = in_process.run_node
    for pixels in worker.sizes.vae_images:
        side = pixels // 8
        latents = torch.randn(1, 16, 1, side, side)
        images = torch.rand(1, pixels, pixels, 3)
        on_device = latents.to(device, dtype)
        frames = (images.movedim(-1, 1)[:, :, None] * 2 - 1).to(device, dtype)
        calls = {
            "decode": {
                "ours": lambda x=latents: run("VAEDecode", vae=ours, samples={"samples": x}),
                "core": lambda x=latents: run("VAEDecode", vae=core, samples={"samples": x}),
                "diffusers": lambda x=on_device: theirs.decode(x).sample,
            },
            "encode": {
                "ours": lambda x=images: run("VAEEncode", vae=ours, pixels=x),
                "core": lambda x=images: run("VAEEncode", vae=core, pixels=x),
                "diffusers": lambda x=frames: theirs.encode(x).latent_dist.mode(),
            },
        }
        estimates = {
            "decode": ours.memory_used_decode(latents.shape, ours.vae_dtype),
            "encode": ours.memory_used_encode((1, 3, pixels, pixels), ours.vae_dtype),
        }
        labels = {"pixels": pixels, "dtype": str(ours.vae_dtype)}
        for what, functions in calls.items():
            floor = rooflines.vae_floor_ms(worker.ceilings, config, pixels, what)
            more = labels | {"estimate_gb": estimates[what] / measure.GB, "floor_ms": floor}
            worker.attempt(what, lambda w=what, f=functions, m=more: timed(worker, w, f, **m))


def timed(worker, what: str, calls: dict, **labels) -> None:
    row = measure.compared(measure.in_turns(calls, min(5, worker.sizes.pairs)))
    for name, call in calls.items():
        row[f"{name}_peak_gb"] = measure.peak_bytes(call) / measure.GB
    worker.row(what=what, **labels, **row)


def run_encoder(worker) -> None:
    """Of prompts of about so many tokens; what is remembered is forgotten before each."""
    config, device = worker.sizes.encoder, worker.device
    tensors = weights.encoder_tensors(config, device, torch.bfloat16)
    clips = {"ours": models.our_clip(tensors),
             "core": models.core_clip(tensors, config, torch.bfloat16)}  # fmt: skip
    for words in worker.sizes.prompts:
        prompt = " ".join((WORDS * words).split()[:words])
        calls = {name: lambda c=clip, p=prompt: models.encode(c, p) for name, clip in clips.items()}
        tokens = calls["ours"]().shape[1] + 34  # of the template, run and cut off
        floor = rooflines.encoder_floor_ms(worker.ceilings, config, tokens, 2.0)
        worker.attempt("encode", lambda c=calls, t=tokens, f=floor: timed(
            worker, "encode", c, tokens=t, floor_ms=f))  # fmt: skip
