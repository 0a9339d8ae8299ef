"""Parts of an image for regional prompts: rectangles, masks, and the rest of the image.

Later regions lie on top: a region has what its own shape covers and no later one does. Shares are
exact areas, computed on cells of 4 px where regions overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import is_number, numbers
from .masks import without_noise

MAX_REGIONS = 8

# In place of a box: what no other region covers.
BACKGROUND = "background"

# The largest soft edge, in units of the image's shorter side.
MAX_SOFT = 1.0

# Cells along the side of a token.
_CELLS = 4
# Shares this near to 0 or 1 are 0 or 1.
_ROUNDING = 1e-4
# Tokens below which a region is said to cover none.
_FEWEST = 0.5
# Fractions are written with few digits, so that a right edge may come out as 1.0003.
_OVERSHOOT = 2e-3
# The largest difference in aspect at which a mask is stretched.
_SAME_ASPECT = 0.02


class Box(NamedTuple):
    """A rectangle, in fractions of the image's width and height."""

    left: float
    top: float
    width: float
    height: float

    @classmethod
    def of(cls, values: object, name: str = "A region") -> Box:
        """A box from four numbers. Raises ValueError for others, and for one outside of the image.

        name: of the region, for errors.
        """
        expected = (
            "four fractions of the image, left, top, width and height, such as 0, 0, 0.5, 1 for "
            "its left half"
        )
        entries = numbers(f"{name}'s box", values, expected)
        if len(entries) != 4:
            raise ValueError(f"{name}'s box is {entries}; expected {expected}.")
        left, top, width, height = entries
        shown = f"left {left:g}, top {top:g}, width {width:g}, height {height:g}"
        if not (width > 0 and height > 0):  # NaN too
            raise ValueError(f"{name}'s box is empty ({shown}); expected {expected}.")
        is_inside = (
            min(left, top) >= -_OVERSHOOT and max(left + width, top + height) <= 1 + _OVERSHOOT
        )
        if not is_inside:
            raise ValueError(
                f"{name}'s box lies outside of the image ({shown}); expected {expected}, with left "
                "+ width and top + height up to 1."
            )
        left, top = max(0.0, left), max(0.0, top)
        return cls(left, top, min(width, 1 - left), min(height, 1 - top))


@dataclass(frozen=True, eq=False)
class RegionShape:
    """The shape of one region: a box, a mask (H, W) in [0, 1], or neither for the background.

    soft: width of its soft edge, half inside of the edge and half outside, as a fraction of the
        image's shorter side. The image's own border is no edge.

    Raises ValueError for values out of range, and for a mask that is empty.
    """

    box: Box | None = None
    mask: Tensor | None = None
    soft: float = 0.0
    name: str = "A region"

    def __post_init__(self):
        if not (is_number(self.soft) and 0 <= self.soft <= MAX_SOFT):
            raise ValueError(
                f"{self.name}'s soft edge is {self.soft!r}; expected 0 (hard) to {MAX_SOFT:g}, as "
                "a fraction of the image's shorter side."
            )
        if self.box is not None and self.mask is not None:
            raise ValueError(f"{self.name} has a box and a mask; expected one of them.")
        if self.mask is not None and (self.mask.ndim != 2 or self.mask.numel() == 0):
            shape = tuple(self.mask.shape)
            raise ValueError(f"{self.name}'s mask has shape {shape}; expected (height, width).")
        if self.mask is not None and not without_noise(self.mask).any():
            raise ValueError(f"{self.name}'s mask is empty. Paint it white where the region is.")

    @classmethod
    def of(
        cls, box: object = None, mask: Tensor | None = None, soft: float = 0.0, name="A region"
    ) -> RegionShape:
        """The shape of a box (four numbers, or `BACKGROUND`) or of a mask (H, W).

        Raises ValueError for both, neither, and as `Box.of`.
        """
        if (box is None) == (mask is None):
            both = "both a box and a mask" if box is not None else "neither a box nor a mask"
            raise ValueError(
                f"{name} has {both}; expected one of them, or box {BACKGROUND!r} for what no other "
                "region covers."
            )
        if isinstance(box, str) and box == BACKGROUND:
            return cls(soft=soft, name=name)
        return cls(None if box is None else Box.of(box, name), mask, soft, name)

    @property
    def is_background(self) -> bool:
        return self.box is None and self.mask is None

    def centre(self) -> tuple[float, float]:
        """Column and row of its middle, in fractions of the image; that of all of it."""
        if self.box is not None:
            left, top, width, height = self.box
            return left + width / 2, top + height / 2
        if self.mask is None:
            return 0.5, 0.5
        mask = without_noise(self.mask)
        rows, columns = mask.shape
        total = mask.sum()
        row = (mask.sum(dim=1) @ (torch.arange(rows, device=mask.device) + 0.5)) / (total * rows)
        column = (mask.sum(dim=0) @ (torch.arange(columns, device=mask.device) + 0.5)) / (
            total * columns
        )
        return column.item(), row.item()

    def cover(self, rows: int, columns: int) -> Tensor:
        """The part of each of rows x columns equal cells that it covers, (rows, columns).

        Raises ValueError for a mask of another aspect than theirs.
        """
        softness = [self.soft * min(rows, columns) / side for side in (rows, columns)]
        if self.box is not None:
            left, top, width, height = self.box
            down = _covered(rows, top, top + height, softness[0])
            across = _covered(columns, left, left + width, softness[1])
            return down[:, None] * across
        assert self.mask is not None  # the background is what others leave
        self._check_aspect(rows, columns)
        mask = without_noise(self.mask).cpu().double()
        down = _averages(mask.shape[0], rows, softness[0])
        across = _averages(mask.shape[1], columns, softness[1])
        return (down @ mask @ across.mT).float()

    def _check_aspect(self, rows: int, columns: int) -> None:
        assert self.mask is not None
        height, width = self.mask.shape
        stretch = (columns / width) / (rows / height)
        # Sides are rounded to whole pixels, and those of the image to tokens of `_CELLS` cells.
        rounding = 0.5 / min(height, width) + 0.5 * _CELLS / min(rows, columns)
        if abs(stretch - 1) > _SAME_ASPECT + rounding:
            size = f"{columns * 16 // _CELLS} x {rows * 16 // _CELLS}"
            raise ValueError(
                f"{self.name}'s mask is {width} x {height} px and the image {size}; expected the "
                "same aspect. Paint the mask in the shape of the image."
            )


