"""Patches: 2 x 2 cells of latents, one token each."""

from __future__ import annotations

import math

from einops import rearrange
from torch import Tensor

# Cells of latents along a side of a token, in every Krea 2.
PATCH = 2


def token_count(images: Tensor, downscale: int = 1) -> int:
    """Tokens of latents (..., h, w), or of pixels with the VAE's downscale factor."""
    return math.prod(-(-side // (PATCH * downscale)) for side in images.shape[-2:])


def grid_size(latents: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches that cover latents (..., h, w)."""
    return -(-latents.shape[-2] // patch), -(-latents.shape[-1] // patch)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, h/p * w/p, C * p * p)."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(patches: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(B, rows * columns, C * p * p) -> (B, C, rows * p, columns * p)."""
    return rearrange(
        patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=patch, q=patch
    )
