"""Arguments of `Krea2Pipeline` as lists: one entry a prompt or an image, or what is wrong."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .images.sizes import round_size
from .sampling import MAX_SEED, check_seed


def asked_sides(*sides: int | None) -> list[int | None]:
    """Sides in pixels as they will be; one of two is not enough to crop by."""
    if sides.count(None) == 1:
        raise ValueError("Give both height and width with start_image, or neither.")
    return [
        None if side is None else round_size(name, side)
        for name, side in zip(("width", "height"), sides, strict=True)
    ]


def prompt_list(prompt, embeds: Tensor | None) -> list[str] | None:
    """Prompts, or None where embeddings stand for them."""
    if (prompt is None) == (embeds is None):
        raise ValueError("Give either prompt or prompt_embeds, and not both.")
    if embeds is not None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompt is {prompt!r}; expected a text or a list of texts.")
    return prompts


def negative_list(negative, embeds: Tensor | None, count: int) -> list[str] | None:
    """Negatives of `count` prompts, or None where embeddings stand for them."""
    if embeds is not None:
        if len(embeds) not in (1, count):
            raise ValueError(
                f"negative_prompt_embeds has {len(embeds)} entries; expected 1 or {count}."
            )
        return None
    negative = "" if negative is None else negative
    negatives = [negative] * count if isinstance(negative, str) else list(negative)
    if len(negatives) != count or not all(isinstance(n, str) for n in negatives):
        raise ValueError(
            f"negative_prompt is {negative!r}; expected a text or a list of {count} texts, one a "
            "prompt."
        )
    return negatives


def seed_list(seed, batch: int) -> list[int]:
    """The seed of each image; behind the last seed that there is comes 0."""
    if not not_whole(seed):
        first = check_seed(seed)
        return [(first + i) % (MAX_SEED + 1) for i in range(batch)]
    seeds = list(seed) if isinstance(seed, (list, tuple)) else []
    if len(seeds) != batch or any(map(not_whole, seeds)):
        raise ValueError(
            f"seed is {seed!r}; expected a whole number or a list of {batch}, one an image."
        )
    return [check_seed(s) for s in seeds]


def not_whole(value) -> bool:
    """Whether a value is no whole number, of Python's or NumPy's."""
    return isinstance(value, bool) or not isinstance(value, (int, np.integer))


def start_noise(
    latents: Tensor | None,
    shape: tuple[int, int, int],
    sides: tuple[int | None, int | None],
    default: int,
    seed,
) -> Tensor:
    """Start latents (B, C, h, w) in float32: the given ones, or noise of a seed an image.

    shape: B, C, and the pixels of a latent's side. sides: height and width in pixels, None for
        `default`. Noise is drawn on the CPU, so that a seed means the same everywhere.
    """
    batch, channels, downscale = shape
    height, width = (
        round_size(name, default if side is None else side)
        for name, side in zip(("height", "width"), sides, strict=True)
    )
    expected = (batch, channels, height // downscale, width // downscale)
    if latents is None:
        noise = [
            torch.randn(expected[1:], generator=torch.Generator().manual_seed(each))
            for each in seed_list(seed, batch)
        ]
        return torch.stack(noise)
    free = sides == (None, None) and latents.ndim == 4
    compared = expected[:2] if free else expected
    if tuple(latents.shape[: len(compared)]) != compared or latents.ndim != 4:
        raise ValueError(
            f"latents has shape {tuple(latents.shape)}; expected {expected}: {batch} images of "
            f"{height} x {width} px."
        )
    return latents.float()
