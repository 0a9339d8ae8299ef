"""nano Raw: the transformer, trained from nothing with the rectified-flow loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from krea2_model.config import Preset
from krea2_model.nano.preview import TRANSFORMER_CONFIG
from krea2_model.schedule import shift_mu, shift_time
from krea2_model.transformer.model import Krea2Transformer, grid_size
from krea2_training.engine.rates import Rates
from krea2_training.pretrain import new_transformer

from .examples import Batch, Examples
from .loop import Stage, autocast

# ComfyUI's own Krea 2 detects these sizes: it fixes the head at 128 and 20 text heads, and derives
# the MLP widths from the others.
CONFIG = TRANSFORMER_CONFIG
PRESET = Preset("raw", steps=28, guidance=3.5, mu=None, size=128)
STEPS = 5700
CAPTIONS, DRAWS = 28, 2  # a batch; each caption is fused once and serves several draws of noise
# Where the prompt matters: in the tenth of a picture that has things, while there is mostly noise.
# Training leans that way, and returns to the plain loss as the learning rate falls.
THINGS = 4.0  # how much more than background they weigh
TIME_SHIFT = 2.0  # mu of the times of training
MOST_SHARDS, STEPS_A_SHARD = 6, 250
ONWARD_RATE = 0.4  # of the learning rates, where training goes on from trained weights


def optimisers(model: nn.Module, rate: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon (Jordan and others, 2024) for the matrices inside blocks, AdamW for what is left.

    rate: of the learning rates that a new model takes.
    """
    inside, outside = [], []
    for name, parameter in model.named_parameters():
        in_block = "blocks." in name and parameter.ndim == 2
        (inside if in_block else outside).append(parameter)
    return [
        torch.optim.Muon(inside, lr=rate * 3e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=rate * 1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def flow_batch(
    latents: Tensor, random: Random, emphasis: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their times and the velocity to predict, `noise - image`.

    Times are spread evenly over the batch, then shifted as the official schedule does for this
    size; emphasis leads from there, at 0, to `TIME_SHIFT`, at 1.
    """
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    batch = len(latents)
    order = torch.randperm(batch, generator=generator)
    time = (order + torch.rand(batch, generator=generator)) / batch
    mu = shift_mu(math.prod(grid_size(latents, CONFIG.patch_size)))
    mu += emphasis * (TIME_SHIFT - mu)
    time = torch.tensor([shift_time(value, mu) for value in time.tolist()])
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    time = time.to(latents.device)
    return torch.lerp(latents, noise, time[:, None, None, None]), time, noise - latents


def flow_error(
    model: Krea2Transformer,
    batch: Batch,
    random: Random,
    emphasis: float = 0.0,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Squared errors (captions * DRAWS, 16, h, w) of the velocity at random times.

    references: latents (captions, 16, h_i, w_i) of the pictures that the model looks at.
    """
    latents = batch.latents.repeat_interleave(DRAWS, 0)
    noisy, time, velocity = flow_batch(latents, random, emphasis)
    mask = batch.mask.repeat_interleave(DRAWS, 0)
    references = [reference.repeat_interleave(DRAWS, 0) for reference in references]
    with autocast():
        text = model.fuse_text(batch.taps, batch.mask).repeat_interleave(DRAWS, 0)
        predicted = model(noisy, time, text, mask, references=references)
    return (predicted.float() - velocity).square()


def flow_loss(
    model: Krea2Transformer,
    batch: Batch,
    random: Random,
    emphasis: float,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """The mean of `flow_error`; at emphasis 1 things weigh `THINGS` times what background does."""
    error = flow_error(model, batch, random, emphasis, references)
    weight = 1 + (THINGS - 1) * emphasis * batch.things
    weight = weight.repeat_interleave(DRAWS, 0) / weight.mean()
    return (weight * error).mean()


def train_raw(
    folder: Path,
    examples: Examples,
    steps: int = STEPS,
    start: Krea2Transformer | None = None,
) -> Krea2Transformer:
    """Train, or go on training; returns the transformer with averaged weights.

    start: trained weights to begin with instead of new ones, which asks for smaller steps.
    """
    torch.manual_seed(1)
    model = new_transformer(CONFIG, seed=1)
    if start is None:
        rates = Rates(steps, warmup=100, decay=0.2)
        stage = Stage("raw", folder, model, optimisers(model), rates)
    else:
        model.load_state_dict(start.state_dict())
        rates = Rates(steps, warmup=30, decay=0.9)
        stage = Stage("raw_onward", folder, model, optimisers(model, ONWARD_RATE), rates)

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"raw {step}")
        examples.grow(min(MOST_SHARDS, 2 + step // STEPS_A_SHARD))
        batch = examples.batch(CAPTIONS, random)
        return flow_loss(model, batch, random, emphasis=rates.factor(step))

    stage.train(loss_of_step)
    model.load_state_dict(stage.averaged_state())
    model.variant, model.preset = PRESET.name, PRESET
    return model.requires_grad_(False).eval()
