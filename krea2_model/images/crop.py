"""The part of an image around a mask: cropped to be painted at a good size, and stitched back.

Images are (B, H, W, C) in [0, 1], masks (B, H, W); sizes are in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import there_are
from .masks import composite, mask_for
from .resize import pad, resize, resize_mask
from .sizes import ASPECTS, MULTIPLE, size_for_area, size_for_aspect

# Less of an image says too little about what is to be painted into it.
_SMALLEST_CROP = 64
# A crop may be stretched by this share, which nobody sees.
_STRETCH = 0.02


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
    _check_context(context)
    height, width = mask.shape[-2:]
    extents = [extent_of(one) for one in mask]
    known = [extent for extent in extents if extent is not None]
    if not known:
        raise ValueError(
            "The mask is empty: there is nothing to crop around. Paint a mask, or check whether it "
            "is inverted."
        )
    sides = max(box.width for box in known), max(box.height for box in known)
    across, down, columns, rows = box_size(sides, (width, height), context, megapixels)
    whole = Box(0, 0, width, height)
    boxes = [box_around(extent or whole, across, down, whole) for extent in extents]
    return boxes, columns, rows


def box_size(
    extent: tuple[int, int], image: tuple[int, int], context: float, megapixels: float
) -> tuple[int, int, int, int]:
    """Width and height of a box around an extent, and the size it is to be worked at.

    extent, image: width and height. Other arguments and errors as in `crop_boxes`.
    """
    _check_context(context)
    across, down = _with_context(extent, image, context)
    if megapixels:
        columns, rows = size_for_area(across, down, megapixels)
        return (*_in_aspect(across, down, columns, rows, image), columns, rows)
    across, down = (
        min(size, -(-side // MULTIPLE) * MULTIPLE)
        for side, size in zip((across, down), image, strict=True)
    )
    # At the image's end the box is smaller, and its content stretched a little.
    columns, rows = (-(-side // MULTIPLE) * MULTIPLE for side in (across, down))
    return across, down, columns, rows


def common_box_size(
    extent: tuple[int, int], image: tuple[int, int], context: float, megapixels: float
) -> tuple[int, int, int, int]:
    """As `box_size`, in the nearest of `ASPECTS`, so that boxes of like shape share one size.

    Where the image is too small for a box of that aspect, the box keeps its own.
    """
    _check_context(context)
    across, down = _with_context(extent, image, context)
    aspect = min(ASPECTS, key=lambda name: abs(math.log(across / down / _ratio(name))))
    columns, rows = size_for_aspect(aspect, megapixels)
    wide, high = _in_aspect(across, down, columns, rows, image)
    if abs(wide * rows / (high * columns) - 1) > _STRETCH:
        return box_size(extent, image, context, megapixels)
    return wide, high, columns, rows


def box_around(extent: Box, across: int, down: int, image: Box) -> Box:
    """A box of a size with an extent in its middle, as far as the image allows."""
    left = extent.left + (extent.width - across) // 2
    top = extent.top + (extent.height - down) // 2
    return Box(
        min(max(0, left), image.width - across),
        min(max(0, top), image.height - down),
        across,
        down,
    )


def _check_context(context: float) -> None:
    if not math.isfinite(context) or context < 1:
        raise ValueError(f"context is {context!r}; expected 1 or more.")


def _with_context(
    extent: tuple[int, int], image: tuple[int, int], context: float
) -> tuple[int, int]:
    """Sides of a box around an extent; a strip would show too little beside itself."""
    across, down = (math.ceil(context * side) for side in extent)
    width, height = image
    return (
        min(width, max(across, down // 2, _SMALLEST_CROP)),
        min(height, max(down, across // 2, _SMALLEST_CROP)),
    )


def _in_aspect(
    across: int, down: int, columns: int, rows: int, image: tuple[int, int]
) -> tuple[int, int]:
    """The sides of a box, one of them made longer to the aspect columns : rows within an image."""
    width, height = image
    if across * rows < down * columns:
        return min(width, round(down * columns / rows)), down
    return across, min(height, round(across * rows / columns))


def _ratio(aspect: str) -> float:
    across, down = map(int, aspect.split(":"))
    return across / down


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
            f"{there_are(len(painted), 'painted image')} for {len(images)} that were cropped; "
            "expected one for each."
        )
    painted = resize(painted, boxes[0].width, boxes[0].height).to(images)
    if mask is not None:
        mask = mask_for(mask, painted).expand(len(painted), -1, -1)
    result = images.clone()
    for index, box in enumerate(boxes):
        inner = box.of(masks[index]) if mask is None else mask[index]
        paste(result[index], box, painted[index], inner, feather)
    return result


def paste(image: Tensor, box: Box, painted: Tensor, mask: Tensor, feather: int) -> None:
    """Write a painted crop (h, w, 3) into its box of an image (H, W, C), inside a mask (h, w).

    The crop and the mask are of the box's size. Outside of the mask the image stays to the bit.
    """
    part = box.of(image)
    part.copy_(composite(part[None], painted[None], mask[None], feather)[0])


def align_to_original(original: Tensor, painted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The painted images in the original's size, and the mask limited to the part they show.

    Sides that were continued to multiples of 16 are cut at the right and bottom; sides that the
    VAE cropped to multiples of 8, on both ends alike, are put back there. The image of a decoder
    that doubles the size is reduced.
    """
    height, width = original.shape[1:3]
    rows, columns = painted.shape[1:3]

    def is_near(rows: int, columns: int) -> bool:
        return -8 < rows - height < MULTIPLE and -8 < columns - width < MULTIPLE

    if not is_near(rows, columns):
        if not is_near(rows // 2, columns // 2):
            raise ValueError(
                f"The painted image is {columns} x {rows} px and the original {width} x {height}; "
                "expected the same size. Connect the image that was encoded, or put a crop back "
                "with Krea 2 Stitch."
            )
        rows, columns = rows // 2, columns // 2
        painted = resize(painted, columns, rows)
    painted = painted[:, :height, :width]
    top, left = max(0, height - rows) // 2, max(0, width - columns) // 2
    bottom, right = max(0, height - rows) - top, max(0, width - columns) - left
    if top or left or bottom or right:
        painted = pad(painted, left, top, right, bottom, "edge")
        shown = torch.ones(1, height - top - bottom, width - left - right, device=mask.device)
        mask = mask * F.pad(shown, (left, right, top, bottom))
    return painted, mask


def extent_of(mask: Tensor) -> Box | None:
    """The box of the masked pixels of one mask (H, W), or None where there are none."""
    rows, columns = (torch.nonzero(mask.amax(dim=axis) > 0).flatten() for axis in (1, 0))
    if not len(rows):
        return None
    left, top, right, bottom = (int(i) for i in (columns[0], rows[0], columns[-1], rows[-1]))
    return Box(left, top, right + 1 - left, bottom + 1 - top)
