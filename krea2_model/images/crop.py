"""The part of an image around a mask: cropped to be painted at a good size, and stitched back.

Images are (B, H, W, C) in [0, 1], masks (B, H, W); sizes are in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import composite, mask_for
from .resize import pad, resize, resize_mask
from .sizes import MULTIPLE, size_for_area

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
    """Images, their masks, and the box of each that was cropped, to stitch the crops back."""

    images: Tensor
    masks: Tensor
    boxes: tuple[Box, ...]


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
    known = [extent for extent in extents if extent is not None]
    if not known:
        raise ValueError(
            "The mask is empty: there is nothing to crop around. Paint a mask, or check whether it "
            "is inverted."
        )
    across = math.ceil(context * max(right - left for left, _, right, _ in known))
    down = math.ceil(context * max(bottom - top for _, top, _, bottom in known))
    # A strip would show too little beside itself.
    across, down = (
        min(size, max(side, other // 2, _SMALLEST_CROP))
        for side, other, size in ((across, down, width), (down, across, height))
    )
    if megapixels:
        columns, rows = size_for_area(across, down, megapixels)
        if across * rows < down * columns:
            across = min(width, round(down * columns / rows))
        else:
            down = min(height, round(across * rows / columns))
    else:
        across, down = (
            min(size, -(-side // MULTIPLE) * MULTIPLE)
            for side, size in ((across, width), (down, height))
        )
        # At the image's end the box is smaller, and its content stretched a little.
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
    """Cropped images (B, h, w, C) and masks (B, h, w), and the `Crop` to stitch them back."""
    count = max(len(image), len(mask))
    image, mask = (part.expand(count, *part.shape[1:]) for part in (image, mask))
    boxes, columns, rows = crop_boxes(mask, context, megapixels)
    parts = torch.stack([box.of(one) for box, one in zip(boxes, image, strict=True)])
    masks = torch.stack([box.of(one) for box, one in zip(boxes, mask, strict=True)])
    cut = Crop(image, mask, tuple(boxes))
    return resize(parts, columns, rows), resize_mask(masks, columns, rows), cut


def stitch(cut: Crop, painted: Tensor, feather: int = 0, mask: Tensor | None = None) -> Tensor:
    """The original images with the painted crops in their boxes; exact outside of the mask.

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
    painted = resize(painted, boxes[0].width, boxes[0].height).to(images)
    if mask is not None:
        mask = mask_for(mask, painted).expand(len(painted), -1, -1)
    result = images.clone()
    for index, box in enumerate(boxes):
        part = box.of(result[index])
        inner = box.of(masks[index]) if mask is None else mask[index]
        part.copy_(composite(part[None], painted[index][None], inner[None], feather)[0])
    return result


def align_to_original(original: Tensor, painted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The painted images in the original's size, and the mask limited to the part they show.

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
        painted = pad(painted, left, top, right, bottom, "edge")
        shown = torch.ones(1, height - top - bottom, width - left - right, device=mask.device)
        mask = mask * F.pad(shown, (left, right, top, bottom))
    return painted, mask


def _extent(mask: Tensor) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the masked pixels of one mask (H, W), or None."""
    rows, columns = (torch.nonzero(mask.amax(dim=axis) > 0).flatten() for axis in (1, 0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
