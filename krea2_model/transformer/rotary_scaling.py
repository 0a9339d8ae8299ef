"""Rotary positions of images larger than those of training.

Beyond the sides that a model has seen, its lowest frequencies turn further than they ever did, and
subjects come twice. All methods stretch low frequencies and leave high ones, which tell neighbours
apart:

- "ntk" raises the base of the frequencies (NTK-aware scaling, bloc97, 2023);
- "yarn" stretches those whose wavelength exceeds the trained side, leaves those that are far
  shorter, and mixes in between (Peng et al., arXiv 2309.00071), without its temperature, which
  would act on text too.

`dynamic` lets the stretch follow the step: strong at high noise, where the layout is decided, and
gone at the end, where detail is (DyPE, Issachar et al., arXiv 2510.20766).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number, is_whole

METHODS = ("ntk", "yarn")

# Turns of a frequency over the trained side below which YaRN stretches it, and above which it
# leaves it.
_LOW_TURNS, _HIGH_TURNS = 1.0, 32.0


@dataclass(frozen=True)
class RotaryScaling:
    """Scaling of rotary positions.

    size: side in pixels up to which nothing changes, such as 1024.
    method: one of `METHODS`.
    dynamic: stretch by `scale ** (strength * sigma ** 2)` in place of `scale ** strength`.
    strength: above 0 to 4; DyPE's authors take 2.

    Raises ValueError for values out of range.
    """

    size: int
    method: str = "yarn"
    dynamic: bool = True
    strength: float = 2.0

    def __post_init__(self):
        if not (is_whole(self.size) and 64 <= self.size <= 16384):
            raise ValueError(f"size is {self.size!r}; expected pixels from 64 to 16384.")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}.")
        if not (is_number(self.strength) and 0 < self.strength <= 4):
            raise ValueError(f"strength is {self.strength!r}; expected above 0 to 4.")

    def at(self, grid: tuple[int, int], sigma: float) -> Stretch | None:
        """The scaling for an image of so many rows and columns of tokens; None for no change."""
        stretches = tuple(self.stretch(side, sigma) for side in grid)
        return None if stretches == (1.0, 1.0) else Stretch(self, *stretches)

    def stretch(self, tokens: int, sigma: float) -> float:
        """The stretch along a side of so many tokens at a sigma; 1 changes nothing."""
        scale = max(1.0, tokens / (self.size / 16))
        exponent = self.strength * sigma**2 if self.dynamic else self.strength
        return scale**exponent

    def frequencies(self, dim: int, theta: float, stretch: float) -> Tensor:
        """Frequencies (dim / 2,) of an axis in radians a token, in float64, highest first."""
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        if self.method == "ntk":
            # The lowest frequency is stretched in full, the highest not at all.
            return (theta * stretch ** (dim / max(1, dim - 2))) ** -exponents
        plain = theta**-exponents
        turns = self.size / 16 * plain / (2 * math.pi)
        kept = ((turns - _LOW_TURNS) / (_HIGH_TURNS - _LOW_TURNS)).clamp(0, 1)
        return plain * (kept + (1 - kept) / stretch)


@dataclass(frozen=True)
class Stretch:
    """A scaling at one step of an image: its stretch along rows and along columns."""

    scaling: RotaryScaling
    rows: float
    columns: float

    def frequencies(self, dims: Sequence[int], theta: float) -> list[Tensor | None]:
        """Frequencies of the three axes: index, row, column; None for unchanged ones."""
        _, *spatial = dims
        return [
            None,
            *(
                self.scaling.frequencies(dim, theta, stretch)
                for dim, stretch in zip(spatial, (self.rows, self.columns), strict=True)
            ),
        ]
