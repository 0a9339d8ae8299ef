"""Framing: an image cut, padded or scaled to a size, and the part of it around a mask.

Images are (B, H, W, C) in [0, 1], masks (B, H, W); sizes are in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import composite, mask_for, repaint_mask
from .sizes import ASPECTS, MULTIPLE, check_size, size_near

MODES = ("crop", "pad", "stretch")
PADDINGS = ("edge", "grey")
FROM_IMAGE = "image"

# Less of an image says too little about what is to be painted into it.
_SMALLEST_CROP = 64


@dataclass(frozen=True)
class Box:
    """A part of an image, from its left and top pixel on."""

    left: int
    top: int
    width: int
    height: int

    def of(self, image: Tensor) -> Tensor:
        """The part of one image (H, W, C) or mask (H, W)."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Crop:
    """What was cut out of images, to be put back: images, masks and an own box for each."""

    images: Tensor
    masks: Tensor
    boxes: tuple[Box, ...]


def colours(image: Tensor) -> Tensor:
    """The three colours of images (B, H, W, C): alpha is left out, grey becomes red, green, blue.

    Raises ValueError for anything that is no batch of images with at least one pixel.
    """
    if image.ndim != 4 or min(image.shape) < 1 or image.shape[-1] == 2:
        raise ValueError(
            f"The image has shape {tuple(image.shape)}; expected (batch, height, width, channels) "
            "of at least one pixel, with 1, 3 or 4 channels."
        )
    image = image.float()
    return image.expand(*image.shape[:3], 3) if image.shape[-1] == 1 else image[..., :3]


def resized(image: Tensor, width: int, height: int) -> Tensor:
    """Images (B, H, W, C) at another size: bicubic, without aliasing when they shrink."""
    if image.shape[1:3] == (height, width):
        return image
    scaled = F.interpolate(image.movedim(-1, 1), (height, width), mode="bicubic", antialias=True)
    return scaled.clamp(0, 1).movedim(1, -1)


def resized_mask(mask: Tensor, width: int, height: int) -> Tensor:
    if mask.shape[1:3] == (height, width):
        return mask
    scaled = F.interpolate(mask[:, None], (height, width), mode="bilinear", antialias=True)
    return scaled[:, 0].clamp(0, 1)


def padded(image: Tensor, left: int, top: int, right: int, bottom: int, padding: str) -> Tensor:
    """Images (B, H, W, C) with more around them: their outermost pixels, or grey."""
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; expected one of {', '.join(PADDINGS)}.")
    planes, sides = image.movedim(-1, 1), (left, right, top, bottom)
    if padding == "edge":
        return F.pad(planes, sides, mode="replicate").movedim(1, -1)
    return F.pad(planes, sides, value=0.5).movedim(1, -1)


