"""Areas of one image that are painted again one by one: from masks and boxes to crops and back.

Images are (1, H, W, C) in [0, 1], masks (H, W); sizes are in pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import by_count, counted, is_number
from .crop import Box, box_around, common_box_size, extent_of, paste
from .masks import EMPTY, repaint_mask, without_noise
from .resize import colours, resize, resize_mask

logger = logging.getLogger(__name__)

# More areas in one image are a mask of noise, or one that should be smoothed first.
MAX_AREAS = 64
# Areas that are smaller on both sides are specks of a detector.
MIN_SIDE = 8


@dataclass(frozen=True)
class LocalMask:
    """A mask in its extent alone: values (box.height, box.width)."""

    box: Box
    values: Tensor

    def overlaps(self, other: LocalMask) -> bool:
        """True if a pixel is masked in both."""
        ours, theirs = self.box, other.box
        left, top = max(ours.left, theirs.left), max(ours.top, theirs.top)
        width = min(ours.left + ours.width, theirs.left + theirs.width) - left
        height = min(ours.top + ours.height, theirs.top + theirs.height) - top
        if width <= 0 or height <= 0:
            return False
        first, second = (
            Box(left - own.box.left, top - own.box.top, width, height).of(own.values)
            for own in (self, other)
        )
        return bool(((first > 0) & (second > 0)).any())

    def within(self, box: Box) -> Tensor:
        """The mask (box.height, box.width) of a box that holds all of it."""
        mask = self.values.new_zeros(box.height, box.width)
        left, top = self.box.left - box.left, self.box.top - box.top
        mask[top : top + self.box.height, left : left + self.box.width] = self.values
        return mask


@dataclass(frozen=True)
class Area:
    """One area to paint.

    number: from 0, in the order of the masks.
    repaint: its mask, grown and feathered.
    box: the part of the image that is cropped. width, height: the size that the crop is painted at.
    turn: 0 for areas painted first; an area that overlaps an earlier one has a later turn, and sees
        its result.
    """

    number: int
    repaint: LocalMask
    box: Box
    width: int
    height: int
    turn: int

    @property
    def is_reduced(self) -> bool:
        """True if the crop is larger than it is painted."""
        return self.box.width > self.width or self.box.height > self.height


def masks_of(masks: Tensor, islands: bool = True) -> list[LocalMask]:
    """The areas of masks (N, H, W) in [0, 1], in the order of the masks.

    islands: each part of a mask that is apart from the others is an area, from top to bottom.
    Parts of less than `MIN_SIDE` pixels on both sides are left out, with a warning.
    Raises ValueError where nothing is left, naming the empty or tiny masks.
    """
    found: list[LocalMask] = []
    tiny = 0
    for mask in without_noise(masks):
        for box, own in _islands(mask) if islands else _whole(mask):
            if max(box.width, box.height) < MIN_SIDE:
                tiny += 1
            else:
                found.append(LocalMask(box, box.of(mask) * own.to(mask)))
    if not found and tiny:
        raise ValueError(
            f"{by_count(tiny, 'The area', f'All {tiny} areas')} of the mask "
            f"{by_count(tiny, 'is', 'are')} smaller than {MIN_SIDE} x {MIN_SIDE} px: nothing "
            "would be painted. Grow or smooth the mask."
        )
    if not found:
        raise ValueError(f"{EMPTY}there is no area to paint. White in the mask is painted.")
    if tiny:
        areas = counted(tiny, "area")
        logger.warning("Left out: %s of less than %d x %d px.", areas, MIN_SIDE, MIN_SIDE)
    return found


def masks_of_boxes(boxes: Sequence[Sequence[float]], width: int, height: int) -> list[LocalMask]:
    """Areas that are wholly masked boxes (left, top, right, bottom) of an image of this size.

    Raises ValueError for a box that is not four numbers, is empty, or lies outside of the image.
    """
    found = []
    for number, box in enumerate(boxes, start=1):
        sides = list(box) if isinstance(box, Sequence) and not isinstance(box, str) else [box]
        if len(sides) != 4 or not all(is_number(side) and math.isfinite(side) for side in sides):
            raise ValueError(
                f"Box {number} is {box!r}; expected left, top, right and bottom in pixels."
            )
        left, top = (max(0, round(side)) for side in sides[:2])
        right, bottom = min(width, round(sides[2])), min(height, round(sides[3]))
        if right <= left or bottom <= top:
            raise ValueError(
                f"Box {number} is {tuple(sides)}; expected left below right and top below bottom, "
                f"inside of the image of {width} x {height} px."
            )
        across, down = right - left, bottom - top
        found.append(LocalMask(Box(left, top, across, down), torch.ones(down, across)))
    if not found:
        raise ValueError("There are no boxes: no area to paint. Give one at least.")
    return found


def plan_areas(
    masks: Sequence[LocalMask],
    width: int,
    height: int,
    *,
    megapixels: float,
    context: float = 2.0,
    grow: int = 8,
    feather: int = 8,
) -> list[Area]:
    """The areas of an image of this size, in the order of the masks.

    megapixels: of the size that each is painted at, in units of 1024 x 1024 pixels.
    context: sides of the crop over those of the mask. grow, feather: see `repaint_mask`.
    Raises ValueError for more than `MAX_AREAS`, and as `box_size` and `repaint_mask` do.
    """
    if len(masks) > MAX_AREAS:
        raise ValueError(
            f"There are {len(masks)} areas; expected at most {MAX_AREAS}. Smooth the mask, or "
            "detect fewer (a higher threshold, a larger smallest size)."
        )
    areas: list[Area] = []
    image = Box(0, 0, width, height)
    for number, mask in enumerate(masks):
        repaint = _grown(mask, grow, feather, image)
        extent = repaint.box
        sides = (extent.width, extent.height), (width, height)
        across, down, columns, rows = common_box_size(*sides, context, megapixels)
        earlier = [area.turn for area in areas if area.repaint.overlaps(repaint)]
        turn = max(earlier) + 1 if earlier else 0
        box = box_around(extent, across, down, image)
        areas.append(Area(number, repaint, box, columns, rows, turn))
    return areas


def batches(
    areas: Sequence[Area],
    most: Callable[[int, int], int],
    kind: Callable[[Area], object] = lambda area: None,
) -> Iterator[list[Area]]:
    """Areas of one turn, one size and one kind together, in the order in which they are painted.

    most: how many of a width and height fit in one run of the model.
    """
    groups: dict[tuple, list[Area]] = {}
    for area in sorted(areas, key=lambda area: area.turn):
        groups.setdefault((area.turn, area.width, area.height, kind(area)), []).append(area)
    for (_, width, height, _), group in groups.items():
        size = max(1, most(width, height))
        for start in range(0, len(group), size):
            yield group[start : start + size]


class AreaCanvas:
    """An image (1, H, W, C) whose areas are cropped, painted and pasted, batch by batch.

    Crops of one turn show the image as it was before that turn, so that the result does not depend
    on the size of batches. image: the result so far; the image it began with is not changed.
    """

    def __init__(self, image: Tensor):
        self.image = image.clone()
        self._before, self._turn = image, 0

    def crop(self, areas: Sequence[Area]) -> tuple[Tensor, Tensor]:
        """Crops (N, h, w, 3) of areas of one size and turn, and their masks (N, h, w)."""
        if areas[0].turn != self._turn:
            self._before, self._turn = self.image.clone(), areas[0].turn
        size = areas[0].width, areas[0].height
        crops = [resize(colours(area.box.of(self._before[0])[None]), *size) for area in areas]
        masks = [resize_mask(area.repaint.within(area.box)[None], *size) for area in areas]
        return torch.cat(crops), without_noise(torch.cat(masks).to(self.image.device))

    def paste(self, areas: Sequence[Area], painted: Tensor, blend: int) -> None:
        """Write painted crops (N, h, w, 3), of any size, into the image.

        blend: pixels inside of each mask's edge over which the new image fades in.
        """
        for area, crop in zip(areas, painted, strict=True):
            part = resize(crop[None], area.box.width, area.box.height)[0].to(self.image)
            mask = area.repaint.within(area.box).to(self.image.device)
            paste(self.image[0], area.box, part, mask, blend)


def painted_mask(areas: Sequence[Area], width: int, height: int) -> Tensor:
    """The mask (1, H, W) of all areas together."""
    mask = torch.zeros(1, height, width)
    for area in areas:
        part = area.repaint.box.of(mask[0])
        part.copy_(torch.maximum(part, area.repaint.values.to(part)))
    return mask


def _whole(mask: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The extent of a mask (H, W) and its pixels there; nothing for an empty one."""
    extent = extent_of(mask)
    if extent is not None:
        yield extent, extent.of(mask) > 0


