"""nano Turbo: nano Raw distilled to eight steps without guidance, along Turbo's own path.

The student walks its schedule from noise to picture. At each of its eight states the teacher, Raw
with guidance, solves the same stretch in smaller steps, and the student learns the one velocity
that leads where the teacher arrived. Since the states are the student's own, it learns to mend
what its earlier steps left behind (on-policy trajectory distillation; DAgger, Ross and others,
2011, is the general idea).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from krea2_model.config import TURBO, Preset
from krea2_model.schedule import shift_time
from krea2_model.transformer.model import Krea2Transformer
from krea2_training.engine.rates import Rates
from krea2_training.pretrain import new_transformer

from .examples import Batch, Examples
from .loop import DEVICE, Stage, autocast
from .train_raw import CONFIG, optimisers
from .train_raw import PRESET as RAW_PRESET

PRESET = replace(TURBO, size=128)
STEPS = 90
RATE = 0.25  # of the learning rates that a new model takes
CAPTIONS, DRAWS = 12, 2
TEACHER_STEPS = 2  # of the teacher for one of the student


def train_turbo(
    folder: Path,
    examples: Examples,
    raw: Krea2Transformer,
    steps: int = STEPS,
    start: Krea2Transformer | None = None,
) -> Krea2Transformer:
    """Distil, or go on distilling; returns the transformer with averaged weights.

    start: the student's first weights; None is the teacher's.
    """
    torch.manual_seed(2)
    model = new_transformer(CONFIG)
    model.load_state_dict((start or raw).state_dict())
    raw.to(DEVICE)
    name = "turbo" if start is None else "turbo_onward"
    rates = Rates(steps, warmup=20, decay=0.5)
    stage = Stage(name, folder, model, optimisers(model, RATE), rates, decay=0.98)
    empty = examples.empty[None].float().to(DEVICE)

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"turbo {step}")
        examples.grow(2)
        batch = examples.batch(CAPTIONS, random, empty=0.03)
        generator = torch.Generator().manual_seed(random.getrandbits(62))
        shape = (CAPTIONS * DRAWS, *batch.latents.shape[1:])
        latents = torch.randn(shape, generator=generator).to(DEVICE)
        return distillation_loss(model, raw, batch, latents, empty)

    stage.train(loss_of_step)
    model.load_state_dict(stage.averaged_state())
    model.variant, model.preset = PRESET.name, PRESET
    return model.requires_grad_(False).eval()


def distillation_loss(
    model: Krea2Transformer,
    raw: Krea2Transformer,
    batch: Batch,
    latents: Tensor,
    empty: Tensor,
    preset: Preset = PRESET,
) -> Tensor:
    """The loss along the student's own way from noise to picture.

    latents: noise (captions * draws, 16, h, w), of which each caption has the same number.
    empty: taps (1, L, 12, D) of the empty prompt.
    The gradients of the blocks have been added when this returns; what is left is the fusion's.
    """
    draws = len(latents) // len(batch.taps)
    mask = batch.mask.repeat_interleave(draws, 0)
    with torch.no_grad(), autocast():
        cond = raw.fuse_text(batch.taps, batch.mask).repeat_interleave(draws, 0)
        uncond = raw.fuse_text(empty).expand(len(cond), -1, -1)
    with autocast():
        text = model.fuse_text(batch.taps, batch.mask)
    # The fusion is gone back through once, with what all eight states ask of it.
    held = text.detach().requires_grad_()
    total = latents.new_zeros(())
    for index in range(preset.steps):
        times = [
            shift_time(1 - (index + part / TEACHER_STEPS) / preset.steps, preset.mu)
            for part in range(TEACHER_STEPS + 1)
        ]
        target = teacher_velocity(raw, latents, times, (cond, mask), uncond)
        with autocast():
            now = torch.full((len(latents),), times[0], device=DEVICE)
            velocity = model(latents, now, held.repeat_interleave(draws, 0), mask).float()
        loss = (velocity - target).square().mean() / preset.steps
        loss.backward()  # Here, so that one state's activations are held at a time.
        total += loss.detach()
        latents = latents + (times[-1] - times[0]) * velocity.detach()
    # The value is the sum of the losses, the gradient what is left of theirs.
    rest = (text * held.grad).sum()
    return rest - rest.detach() + total


@torch.no_grad()
def teacher_velocity(
    raw: Krea2Transformer,
    latents: Tensor,
    times: list[float],
    positive: tuple[Tensor, Tensor],
    uncond: Tensor,
    guidance: float = RAW_PRESET.guidance,
) -> Tensor:
    """The constant velocity that ends where guided Euler steps through `times` end."""
    start = latents
    for now, then in itertools.pairwise(times):
        time = torch.full((len(latents),), now, device=latents.device)
        with autocast():
            conditional = raw(latents, time, *positive).float()
            unconditional = raw(latents, time, uncond).float()
        velocity = conditional + guidance * (conditional - unconditional)
        latents = latents + (then - now) * velocity
    return (latents - start) / (times[-1] - times[0])