def whole_tokens(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Images and masks whose sides are multiples of 16: continued at the right and bottom."""
    height, width = image.shape[1:3]
    right, bottom = -width % MULTIPLE, -height % MULTIPLE
    image = padded(image, 0, 0, right, bottom, "edge")
    return image, padded(mask[..., None], 0, 0, right, bottom, "edge")[..., 0]


def fitted_size(width: int, height: int, megapixels: float, aspect: str) -> tuple[int, int]:
    """Width and height in multiples of 16 for an image of this size.

    megapixels: in units of 1024 x 1024 pixels; 0 keeps the image's area.
    aspect: "image" or one of `ASPECTS`.
    """
    if aspect != FROM_IMAGE and aspect not in ASPECTS:
        raise ValueError(
            f"aspect is {aspect!r}; expected {FROM_IMAGE} or one of {', '.join(ASPECTS)}."
        )
    across, down = (width, height) if aspect == FROM_IMAGE else map(int, aspect.split(":"))
    return size_near(across, down, megapixels or width * height / 1024**2)


def fitted(
    image: Tensor, mask: Tensor, width: int, height: int, mode: str, padding: str = "edge"
) -> tuple[Tensor, Tensor]:
    """Images and masks in another size; what is padded is masked.

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
    image, mask = resized(image, across, down), resized_mask(mask, across, down)
    # One pair is 0: a size is either cut or padded, and by rounding never both.
    left, top = (across - width) // 2, (down - height) // 2
    if mode == "crop":
        image = image[:, top : top + height, left : left + width]
        mask = mask[:, top : top + height, left : left + width]
    elif mode == "pad":
        left, top = -left, -top
        right, bottom = width - across - left, height - down - top
        image = padded(image, left, top, right, bottom, padding)
        mask = F.pad(mask, (left, right, top, bottom), value=1.0)
    return image, mask


def extended(
    image: Tensor, left: int, top: int, right: int, bottom: int, feather: int = 0
) -> tuple[Tensor, Tensor]:
    """Images with more around them, continued from their edges, and the mask of what is new.

    What is added is rounded up so that both sides are multiples of 16, at the right and bottom
    unless the image grows only to the left or top.
    feather: how far the mask reaches into the image, falling off, where it borders on what is new.
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
    return padded(image, left, top, right, bottom, "edge"), mask.expand(len(image), -1, -1)


def crop_boxes(mask: Tensor, context: float, megapixels: float) -> tuple[list[Box], int, int]:
    """A box around each mask (B, H, W), all of one size, and the size they are to be worked at.

    context: the box's sides over those of the mask's extent, 1 or more; of a batch, the largest
        extent counts.
    megapixels: of the working size, in units of 1024 x 1024 pixels; 0 keeps the box's own size.
        Multiples of 16; the box takes on its aspect as far as the image allows.
    An image whose own mask is empty has its box in the middle. Raises ValueError where all are.
    """
    if not math.isfinite(context) or context < 1:
        raise ValueError(f"context is {context!r}; expected 1 or more.")
    height, width = mask.shape[-2:]
    extents = [_extent(one) for one in mask]
    found = [extent for extent in extents if extent is not None]
    if not found:
        raise ValueError(
            "The mask is empty: there is nothing to crop around. Paint a mask, or check whether it "
            "is inverted."
        )
    across = math.ceil(context * max(right - left for left, _, right, _ in found))
    down = math.ceil(context * max(bottom - top for _, top, _, bottom in found))
    # A strip would show too little beside itself.
    across, down = (
        min(size, max(side, other // 2, _SMALLEST_CROP))
        for side, other, size in ((across, down, width), (down, across, height))
    )
    if megapixels:
        columns, rows = size_near(across, down, megapixels)
        if across * rows < down * columns:
            across = min(width, round(down * columns / rows))
        else:
            down = min(height, round(across * rows / columns))
    else:
        across, down = (
            min(size, -(-side // MULTIPLE) * MULTIPLE)
            for side, size in ((across, width), (down, height))
        )
        # Where the image ends before, it is stretched a little.
        columns, rows = (-(-side // MULTIPLE) * MULTIPLE for side in (across, down))
    boxes = []
    for extent in extents:
        left, top, right, bottom = extent or (0, 0, width, height)
        boxes.append(
            Box(
                min(max(0, (left + right - across) // 2), width - across),
                min(max(0, (top + bottom - down) // 2), height - down),
                across,
                down,
            )
        )
    return boxes, columns, rows


def crop(image: Tensor, mask: Tensor, context: float, megapixels: float):
    """The images (B, h, w, C) and masks (B, h, w) to work at, and the `Crop` to put them back."""
    count = max(len(image), len(mask))
    image, mask = (part.expand(count, *part.shape[1:]) for part in (image, mask))
    boxes, columns, rows = crop_boxes(mask, context, megapixels)
    parts = torch.stack([box.of(one) for box, one in zip(boxes, image, strict=True)])
    masks = torch.stack([box.of(one) for box, one in zip(boxes, mask, strict=True)])
    cut = Crop(image, mask, tuple(boxes))
    return resized(parts, columns, rows), resized_mask(masks, columns, rows), cut


def stitched(cut: Crop, painted: Tensor, feather: int = 0, mask: Tensor | None = None) -> Tensor:
    """The images with what was painted in their boxes, elsewhere and outside the mask to the bit.

    painted: (B, h, w, 3) of any size; a crop of one image takes any number of them.
    mask: in the crop's aspect, where another than the one that was cropped is to count.
    """
    images, boxes, masks = cut.images, cut.boxes, cut.masks
    if len(images) == 1 and len(painted) > 1:
        images, masks = (part.expand(len(painted), *part.shape[1:]) for part in (images, masks))
        boxes = boxes * len(painted)
    if len(painted) != len(images):
        raise ValueError(
            f"There are {len(painted)} painted images for {len(images)} that were cropped; "
            "expected one for each."
        )
    painted = resized(painted, boxes[0].width, boxes[0].height).to(images)
    if mask is not None:
        mask = mask_for(mask, painted).expand(len(painted), -1, -1)
    result = images.clone()
    for index, box in enumerate(boxes):
        part = box.of(result[index])
        inner = box.of(masks[index]) if mask is None else mask[index]
        part.copy_(composite(part[None], painted[index][None], inner[None], feather)[0])
    return result


def aligned(original: Tensor, painted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The painted images in the original's size, and the mask without what they do not show.

    Sides that were continued to multiples of 16 are cut at the right and bottom; sides that the
    VAE cropped to multiples of 8, on both ends alike, are put back there.
    """
    height, width = original.shape[1:3]
    rows, columns = painted.shape[1:3]
    if not (-8 < rows - height < MULTIPLE and -8 < columns - width < MULTIPLE):
        raise ValueError(
            f"The painted image is {columns} x {rows} px and the original {width} x {height}; "
            "expected the same size. Connect the image that was encoded, or put a crop back with "
            "Krea 2 Stitch."
        )
    painted = painted[:, :height, :width]
    top, left = max(0, height - rows) // 2, max(0, width - columns) // 2
    bottom, right = max(0, height - rows) - top, max(0, width - columns) - left
    if top or left or bottom or right:
        painted = padded(painted, left, top, right, bottom, "edge")
        shown = torch.ones(1, height - top - bottom, width - left - right, device=mask.device)
        mask = mask * F.pad(shown, (left, right, top, bottom))
    return painted, mask


def _extent(mask: Tensor) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is masked in one mask (H, W), or None."""
    rows, columns = (torch.nonzero(mask.amax(dim=axis) > 0).flatten() for axis in (1, 0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def on_white(pixels: Tensor) -> Tensor:
    """An image (3 or 4, H, W) as (3, H, W): where it is transparent, white shows."""
    if pixels.shape[0] == 3:
        return pixels
    alpha = pixels[3:]
    return pixels[:3] * alpha + (1 - alpha)
