"""Attention of image tokens to a part of the image, at high noise, for images beyond 2K.

At high noise a step decides the layout, for which neighbours and a coarse view of the rest are
enough, and attention among all image tokens is over half of a step's operations at 4096 px. The
image is divided into square blocks of tokens. Queries of a block see the blocks around it, every
`stride`-th row and column of the image, and all other tokens, such as text. Each key counts once.
Tokens of text and of references see everything.

It is not exact, and changes what a model was trained with; a run that ends in exact steps repairs
details. As in neighbourhood attention with dilated keys beside (DiNAT, arXiv:2209.15001), but the
same window for a block's queries, so that each block is one dense call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number, is_whole

# Rows of some image queries, and the image tokens that these see, by their numbers in the image.
ImageGroup = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SparseAttention:
    """Settings of sparse attention.

    above: sigma above which a step is sparse, others are exact; 0 for all, 1 for none.
    block: side of a block in tokens of 16 pixels, 2 to 64.
    reach: blocks around its own that a query sees, to each side, 0 to 8.
    stride: distance of the rows and columns that are seen from everywhere, 1 (all of them) to 64.

    Raises ValueError for values out of range.
    """

    above: float = 0.6
    block: int = 16
    reach: int = 1
    stride: int = 4

    def __post_init__(self):
        if not (is_number(self.above) and 0 <= self.above <= 1):
            raise ValueError(
                f"above of sparse attention is {self.above!r}; expected a sigma from 0 (all steps "
                "are sparse) to 1 (none)."
            )
        for name, low, high in (("block", 2, 64), ("reach", 0, 8), ("stride", 1, 64)):
            value = getattr(self, name)
            if not (is_whole(value) and low <= value <= high):
                raise ValueError(
                    f"{name} of sparse attention is {value!r}; expected a whole number from "
                    f"{low} to {high}."
                )

    def acts_at(self, sigma: float) -> bool:
        """True in a step that begins at a sigma."""
        return sigma > self.above

    def at(
        self, grid: tuple[int, int], sigma: float, device: torch.device
    ) -> tuple[ImageGroup, ...] | None:
        """The blocks of an image at a step, None where its tokens see all of it.

        grid: rows and columns of the image's tokens.
        """
        return _groups(self, grid, torch.device(device)) if self.acts_at(sigma) else None

    def pairs(self, grid: tuple[int, int]) -> int:
        """Pairs of image tokens of which one sees the other, in a sparse step."""
        groups = _groups(self, grid, torch.device("cpu"))
        if groups is None:
            return (grid[0] * grid[1]) ** 2
        return sum(len(rows) * len(keys) for rows, keys in groups)


@functools.lru_cache(maxsize=4)
def _groups(
    settings: SparseAttention, grid: tuple[int, int], device: torch.device
) -> tuple[ImageGroup, ...] | None:
    rows, columns = grid
    block, around = settings.block, settings.reach * settings.block
    with torch.inference_mode(False):
        numbers = torch.arange(rows * columns).view(rows, columns)
        coarse = torch.zeros(rows, columns, dtype=torch.bool)
        # From the middle of the first stretch on, so that both edges are as near.
        lines = [slice(min(settings.stride // 2, side - 1), None, settings.stride) for side in grid]
        coarse[lines[0], lines[1]] = True
        groups, sees_all = [], True
        for top in range(0, rows, block):
            for left in range(0, columns, block):
                seen = coarse.clone()
                seen[
                    max(0, top - around) : top + block + around,
                    max(0, left - around) : left + block + around,
                ] = True
                own = numbers[top : top + block, left : left + block].flatten()
                sees_all = sees_all and bool(seen.all())
                groups.append((own.to(device), numbers[seen].to(device)))
    return None if sees_all else tuple(groups)
