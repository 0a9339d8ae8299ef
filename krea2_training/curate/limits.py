"""When a picture is no good for training: limits on what is measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.examples import MAX_ASPECT
from ..settings.checks import check, check_side
from .measures import HASH_BITS, Measures

# Reasons of pictures that go, in the order in which they are shown.
BROKEN, SMALL, ASPECT, FLAT, BLACK, WHITE, BORDER, EXACT, NEAR = (
    "broken", "small", "aspect", "flat", "black", "white", "border", "same file", "near duplicate",
)  # fmt: skip
REASONS = (BROKEN, SMALL, ASPECT, FLAT, BLACK, WHITE, BORDER, EXACT, NEAR)


@dataclass(frozen=True)
class Limits:
    """Limits of what is kept.

    resolution: sides of squares of the areas to train at, in pixels.
    enlarge: the most by which sides may be enlarged to a resolution. A picture that is too small
        for the lowest goes; one that is too small for another is not counted there.
    aspect: longer to shorter side.
    entropy: the least, of the histogram of luma, in bits.
    black, white, border: the largest shares, see `Measures`.
    distance: bits of the perceptual hash, of 144, by which near duplicates may differ.
    colour: the sum of the differences of their colour hashes' shares; recoloured ones differ more.
    """

    resolution: tuple[int, ...] = (1024,)
    enlarge: float = 1.25
    aspect: float = MAX_ASPECT
    entropy: float = 1.0
    black: float = 0.9
    white: float = 0.9
    border: float = 0.15
    distance: int = 20
    colour: float = 0.5

    def __post_init__(self):
        check(bool(self.resolution), "resolution", self.resolution, "at least one side in pixels")
        for side in self.resolution:
            check_side("resolution", side)
        for name, low, high in (
            ("enlarge", 1, 8), ("aspect", 1, 100), ("entropy", 0, 8), ("black", 0, 1),
            ("white", 0, 1), ("border", 0, 1), ("distance", 0, HASH_BITS // 2 - 1),
            ("colour", 0, 4),
        ):  # fmt: skip
            value = getattr(self, name)
            check(low <= value <= high, name, value, f"{low} to {high}")

    def reasons(self, measures: Measures) -> tuple[str, ...]:
        """Why a picture goes, for itself; empty where it may stay."""
        if measures.error:
            return (BROKEN,)
        width, height = measures.width, measures.height
        found = {
            SMALL: not self.is_large_enough(measures, min(self.resolution)),
            ASPECT: max(width, height) > self.aspect * min(width, height),
            FLAT: measures.entropy < self.entropy,
            BLACK: measures.black > self.black,
            WHITE: measures.white > self.white,
            BORDER: measures.border > self.border,
        }
        return tuple(reason for reason, is_so in found.items() if is_so)

    def is_large_enough(self, measures: Measures, side: int) -> bool:
        return math.sqrt(measures.width * measures.height) * self.enlarge >= side
