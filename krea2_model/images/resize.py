"""Images resized, cropped, padded or extended to a size.

Images are (B, H, W, C) in [0, 1], masks (B, H, W); sizes are in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_finite
from .masks import repaint_mask
from .sizes import ASPECTS, MULTIPLE, check_size, size_for_area

MODES = ("crop", "pad", "stretch")
PADDINGS = ("edge", "grey")
FROM_IMAGE = "image"


def colours(image: Tensor, name: str = "The image") -> Tensor:
    """The three colours of images (B, H, W, C): alpha is left out, grey becomes red, green, blue.

    Raises ValueError for anything that is no batch of images with at least one pixel, and for NaN.
    """
    if image.ndim != 4 or min(image.shape) < 1 or image.shape[-1] == 2:
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}; expected (batch, height, width, channels) "
            "of at least one pixel, with 1, 3 or 4 channels."
        )
    image = image.float()[..., :3]
    check_finite(image, name)
    return image.expand(*image.shape[:3], 3)


def resize(image: Tensor, width: int, height: int) -> Tensor:
    """Images (B, H, W, C) at another size: bicubic, without aliasing when they shrink."""
    if image.shape[1:3] == (height, width):
        return image
    scaled = F.interpolate(image.movedim(-1, 1), (height, width), mode="bicubic", antialias=True)
    return scaled.clamp(0, 1).movedim(1, -1)


def resize_mask(mask: Tensor, width: int, height: int) -> Tensor:
    if mask.shape[1:3] == (height, width):
        return mask
    scaled = F.interpolate(mask[:, None], (height, width), mode="bilinear", antialias=True)
    return scaled[:, 0].clamp(0, 1)


def pad(image: Tensor, left: int, top: int, right: int, bottom: int, padding: str) -> Tensor:
    """Pad images (B, H, W, C) with their outermost pixels, or with grey."""
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; expected one of {', '.join(PADDINGS)}.")
    planes, sides = image.movedim(-1, 1), (left, right, top, bottom)
    if padding == "edge":
        return F.pad(planes, sides, mode="replicate").movedim(1, -1)
    return F.pad(planes, sides, value=0.5).movedim(1, -1)


def pad_to_tokens(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Images and masks whose sides are multiples of 16: continued at the right and bottom."""
    height, width = image.shape[1:3]
    right, bottom = -width % MULTIPLE, -height % MULTIPLE
    image = pad(image, 0, 0, right, bottom, "edge")
    return image, pad(mask[..., None], 0, 0, right, bottom, "edge")[..., 0]


def target_size(width: int, height: int, megapixels: float, aspect: str) -> tuple[int, int]:
    """Width and height in multiples of 16 for an image of this size.

    megapixels: in units of 1024 x 1024 pixels; 0 keeps the image's area.
    aspect: "image" or one of `ASPECTS`.
    """
    if aspect != FROM_IMAGE and aspect not in ASPECTS:
        raise ValueError(
            f"aspect is {aspect!r}; expected {FROM_IMAGE} or one of {', '.join(ASPECTS)}."
        )
    across, down = (width, height) if aspect == FROM_IMAGE else map(int, aspect.split(":"))
    return size_for_area(across, down, megapixels or width * height / 1024**2)


def resize_and_crop(
    image: Tensor, mask: Tensor, width: int, height: int, mode: str, padding: str = "edge"
) -> tuple[Tensor, Tensor]:
    """Images and masks in another size; padding is masked.

    mode: crop scales until the image covers the size and cuts its ends off alike, pad scales until
    it fits in and continues it on both ends alike, stretch ignores its aspect.
    """
    rows, columns = image.shape[1:3]
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    scales = width / columns, height / rows
    across, down = width, height
    if mode != "stretch":
        scale = max(scales) if mode == "crop" else min(scales)
        across, down = max(1, round(columns * scale)), max(1, round(rows * scale))
    image, mask = resize(image, across, down), resize_mask(mask, across, down)
    # One pair is 0: a size is either cut or padded, and by rounding never both.
    left, top = (across - width) // 2, (down - height) // 2
    if mode == "crop":
        image = image[:, top : top + height, left : left + width]
        mask = mask[:, top : top + height, left : left + width]
    elif mode == "pad":
        left, top = -left, -top
        right, bottom = width - across - left, height - down - top
        image = pad(image, left, top, right, bottom, padding)
        mask = F.pad(mask, (left, right, top, bottom), value=1.0)
    return image, mask


def extend(
    image: Tensor, left: int, top: int, right: int, bottom: int, feather: int = 0
) -> tuple[Tensor, Tensor]:
    """Images extended by their edge pixels, and the mask of the new pixels.

    The extension is rounded up so that both sides are multiples of 16, at the right and bottom
    unless the image grows only to the left or top.
    feather: pixels by which the mask reaches into the image, falling off.
    """
    added = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, pixels in added.items():
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 0:
            raise ValueError(f"{name} is {pixels!r}; expected a whole number of pixels from 0 on.")
    if not any(added.values()):
        raise ValueError(
            "left, top, right and bottom are all 0; expected pixels to add on one side at least."
        )
    height, width = image.shape[1:3]
    for first, last, size in (("left", "right", width), ("top", "bottom", height)):
        rest = -(size + added[first] + added[last]) % MULTIPLE
        added[first if added[first] and not added[last] else last] += rest
        check_size("width" if first == "left" else "height", size + added[first] + added[last])
    left, top, right, bottom = (added[name] for name in ("left", "top", "right", "bottom"))
    new = F.pad(torch.zeros(1, height, width), (left, right, top, bottom), value=1.0)
    mask = repaint_mask(new.to(image.device), feather=feather, soft=True)
    return pad(image, left, top, right, bottom, "edge"), mask.expand(len(image), -1, -1)


def on_white(pixels: Tensor) -> Tensor:
    """An image (3 or 4, H, W) as (3, H, W): where it is transparent, white shows."""
    if pixels.shape[0] == 3:
        return pixels
    alpha = pixels[3:]
    return pixels[:3] * alpha + (1 - alpha)
