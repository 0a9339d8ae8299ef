"""Image sizes: what the model takes, and sizes from an aspect ratio and an area."""

from __future__ import annotations

import logging
import math

logger = logging.getLogger(__name__)

# One token covers a square of this many pixels.
MULTIPLE = 16
MAX_SIZE = 16384

ASPECTS = ("1:1", "5:4", "4:3", "3:2", "16:9", "21:9", "4:5", "3:4", "2:3", "9:16", "9:21")


def check_size(name: str, pixels: int) -> None:
    """Raise ValueError for anything but a whole number of pixels from 1 to 16384."""
    if isinstance(pixels, bool) or not isinstance(pixels, int) or not 1 <= pixels <= MAX_SIZE:
        raise ValueError(
            f"{name} is {pixels!r}; expected a whole number of pixels from 1 to {MAX_SIZE}. "
            "Raw is good to 1024, Turbo to 2048."
        )


def round_size(name: str, pixels: int) -> int:
    """A side in pixels, rounded up to a multiple of 16, with a warning where that changes it.

    Raises ValueError as `check_size` does.
    """
    check_size(name, pixels)
    rounded = -(-pixels // MULTIPLE) * MULTIPLE
    if rounded != pixels:
        logger.warning(
            "%s %d is not a multiple of %d: %d is used.", name, pixels, MULTIPLE, rounded
        )
    return rounded


def is_far(width: int, height: int, size: int) -> bool:
    """True if an image is far from the square of `size` that a checkpoint was trained at.

    The released model paints up to four times that area well. A small one (krea2-nano) has seen one
    area, and sides of up to 5 : 3.
    """
    area = width * height / size**2
    if size >= 512:
        return area > 4
    return not (0.75 <= area <= 1.25 and max(width, height) <= 5 / 3 * min(width, height))


def size_for_aspect(aspect: str, megapixels: float) -> tuple[int, int]:
    """Width and height, in multiples of 16, nearest to an aspect ratio and an area.

    aspect: "W:H"; megapixels: in units of 1024 x 1024 pixels, so 1 and "1:1" give 1024 x 1024.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; expected one of {', '.join(ASPECTS)}.")
    across, down = (int(part) for part in aspect.split(":"))
    return size_for_area(across, down, megapixels)


def size_for_area(across: float, down: float, megapixels: float) -> tuple[int, int]:
    """Width and height, in multiples of 16, nearest to the aspect across : down and an area."""
    unit = math.sqrt(_pixels(megapixels) / (across * down))
    sides = (max(1, round(side * unit / MULTIPLE)) * MULTIPLE for side in (across, down))
    width, height = sides
    if max(width, height) > MAX_SIZE:
        raise ValueError(
            f"{megapixels} megapixels at {across}:{down} are {width} x {height} pixels; expected "
            f"at most {MAX_SIZE} a side. Choose fewer megapixels."
        )
    return width, height


def limit_area(width: int, height: int, megapixels: float) -> tuple[int, int]:
    """Sides of a picture, in multiples of 16, at its own shape and of at most an area.

    It is never made larger, but for sides under 16 pixels.
    megapixels: as in `size_for_aspect`.
    """
    scale = min(1.0, math.sqrt(_pixels(megapixels) / (width * height)))
    across, down = (max(1, int(side * scale / MULTIPLE)) for side in (width, height))
    return across * MULTIPLE, down * MULTIPLE


def _pixels(megapixels: float) -> float:
    if not math.isfinite(megapixels) or megapixels <= 0:
        raise ValueError(f"megapixels is {megapixels!r}; expected a number above 0, such as 1.0.")
    return megapixels * 1024 * 1024


def image_tokens(width: int, height: int) -> int:
    """Tokens of an image whose sides are multiples of 16."""
    return (width // MULTIPLE) * (height // MULTIPLE)


def tiles_of(
    width: int, height: int, tile: int | None, overlap: int
) -> tuple[tuple[int, int], int]:
    """Width and height of the tiles of an image, and their number; one for tile None.

    overlap: pixels that neighbours share at least. Raises ValueError for a tile that is no multiple
    of 16, and an overlap of more than half of it.
    """
    if tile is None:
        return (width, height), 1
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < MULTIPLE or tile % MULTIPLE:
        raise ValueError(f"tile is {tile!r}; expected pixels, a multiple of {MULTIPLE} above 0.")
    if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap <= tile // 2:
        raise ValueError(
            f"overlap is {overlap!r}; expected a whole number of pixels from 0 to half of the "
            f"tile, {tile // 2}."
        )
    sides = min(width, tile), min(height, tile)
    counts = (
        1 + math.ceil((side - own) / (own - overlap)) if side > own else 1
        for side, own in zip((width, height), sides, strict=True)
    )
    return sides, math.prod(counts)
