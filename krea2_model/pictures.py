"""Pictures as callers give them, and as they are given back."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .framing import fitted
from .prompt_images import on_white
from .sizes import shrunk_size

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# A picture: an image of PIL's, or (3 or 4, H, W) in [0, 1].
Picture = Tensor | Image.Image


def pixels_of(picture: Picture, name: str) -> Tensor:
    """A picture as (3, H, W) in [0, 1], in float32; where it is transparent, white shows.

    Raises ValueError, with the name of the argument, for what is no picture.
    """
    if isinstance(picture, Image.Image):
        array = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
        picture = torch.from_numpy(array).movedim(-1, 0)
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (3, 4):
        shape = tuple(getattr(picture, "shape", ())) or type(picture).__name__
        raise ValueError(
            f"{name} is {shape}; expected an image of PIL's, or a tensor (3, height, width) in "
            "[0, 1], or with 4 channels."
        )
    return on_white(picture.float())


def fit(pixels: Tensor, width: int | None, height: int | None) -> Tensor:
    """A picture (3, H, W) cropped to a size; to its own in whole tokens where it is None."""
    own = shrunk_size(pixels.shape[2], pixels.shape[1], math.prod(pixels.shape[1:]) / 1024**2)
    image = pixels.movedim(0, -1)[None]
    made = fitted(image, image[..., 0], width or own[0], height or own[1], "crop")[0]
    return made[0].movedim(-1, 0)


def shrink(pixels: Tensor, megapixels: float) -> Tensor:
    """A picture (3, H, W) at its own shape and of at most an area, see `shrunk_size`."""
    width, height = shrunk_size(pixels.shape[2], pixels.shape[1], megapixels)
    return fit(pixels, width, height)


def to_output(images: Tensor, output_type: str):
    """Images (B, 3, H, W) in [-1, 1] to what the caller asked for."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)]
