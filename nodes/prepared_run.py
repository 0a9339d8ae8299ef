"""A run of Krea 2 Sampler, checked before it samples; Krea 2 Grid makes many of them."""

from dataclasses import dataclass
from typing import Any

import torch

from ..krea2_model.config import Preset
from ..krea2_model.transformer.patches import token_count
from .inputs import AUTO
from .managed.noise import noise_of
from .sampler_run import (
    ONE_EACH,
    ONE_STREAM,
    noise_for,
    sample,
    sample_each,
    schedule,
    seeds_of,
    shift_exponent,
    start_of,
    warn_of_size,
)
from .single_images import SIDE_BY_SIDE


@dataclass(frozen=True)
class Run:
    """A run whose settings are known. start: (B, 16, 1, h, w). far: a note on the size, or ""."""

    model: Any
    latent: dict
    settings: Preset
    sampler: str
    start: torch.Tensor
    exponent: float
    sigmas: torch.Tensor
    far: str

    def sample(
        self, positive, negative, seed: int, seeds: str = ONE_STREAM, noise=None, **progress
    ):
        """The latents at the end.

        noise: NOISE in place of that of the seed. progress: `total` and `before` of `sample`; else
        of this run.
        """
        image_seeds = seeds_of(self.start, seed, self.latent)
        if noise is None:
            noise = noise_for(self.start, seed, self.latent, seeds)
        else:
            # What samplers draw during the run belongs to the picture that the noise is of.
            own = getattr(noise, "seed", None)
            seed = seed if own is None else own
            image_seeds = [seed] * len(self.start)
            noise = noise_of(noise, self.start, self.latent)
        one_by_one = seeds == ONE_EACH and self.sampler not in SIDE_BY_SIDE
        options: dict[str, Any] = {"total": self.settings.steps, **progress}
        options |= {"seeds": image_seeds} if one_by_one else {"seed": seed}
        return (sample_each if one_by_one else sample)(
            self.model,
            positive,
            negative,
            self.start,
            noise,
            self.sigmas,
            self.settings.guidance,
            self.exponent,
            latent=self.latent,
            sampler=self.sampler,
            **options,
        )


def prepare(
    model,
    latent,
    settings: Preset,
    denoise: float = 1.0,
    sampler: str = "euler",
    shift: str = AUTO,
    mu: float = 0.0,
    start_sigma: float = 0.0,
) -> Run:
    """A run of these settings. Raises ValueError for a latent of another model."""
    start = start_of(model, latent)
    exponent = shift_exponent(settings, shift, mu, token_count(start))
    sigmas = schedule(settings, exponent, denoise, sampler, start_sigma)
    far = warn_of_size(model, start, float(sigmas[0]))
    return Run(model, latent, settings, sampler, start, exponent, sigmas, far)
