"""Section "images": whole runs of the sampler through its nodes, beside core and diffusers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

import in_process
from krea2_model.schedule import sigma_schedule

from . import measure, models, rooflines

# Tokens of the negative: as many as the positive's, so that both share a call, or fewer.
OTHER = 16


def conditioning(worker, tokens: int, seed: int) -> list:
    config = worker.sizes.transformer
    generator = torch.Generator().manual_seed(seed)
    width = config.num_text_layers * config.text_hidden_dim
    return [[torch.randn(1, tokens, width, generator=generator), {}]]


def our_run(worker, model, pixels: int, steps: int, guidance: float, texts) -> Callable:
    latent = in_process.run_node("K2EmptyLatent", aspect="custom", width=pixels, height=pixels)[0]
    return lambda: in_process.run_node(
        "K2Sampler", model=model, positive=texts[0], negative=texts[1], latent=latent, seed=1,
        preset="custom", steps=steps, guidance=guidance, shift="fixed", mu=1.15,
    )[0]["samples"]  # fmt: skip


def core_run(worker, model, pixels: int, steps: int, guidance: float, texts) -> Callable:
    latent = {"samples": torch.zeros(1, 16, 1, pixels // 8, pixels // 8)}
    return lambda: in_process.run_node(
        "KSampler", model=model, seed=1, steps=steps, cfg=guidance + 1, sampler_name="euler",
        scheduler="simple", positive=texts[0], negative=texts[1], latent_image=latent, denoise=1.0,
    )[0]["samples"]  # fmt: skip


def diffusers_run(worker, pixels: int, steps: int, guidance: float, texts) -> Callable:
    """Euler steps around diffusers' transformer; its pipeline does the same, with two calls."""
    sigmas = sigma_schedule(steps, 1.15)
    inputs = worker.models.inputs(pixels, 1)
    contexts = [part[0][0].to(inputs.context) for part in texts]

    def run():
        latents = inputs.latents
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            found = [predicted(latents, context, now) for context in contexts[: 1 + (guidance > 0)]]
            velocity = found[0]
            if guidance > 0:
                velocity = velocity + guidance * (velocity - found[1])
            latents = latents + (then - now) * velocity
        return latents

    def predicted(latents, context, sigma):
        inputs.context, inputs.text = context, context.shape[1]
        inputs.time = torch.full_like(inputs.time, sigma)
        inputs.latents = latents
        return models.diffusers_call(worker.models.diffusers, inputs)()

    return run


@contextlib.contextmanager
def counted(module) -> Iterator[list[int]]:
    """The batch of each call of a module, recorded in its class."""
    cls, calls = type(module), []
    forward = cls.forward

    @functools.wraps(forward)
    def recorded(self, first, *arguments, **options):
        if self is module:
            calls.append(len(first))
        return forward(self, first, *arguments, **options)

    cls.forward = recorded
    try:
        yield calls
    finally:
        cls.forward = forward


def run_images(worker) -> None:
    pixels, text = worker.sizes.image, worker.sizes.steps[0][1]
    steps = {"turbo": 2, "raw": 2} if worker.tiny else {"turbo": 8, "raw": 10}
    pair = worker.models.in_form("bf16")
    positive = conditioning(worker, text, 1)
    same, shorter = (conditioning(worker, count, 2) for count in (text, min(OTHER, text // 2)))
    rows = (
        ("Turbo, 8 steps", steps["turbo"], 0.0, same),
        ("Raw, 10 steps guided, texts of one length", steps["raw"], 4.5, same),
        ("Raw, 10 steps guided, texts of two lengths", steps["raw"], 4.5, shorter),
    )
    for what, count, guidance, negative in rows:
        texts = (positive, negative)
        runs = {
            "ours": our_run(worker, pair["ours"], pixels, count, guidance, texts),
            "core": core_run(worker, pair["core"], pixels, count, guidance, texts),
        }
        if negative is same:  # diffusers makes two calls of any
            runs["diffusers"] = diffusers_run(worker, pixels, count, guidance, texts)
        floor = rooflines.step_floor_ms(
            worker.ceilings, worker.sizes.transformer, pixels, text, "bf16"
        )
        floor = floor and floor * count * (1 + (guidance > 0)) / 1e3
        worker.attempt(
            what, lambda w=what, r=runs, g=guidance, t=texts, f=floor: whole(worker, w, r, g, t, f)
        )


def whole(worker, what: str, runs: dict[str, Callable], guidance: float, texts, floor) -> None:
    model, pixels = worker.models.in_form("bf16")["ours"], worker.sizes.image
    with counted(model.model.diffusion_model.blocks[0]) as calls:
        our_run(worker, model, pixels, 1, guidance, texts)()
    row: dict = {"what": what, "pixels": pixels, "calls_a_step": len(calls), "floor_s": floor}
    for name, run in runs.items():
        samples = []
        row[f"{name}_s"] = measure.milliseconds(lambda r=run, s=samples: s.append(r())) / 1e3
        row[f"{name}_finite"] = bool(torch.isfinite(samples[0]).all())
    for peer in list(runs)[1:]:
        row[f"{peer}_ratio"] = row[f"{peer}_s"] / row["ours_s"]
    worker.row(**row, passed=row["ours_finite"])
