"""The rectified-flow loss: predict the velocity `noise - image` at a random time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from krea2_model.schedule import shift_mu
from krea2_model.transformer.backend import TORCH_BACKEND, Backend
from krea2_model.transformer.model import Krea2Transformer, grid_size
from krea2_model.transformer.references import TIME_ZERO

from .data.cache import Batch


@dataclass(frozen=True)
class Noised:
    """Noisy latents (B, 16, h, w), their times (B,), and the velocity to predict."""

    latents: Tensor
    times: Tensor
    velocity: Tensor


def generator_of(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The random numbers of one step: on the CPU, the same wherever a run is resumed."""
    numbers = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + purpose) % 2**63
    return torch.Generator().manual_seed(numbers)


def draw_times(count: int, mu: float, spread: float, generator: torch.Generator) -> Tensor:
    """Times (count,) of a shifted logit-normal distribution, in float32.

    spread: standard deviation before the shift. Draws are spread evenly over the distribution's
    quantiles, so that each batch has early and late times.
    """
    order = torch.randperm(count, generator=generator)
    quantile = (order + torch.rand(count, generator=generator)) / count
    normal = torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
    # The exponential shift adds mu to the logit.
    return torch.sigmoid(spread * normal + mu)


def noised(
    latents: Tensor, generator: torch.Generator, shift: float | None, spread: float, patch: int = 2
) -> Noised:
    """Noise for latents, at times of the official shift for their size, or of another mu."""
    mu = shift_mu(math.prod(grid_size(latents, patch))) if shift is None else shift
    times = draw_times(len(latents), mu, spread, generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    mixed = torch.lerp(latents, noise, times[:, None, None, None])
    return Noised(mixed, times, noise - latents)


def predict(
    model: Krea2Transformer,
    latents: Tensor,
    times: Tensor,
    batch: Batch,
    *,
    backend: Backend = TORCH_BACKEND,
    train_text: bool = False,
) -> Tensor:
    """The model's velocity for a batch's prompts, in float32.

    latents: one for each prompt, or as many for each, one after the other.
    train_text: differentiate through the text fusion too.
    """
    mask, references = batch.mask, batch.references
    with torch.set_grad_enabled(train_text and torch.is_grad_enabled()):
        text = model.fuse_text(batch.taps, mask)
    draws = len(latents) // len(text)
    if draws > 1:
        text = text.repeat_interleave(draws, 0)
        mask = None if mask is None else mask.repeat_interleave(draws, 0)
        references = [
            replace(one, latents=one.latents.repeat_interleave(draws, 0)) for one in references
        ]
    velocity = model(
        latents,
        times,
        text,
        mask,
        references=references,
        reference_method=batch.reference_method or TIME_ZERO,
        backend=backend,
    )
    return velocity.float()


def flow_errors(velocity: Tensor, noise: Noised, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each picture (B,).

    weights: (B, 1, h, w), of which each picture's mean becomes 1; a picture without any weight
        counts nothing.
    """
    errors = (velocity - noise.velocity).square()
    if weights is not None:
        errors = errors * weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return errors.mean(dim=(1, 2, 3))


def flow_loss(
    model: Krea2Transformer,
    batch: Batch,
    generator: torch.Generator,
    *,
    shift: float | None = None,
    spread: float = 1.0,
    backend: Backend = TORCH_BACKEND,
    train_text: bool = False,
) -> Tensor:
    """The mean loss of a batch."""
    noise = noised(batch.latents, generator, shift, spread, model.config.patch_size)
    velocity = predict(
        model, noise.latents, noise.times, batch, backend=backend, train_text=train_text
    )
    return flow_errors(velocity, noise, batch.weights).mean()
