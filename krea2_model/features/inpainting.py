"""Inpainting: the part of an image that a run paints anew, as Krea 2 Inpaint and Composite do it.

The rest of the image is put back at every step, with the step's noise, and in the result pixel by
pixel. A soft mask is a share of the run: a pixel masked by 0.6 changes as much as at denoise 0.6,
see `images.masks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from ..guidance import SigmaAt, fraction_at, unshifted
from ..images.crop import align_to_original
from ..images.masks import (
    EMPTY,
    cell_mask,
    composite,
    filled,
    mask_for,
    remaining_mask,
    repaint_mask,
)
from ..images.pictures import Picture, pixels_of
from ..images.resize import pad_to_tokens


@dataclass(frozen=True)
class Inpaint:
    """The area of start_image to paint anew.

    mask: white (1) is painted, black stays: a picture in grey, a path, or (H, W) in [0, 1]. Its
        aspect is the image's.
    grow: pixels by which the area grows. feather: pixels over which the change fades out beyond.
    soft: grey is a share of the change; else what is masked by half or more is painted.
    fill: what is under the mask at the start, one of `images.masks.FILLS`.
    blend: pixels inside the mask's edge over which the new image fades in.

    Raises ValueError for values out of range when it is used.
    """

    mask: Picture
    grow: int = 8
    feather: int = 8
    soft: bool = True
    fill: str = "original"
    blend: int = 8

    @classmethod
    def of(cls, mask: Inpaint | Picture) -> Inpaint:
        return mask if isinstance(mask, Inpaint) else cls(mask)


class Canvas:
    """An image (H, W) and the area of it to paint.

    start: pixels (3, H', W') that the VAE encodes, at whole tokens. cells: the mask of latents.
    Raises ValueError for what is no picture or no mask, and for an empty mask.
    """

    def __init__(self, image: Picture, inpaint: Inpaint):
        self._original = pixels_of(image, "start_image").movedim(0, -1)[None]
        mask = mask_for(mask_pixels(inpaint.mask, "inpaint"), self._original)
        self._repaint = repaint_mask(mask, inpaint.grow, inpaint.feather, inpaint.soft)
        if not self._repaint.any():
            raise ValueError(f"{EMPTY}nothing would be painted. White in the mask is painted.")
        padded, wide = pad_to_tokens(self._original, self._repaint)
        self.start = filled(padded, wide, inpaint.fill)[0].movedim(-1, 0)
        self.cells = cell_mask(wide)[:, None]
        self._blend, self.soft = inpaint.blend, inpaint.soft

    def paste(self, images: Tensor) -> Tensor:
        """The original (B, 3, H, W) with painted images (B, 3, H', W') inside the mask."""
        original = self._original.to(images)
        painted, mask = align_to_original(original, images.movedim(1, -1), self._repaint.to(images))
        return composite(original, painted, mask, self._blend).movedim(-1, 1)


@dataclass(frozen=True)
class LatentMask:
    """A mask (1 or B, 1, h, w) of latents, 1 where they are painted, and what stays elsewhere.

    original: latents (1 or B, C, h, w). noise: of the run, (B, C, h, w). soft: see `Inpaint`.
    """

    mask: Tensor
    original: Tensor
    noise: Tensor
    soft: bool

    def to(self, like: Tensor) -> LatentMask:
        parts = {name: getattr(self, name).to(like) for name in ("mask", "original", "noise")}
        return replace(self, **parts)

    def at(self, time: float) -> Tensor:
        """The mask when `time` of the run remains, from 1 to 0."""
        return remaining_mask(self.mask, time) if self.soft else self.mask

    def velocity(self, velocity_at, latents: Tensor, sigma: float, time: float) -> Tensor:
        """The velocity of latents towards what the model paints inside, the original outside."""
        mask = self.at(time)
        noised = torch.lerp(self.original, self.noise, sigma)
        seen = latents * mask + noised * (1 - mask)
        predicted = seen - sigma * velocity_at(seen, sigma)
        return (latents - torch.lerp(self.original, predicted, mask)) / sigma


class MaskedVelocity:
    """A velocity limited to a `LatentMask`. first: the first sigma of the run."""

    def __init__(self, velocity_at, mask: LatentMask, first: float, sigma_at: SigmaAt = unshifted):
        self._velocity_at, self._mask, self._sigma_at = velocity_at, mask, sigma_at
        self._whole = self._time(first)

    def __call__(self, latents: Tensor, sigma: float) -> Tensor:
        time = self._time(sigma) / self._whole
        return self._mask.velocity(self._velocity_at, latents, sigma, time)

    def _time(self, sigma: float) -> float:
        return 1.0 - fraction_at(min(1.0, sigma), self._sigma_at)


def mask_pixels(mask: Picture, name: str) -> Tensor:
    """A mask (1, H, W): a picture's grey. name: of the argument, for errors."""
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.array(mask))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.float() / 255 if mask.dtype == torch.uint8 else mask.float())[None]
    if isinstance(mask, Tensor) and mask.ndim == 3 and mask.shape[2] in (3, 4):
        mask = mask.movedim(-1, 0)
    if not isinstance(mask, (Tensor, str, PathLike)) and not hasattr(mask, "convert"):
        raise ValueError(
            f"{name} is {type(mask).__name__}; expected a mask: an image in grey, the path of "
            "one, or numbers (height, width) in [0, 1]."
        )
    return pixels_of(mask, "The mask").mean(dim=0, keepdim=True)
