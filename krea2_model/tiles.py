"""Tiles of a large image, denoised one at a time and fused at every step.

The model sees tiles of the size that it was made for, and their velocities are averaged where they
overlap (MultiDiffusion, Bar-Tal et al., arXiv 2302.08113). Weights fade by a raised cosine, and
inner tiles move from step to step, so no place is always an edge. Memory is that of a tile,
whatever the size of the image.

Rotary positions count from a tile's own corner. At its true place in the image they would exceed
those of training: attention among image tokens depends on their distances alone, but text is at
position 0, and krea2-nano then draws lines along the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import is_number, is_whole
from .images.sizes import MAX_SIZE, MULTIPLE
from .transformer.patches import PATCH, grid_size
from .vae.tiling import plan_tiles

# Successive multiples of it spread evenly over [0, 1).
_GOLDEN = (math.sqrt(5) - 1) / 2

# Least room for a tile to move, as a share of it, to either side.
_ROOM = 1 / 8


@dataclass(frozen=True)
class TileSettings:
    """Tiles of a run.

    size: side in pixels of a tile, a multiple of 16; the checkpoint's own size is best.
    overlap: least share of a tile that it has in common with each neighbour, 0 to 0.5.
    moves: inner tiles lie elsewhere at each step.
    true_places: rotary positions are those in the whole image.

    Raises ValueError for values out of range.
    """

    size: int = 1024
    overlap: float = 0.25
    moves: bool = True
    true_places: bool = False

    def __post_init__(self):
        size = self.size
        if not (is_whole(size) and 4 * MULTIPLE <= size <= MAX_SIZE and size % MULTIPLE == 0):
            raise ValueError(
                f"A tile's size is {size!r}; expected a multiple of {MULTIPLE} pixels from "
                f"{4 * MULTIPLE} to {MAX_SIZE}, such as 1024."
            )
        if not (is_number(self.overlap) and 0 <= self.overlap <= 0.5):
            raise ValueError(
                f"The overlap of tiles is {self.overlap!r}; expected a share of the tile from 0 to "
                "0.5."
            )

    def tokens(self, latents: Tensor) -> int:
        """Tokens of the largest tile of latents (..., h, w)."""
        return math.prod(min(self.size // MULTIPLE, side) for side in grid_size(latents, PATCH))


@dataclass(frozen=True)
class Tile:
    """A tile of an image's tokens: first and end of its rows and of its columns."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def cut(self, latents: Tensor) -> Tensor:
        """The tile of latents (..., h, w), a view; the last one may lack a padded row or column."""
        rows, columns = (slice(PATCH * a, PATCH * b) for a, b in (self.rows, self.columns))
        return latents[..., rows, columns]

    def cut_tokens(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tile of values (..., rows * columns) of the tokens of an image's grid."""
        whole = values.unflatten(-1, grid)
        return whole[..., slice(*self.rows), slice(*self.columns)].flatten(-2)


def tiles_at(
    grid: tuple[int, int], settings: TileSettings, sigma: float
) -> list[tuple[Tile, Tensor]]:
    """Tiles of an image at a step, and the weight of each token in them, (rows, columns).

    grid: rows and columns of the image's tokens. sigma: at which the step begins. Weights sum to 1
    at every token.
    """
    tile = settings.size // MULTIPLE
    phase = math.modf(round(sigma, 5) * 1009 * _GOLDEN)[0]
    # Rows and columns move by different parts of their room.
    shifts = 2 * phase - 1, 2 * math.modf(phase + _GOLDEN)[0] - 1
    overlap = round(settings.overlap * tile)
    room = round(_ROOM * tile) if settings.moves else 0
    rows, columns = (
        _spans(length, tile, overlap, room, shift)
        for length, shift in zip(grid, shifts, strict=True)
    )
    row_weights, column_weights = _weights(rows), _weights(columns)
    return [
        (Tile(row, column), row_weight[:, None] * column_weight)
        for row, row_weight in zip(rows, row_weights, strict=True)
        for column, column_weight in zip(columns, column_weights, strict=True)
    ]


def fuse(
    latents: Tensor, tiles: list[tuple[Tile, Tensor]], velocity_of: Callable[[Tile, Tensor], Tensor]
) -> Tensor:
    """The velocity of latents (..., h, w) from the velocities of tiles, in float32."""
    total = torch.zeros_like(latents, dtype=torch.float32)
    for tile, weights in tiles:
        part = tile.cut(latents)
        cells = weights.to(latents.device).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        cells = cells[: part.shape[-2], : part.shape[-1]]
        tile.cut(total).add_(velocity_of(tile, part).float() * cells)
    return total


def _spans(length: int, tile: int, overlap: int, room: int, shift: float) -> list[tuple[int, int]]:
    """(first, end) of the tiles along an axis, inner ones moved by `shift` of at least `room`."""
    spans = plan_tiles(length, tile, overlap + room)
    if len(spans) < 3 or room == 0:
        return spans
    widest = max(after[0] - before[0] for before, after in zip(spans, spans[1:], strict=False))
    move = round(shift * (tile - overlap - widest))
    inner = [(first + move, end + move) for first, end in spans[1:-1]]
    return [spans[0], *inner, spans[-1]]


def _weights(spans: list[tuple[int, int]]) -> list[Tensor]:
    """Weights of tokens in each span: a raised cosine over what it shares with its neighbours."""
    total = torch.zeros(spans[-1][1])
    weights = []
    for index, (first, end) in enumerate(spans):
        position = torch.arange(end - first) + 0.5
        weight = torch.ones(end - first)
        if index > 0 and (shared := spans[index - 1][1] - first) > 0:
            weight = weight * _fade(position / shared)
        if index < len(spans) - 1 and (shared := end - spans[index + 1][0]) > 0:
            weight = weight * _fade(position.flip(0) / shared)
        total[first:end] += weight
        weights.append(weight)
    return [w / total[first:end] for w, (first, end) in zip(weights, spans, strict=True)]


def _fade(share: Tensor) -> Tensor:
    return torch.sin(share.clamp(max=1) * (math.pi / 2)).square()
