"""Raw, and Turbo distilled from it: the losses are those of `train_raw` and `train_turbo`.

Noise is drawn on the device, and batches count image tokens instead of pictures, since sizes differ
by a factor of four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from krea2_model.config import TURBO, Preset
from krea2_model.schedule import shift_mu
from krea2_model.transformer.model import Krea2Transformer, grid_size
from krea2_training.engine.rates import Rates
from krea2_training.pretrain import new_transformer

from ..examples import Batch
from ..loop import DEVICE, Stage, autocast
from ..train_raw import CONFIG, THINGS, TIME_SHIFT, optimisers
from ..train_turbo import RATE as TURBO_RATE
from ..train_turbo import distillation_loss
from .plan import Plan
from .pool import EncodedPool

RAW_PRESET = Preset("raw", steps=28, guidance=3.5, mu=None, size=256)
TURBO_PRESET = replace(TURBO, size=256)
TOKENS = 256  # image tokens of a picture of 256 px
KINDS = ("scenes", "landscapes")
GROW_EVERY = 6  # steps


def flow_loss(
    model: Krea2Transformer,
    batch: Batch,
    random: Random,
    draws: int,
    emphasis: float = 0.0,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """The rectified-flow loss of `draws` noises for each caption.

    emphasis: from the plain loss at 0 to more noise, and details that weigh more, at 1.
    """
    generator = torch.Generator(DEVICE).manual_seed(random.getrandbits(62))
    latents = batch.latents.repeat_interleave(draws, 0)
    count = len(latents)
    order = torch.randperm(count, generator=generator, device=DEVICE)
    time = (order + torch.rand(count, generator=generator, device=DEVICE)) / count
    mu = shift_mu(math.prod(grid_size(latents, CONFIG.patch_size)))
    mu += emphasis * (TIME_SHIFT - mu)
    time = math.exp(mu) / (math.exp(mu) + 1 / time.clamp(min=1e-5) - 1)
    noise = torch.randn(latents.shape, generator=generator, device=DEVICE)
    noisy = torch.lerp(latents, noise, time[:, None, None, None])
    with autocast():
        text = model.fuse_text(batch.taps, batch.mask).repeat_interleave(draws, 0)
        mask = batch.mask.repeat_interleave(draws, 0)
        shown = [reference.repeat_interleave(draws, 0) for reference in references]
        predicted = model(noisy, time, text, mask, references=shown)
    error = (predicted.float() - (noise - latents)).square()
    weight = 1 + (THINGS - 1) * emphasis * batch.things
    weight = weight.repeat_interleave(draws, 0) / weight.mean()
    return (weight * error).mean()


def train_raw(
    folder: Path,
    pool: EncodedPool,
    rates: Rates,
    plan: Plan,
    write: Callable[[Krea2Transformer], None],
) -> Krea2Transformer:
    """Train until the rates end. write: is given the averaged weights at each save."""
    torch.manual_seed(1)
    model = new_transformer(CONFIG)
    own, between = optimisers(model), plan.save_every
    stage = Stage("raw", folder, model, own, rates, seconds_between_saves=between)
    stage.on_saved = lambda: write(_averaged(stage, RAW_PRESET))

    def loss_of_step(step: int) -> Tensor:
        if step % GROW_EVERY == 0:
            pool.grow(KINDS)
        random = Random(f"raw {step}")
        batch = pool.batch(plan.captions * TOKENS, random)
        return flow_loss(model, batch, random, plan.draws, rates.factor(step))

    stage.train(loss_of_step)
    return _averaged(stage, RAW_PRESET)


def train_turbo(
    folder: Path,
    pool: EncodedPool,
    raw: Krea2Transformer,
    rates: Rates,
    plan: Plan,
    write: Callable[[Krea2Transformer], None],
) -> Krea2Transformer:
    """Distil until the rates end."""
    torch.manual_seed(2)
    model = new_transformer(CONFIG)
    model.load_state_dict(raw.state_dict())
    raw.to(DEVICE)
    own, between = optimisers(model, TURBO_RATE), plan.save_every
    stage = Stage("turbo", folder, model, own, rates, 0.98, seconds_between_saves=between)
    stage.on_saved = lambda: write(_averaged(stage, TURBO_PRESET))
    empty = pool.empty[None].float()

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"turbo {step}")
        batch = pool.batch(plan.turbo_captions * TOKENS, random, empty=0.03)
        generator = torch.Generator(DEVICE).manual_seed(random.getrandbits(62))
        shape = (len(batch.latents) * plan.draws, *batch.latents.shape[1:])
        noise = torch.randn(shape, generator=generator, device=DEVICE)
        return distillation_loss(model, raw, batch, noise, empty, TURBO_PRESET)

    stage.train(loss_of_step)
    return _averaged(stage, TURBO_PRESET)


def _averaged(stage: Stage, preset: Preset) -> Krea2Transformer:
    """A copy with the averaged weights, on the CPU, that knows its preset."""
    model = Krea2Transformer(CONFIG)
    model.load_state_dict(stage.averaged_state())
    model.variant, model.preset = preset.name, preset
    return model.requires_grad_(False).eval()
