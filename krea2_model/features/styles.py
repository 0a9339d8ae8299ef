"""Style pictures as an argument of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checks import check_type, is_number
from ..guidance import SigmaAt
from ..images.masks import without_noise
from ..images.pictures import Picture, pixels_of, reference_pixels
from ..lora.in_run import ShareAt
from ..transformer.text_attention import TextStates
from .inpainting import mask_pixels
from .style_transfer import StylePictures, StyleRun, StyleSettings, style_shares

# A token covers so many pixels a side: a smaller picture has no style to speak of.
SMALLEST = 16

MAX_STYLES = 8


@dataclass(frozen=True)
class StyleTransfer:
    """Style pictures of a run, see `style_transfer`.

    images: a picture or several: PIL images, paths, tensors (3, H, W) in [0, 1].
    strength, start, end, value_statistics, key_scale, first_block, last_block: see `StyleSettings`.
    weights: of each picture, relative to each other; None is one for each.
    mask: where in the image they act, white, in the image's shape; None is everywhere.
    prompt: describes the style pictures for their own passes; empty is usually best.
    max_megapixels: larger pictures are reduced to this area, in units of 1024 x 1024 pixels.

    Raises ValueError for values out of range.
    """

    images: Picture | Sequence[Picture]
    strength: float = StyleSettings.strength
    start: float = StyleSettings.start
    end: float = StyleSettings.end
    weights: Sequence[float] | None = None
    mask: Picture | None = None
    prompt: str = ""
    value_statistics: float = StyleSettings.value_statistics
    key_scale: float = StyleSettings.key_scale
    first_block: float = StyleSettings.first_block
    last_block: float = StyleSettings.last_block
    max_megapixels: float = 1.0

    def __post_init__(self):
        self.settings  # noqa: B018 - checks the numbers
        check_type("A style's prompt", self.prompt, str, "a text")
        if not (is_number(self.max_megapixels) and self.max_megapixels > 0):
            raise ValueError(
                f"A style's max_megapixels is {self.max_megapixels!r}; expected more than 0."
            )

    @property
    def settings(self) -> StyleSettings:
        return StyleSettings(
            self.strength,
            self.start,
            self.end,
            self.value_statistics,
            self.key_scale,
            self.first_block,
            self.last_block,
        )

    def prepared(self, width: int, height: int) -> PreparedStyle | None:
        """The pictures at their final sizes, for an image of this size; None where they are off.

        Raises ValueError for pictures, weights or a mask that cannot be used.
        """
        pictures = [pixels_of(image, "A style's image") for image in _as_list(self.images)]
        check_pictures(pictures)
        shares = style_shares(self.weights, len(pictures))
        share_at = None
        if self.mask is not None:
            share_at = style_mask(mask_pixels(self.mask, "A style's mask")[0])
            share_at(height // SMALLEST, width // SMALLEST)  # checks its shape
        if self.settings.is_off:
            return None
        resized = [reference_pixels(picture, self.max_megapixels) for picture in pictures]
        return PreparedStyle(self.settings, resized, shares, share_at, self.prompt)


@dataclass(frozen=True)
class PreparedStyle:
    """Style pictures (3, H, W) at the sizes that the VAE encodes, and their use."""

    settings: StyleSettings
    pictures: Sequence[Tensor]
    shares: Sequence[float]
    share_at: ShareAt | None
    prompt: str

    @property
    def tokens(self) -> list[int]:
        """Tokens of each picture."""
        return [picture[0].numel() // SMALLEST**2 for picture in self.pictures]

    def run(self, latents: Sequence[Tensor], text: TextStates, sigma_at: SigmaAt) -> StyleRun:
        """The pictures in a run. latents: (1, C, h, w) of each. text: of their passes, fused."""
        pictures = StylePictures(latents, self.shares, self.share_at)
        return StyleRun(self.settings, pictures, text, sigma_at)


def check_pictures(pictures: Sequence[Tensor]) -> None:
    """Raise ValueError unless there are 1 to `MAX_STYLES` pictures (3, H, W) of some size."""
    if not 1 <= len(pictures) <= MAX_STYLES:
        raise ValueError(
            f"There are {len(pictures)} style pictures; expected 1 to {MAX_STYLES}. Give the "
            "pictures whose style is wanted."
        )
    for picture in pictures:
        height, width = picture.shape[-2:]
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"A style picture is {width} x {height} px; expected at least {SMALLEST} px a side."
            )


def style_mask(mask: Tensor) -> ShareAt:
    """Shares of image tokens by a mask (H, W) of an image's shape.

    Raises ValueError for an empty mask, and when used for an image of another shape.
    """
    mask = without_noise(mask)
    if not mask.any():
        raise ValueError(
            "The style's mask is empty, so the style would act nowhere. Paint it white where the "
            "style is wanted, or leave the mask out for everywhere."
        )
    mask_height, mask_width = mask.shape

    def share_at(rows: int, columns: int) -> Tensor:
        # In pixels of the image; its sides are rounded to whole tokens.
        height, width = rows * SMALLEST, columns * SMALLEST
        scaled = mask_height * width / mask_width
        if abs(scaled - height) > SMALLEST:
            raise ValueError(
                f"The style's mask is {mask_width} x {mask_height} px, for an image of {width} x "
                f"{height} px; expected a mask of the same shape. Make it in the image's size."
            )
        cells = F.interpolate(mask[None, None].float(), (height, width), mode="area")
        return F.avg_pool2d(cells, SMALLEST).flatten()

    return share_at


def _as_list(images) -> list:
    if isinstance(images, (str, PathLike, Image.Image)):
        return [images]
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 3:
        return [images]
    if images is None or not isinstance(images, Iterable):
        raise ValueError(f"A style's images is {images!r}; expected a picture or a list of them.")
    return list(images)