def _islands(mask: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The extent of each island of a mask (H, W) and its own pixels there."""
    # Imported here, since it takes a second and most runs have no mask.
    from scipy.ndimage import find_objects, label

    labels, _ = label((mask > 0).cpu().numpy(), structure=[[1] * 3] * 3)
    for number, (rows, columns) in enumerate(find_objects(labels), start=1):
        width, height = columns.stop - columns.start, rows.stop - rows.start
        own = torch.from_numpy(labels[rows, columns] == number)
        yield Box(columns.start, rows.start, width, height), own


def _grown(mask: LocalMask, grow: int, feather: int, image: Box) -> LocalMask:
    """A mask grown and feathered, see `repaint_mask`, within the image."""
    box, margin = mask.box, max(0, grow) + max(0, feather)
    left, top = max(0, box.left - margin), max(0, box.top - margin)
    right = min(image.width, box.left + box.width + margin)
    bottom = min(image.height, box.top + box.height + margin)
    wide = Box(left, top, right - left, bottom - top)
    values = repaint_mask(mask.within(wide)[None], grow, feather, soft=True)[0]
    extent = extent_of(values)
    assert extent is not None  # masks have masked pixels, and growing takes none away
    moved = Box(left + extent.left, top + extent.top, extent.width, extent.height)
    return LocalMask(moved, extent.of(values))