class RegionShapes:
    """The shapes of a run's regions, from the lowest to the one on top.

    `shares` is a `transformer.regions.SharesAt`.

    Raises ValueError for none, for more than `MAX_REGIONS`, and for two backgrounds.
    """

    def __init__(self, shapes: Sequence[RegionShape]):
        shapes = [
            replace(shape, name=f"Region {n}") if shape.name == RegionShape.name else shape
            for n, shape in enumerate(shapes, start=1)
        ]
        check_count(len(shapes))
        backgrounds = [n for n, shape in enumerate(shapes, start=1) if shape.is_background]
        if len(backgrounds) > 1:
            raise ValueError(
                f"Regions {' and '.join(map(str, backgrounds))} are the background; expected one. "
                "Give the others a box or a mask."
            )
        self.shapes = tuple(shapes)
        self._shares: dict[tuple[int, int], Tensor] = {}

    def shares(self, rows: int, columns: int) -> Tensor:
        """The share of each region in the image's tokens, (N, rows * columns), which add up to 1.

        At most: less where no region is. Raises ValueError, with its name, for a region that covers
        no token or lies below others wholly, and for a mask of another aspect.
        """
        if (rows, columns) not in self._shares:
            self._shares[rows, columns] = self._compute(rows, columns)
        return self._shares[rows, columns]

    def _compute(self, rows: int, columns: int) -> Tensor:
        shares = torch.zeros(len(self.shapes), rows, columns)
        free = torch.ones(rows * _CELLS, columns * _CELLS)
        # From the top down, and last the background.
        order = sorted(range(len(self.shapes)), key=lambda n: (self.shapes[n].is_background, -n))
        for number in order:
            shape = self.shapes[number]
            cover = free if shape.is_background else shape.cover(*free.shape)
            if cover.sum() < _FEWEST * _CELLS**2:
                self._refuse(shape, "covers", rows, columns)
            share = cover if shape.is_background else cover * free
            if share.sum() < _FEWEST * _CELLS**2:
                self._refuse(shape, "lies below others, which leave it", rows, columns)
            free = free - share
            cells = share.unflatten(1, (columns, _CELLS)).unflatten(0, (rows, _CELLS))
            shares[number] = cells.mean(dim=(1, 3))
        # Roundings of float32 would cost attention to tokens of no weight.
        shares = torch.where(shares < _ROUNDING, 0.0, shares)
        return torch.where(shares > 1 - _ROUNDING, 1.0, shares).flatten(1)

    def _refuse(self, shape: RegionShape, verb: str, rows: int, columns: int):
        if shape.is_background:
            verb = "is the background and has no place: the others leave it"
        raise ValueError(
            f"{shape.name} {verb} less than half a token (of 16 x 16 px) of the {columns * 16} x "
            f"{rows * 16} px image. Make it larger, or leave it out."
        )


def check_count(count: int) -> None:
    """Raise ValueError for no regions, and for more than `MAX_REGIONS`."""
    if not 1 <= count <= MAX_REGIONS:
        found = "no regions" if count == 0 else f"{count} regions"
        raise ValueError(f"There are {found}; expected 1 to {MAX_REGIONS}.")


def _covered(count: int, first: float, last: float, soft: float) -> Tensor:
    """The part of each of `count` equal cells of [0, 1] that [first, last] covers, (count,).

    soft: width of the ramps at both ends, which are linear; none at 0 and 1.
    """
    edges = torch.arange(count + 1, dtype=torch.float64) / count

    def passed(edge: float) -> Tensor:
        """The integral up to each cell's border of a ramp from 0 to 1 around an edge."""
        if edge <= 0:
            return edges
        if edge >= 1:
            return torch.zeros_like(edges)
        if soft == 0:
            return (edges - edge).clamp(min=0)
        along = ((edges - edge) / soft + 0.5).clamp(min=0)
        return soft * torch.where(along <= 1, along.square() / 2, along - 0.5)

    return ((passed(first) - passed(last)).diff() * count).float()


def _averages(pixels: int, cells: int, soft: float) -> Tensor:
    """Weights (cells, pixels) of the average of pixels in each cell.

    soft: width of the window over which pixels are averaged first, of the side; it is cut off at
        the image's border.
    """
    borders = torch.arange(cells + 1, dtype=torch.float64) / cells
    weights = _windows(borders[:-1], borders[1:], pixels)
    if soft > 1 / pixels:
        middles = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
        first, last = (middles - soft / 2).clamp(min=0), (middles + soft / 2).clamp(max=1)
        weights = weights @ _windows(first, last, pixels)
    return weights


def _windows(first: Tensor, last: Tensor, pixels: int) -> Tensor:
    """Weights (N, pixels) of the average over each of N windows of [0, 1]."""
    borders = torch.arange(pixels + 1, dtype=torch.float64) / pixels
    inside = torch.minimum(last[:, None], borders[1:]) - torch.maximum(first[:, None], borders[:-1])
    inside = inside.clamp(min=0)
    return inside / inside.sum(dim=1, keepdim=True)
