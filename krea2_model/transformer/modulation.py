"""Modulation by time: a vector that all blocks share, plus a table of each block.

Norm weights and tables are small and many: a host takes longer to hand them out at each step than a
GPU to apply them. `RunModulation` reads them once, for all blocks and steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.kernels import HeadNorm


class BlockModulation(nn.Module):
    """A block's table, added to the time vector that all blocks share."""

    def __init__(self, dim: int, layers, **factory):
        super().__init__()
        self.lin = layers.ModulationTable(6 * dim, **factory)

    def rows(self, vector: Tensor) -> Tensor:
        """Scale, shift and gate of attention, then of the MLP: (B, S, 6 D) to (B, S, 6, D).

        In float32.
        """
        return self.lin(vector).unflatten(-1, (6, -1))

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The six `rows`, (B, S, D) each, in the dtype of the vector."""
        return self.rows(vector).to(vector.dtype).unbind(-2)


class FinalModulation(nn.Module):
    """Scale and shift of the output norm: the time embedding plus a table of (2, D)."""

    def __init__(self, dim: int, layers, **factory):
        super().__init__()
        self.lin = layers.ModulationTable(2, dim, **factory)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.lin(time).chunk(2, dim=1)
        return scale, shift


class Modulation(NamedTuple):
    """Modulation of one block: its six rows (B, S, D), and the norm of queries and keys."""

    rows: tuple[Tensor, ...]
    norm: HeadNorm


class StepModulation(NamedTuple):
    """Modulation at one time: rows of all blocks (N, B, S, 6, D), norms of queries and keys."""

    rows: Tensor
    norms: list[HeadNorm]

    def by_block(self) -> list[Modulation]:
        pairs = zip(self.rows.unbind(0), self.norms, strict=True)
        return [Modulation(rows.unbind(-2), norm) for rows, norm in pairs]


def for_blocks(modulation: StepModulation | None, count: int) -> Sequence[Modulation | None]:
    """The modulation of each block at a step, or None each where blocks compute their own."""
    return [None] * count if modulation is None else modulation.by_block()


class RunModulation:
    """A copy of the blocks' tables, norm weights, and norms of queries and keys."""

    def __init__(self, blocks: Iterable[Any], device: torch.device):
        blocks = list(blocks)
        zero = torch.zeros((), device=device)
        self._tables = torch.stack([block.mod.lin(zero) for block in blocks])
        norms = [norm for block in blocks for norm in (block.prenorm, block.postnorm)]
        weights = [norm.scale.read(device, torch.clone) for norm in norms]
        self._norms = torch.stack(weights).unflatten(0, (-1, 2))
        self._head_norms = [block.attn.qknorm.multipliers(device) for block in blocks]

    def at(self, vector: Tensor, dtype: torch.dtype) -> StepModulation:
        """Modulation at the times of a vector (B, S, 6 D), its rows in `dtype`."""
        rows = vector.float() + self._tables[:, None, None]
        rows = rows.unflatten(-1, (6, -1))
        fold_norms(rows, self._norms[:, None, None])
        return StepModulation(rows.to(dtype), self._head_norms)


def fold_norms(rows: Tensor, weights: Tensor) -> None:
    """Put norm weights into the two scales of rows (..., 6, D), in place; weights (..., 2, D).

    A zero-centred norm weight w and a scale s multiply by (1 + w)(1 + s), so the scale of both is
    s + w (1 + s).
    """
    scales = rows[..., ::3, :]
    scales.addcmul_(weights, scales + 1)
