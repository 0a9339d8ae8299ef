"""Words of place for regional prompts: "a red circle on the left".

The model composes by its prompt more than by the tokens that may see it, so words and regions
should agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..images.region_shapes import RegionShape

# Fractions of the image between which a region's middle is in neither half.
_MIDDLE = (0.4, 0.6)


def place_of(shape: RegionShape) -> str:
    """The place of a region's middle in words, empty for one in the middle of the image."""
    if shape.is_background:
        return "in the background"
    across, down = shape.centre()
    column = "left" if across < _MIDDLE[0] else "right" if across > _MIDDLE[1] else ""
    row = "top" if down < _MIDDLE[0] else "bottom" if down > _MIDDLE[1] else ""
    if row and column:
        return f"in the {row} {column}"
    if column:
        return f"on the {column}"
    return f"at the {row}" if row else ""


def with_place(prompt: str, shape: RegionShape) -> str:
    """A region's prompt with the place of its middle in the image, as words."""
    words = place_of(shape)
    return f"{prompt.strip().rstrip('.,')} {words}" if words else prompt


def with_regions(prompt: str, regions: Sequence[tuple[str, RegionShape]]) -> str:
    """The prompt of the whole image with those of the regions and their places."""
    parts = [prompt, *(with_place(*each) for each in regions)]
    return ", ".join(filter(None, (part.strip().rstrip(".,") for part in parts)))
