"""Tiles of a large image, denoised by themselves and fused at every step.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_type, counted, is_number, is_whole, there_are
from ..images.sizes import MAX_SIZE, MULTIPLE
from ..text.prompt_images import MAX_SIDE
from ..transformer.patches import PATCH, grid_size
from ..transformer.text_attention import TextStates
from ..vae.tiling import plan_tiles

# Successive multiples of it spread evenly over [0, 1).
_GOLDEN = (math.sqrt(5) - 1) / 2

MAX_BATCH = 64
# Tiles in one call where memory alone would allow more: beyond, a GPU gains nothing.
ENOUGH = 8

# Least room for a tile to move, as a share of it, to either side.
_ROOM = 1 / 8


@dataclass(frozen=True)
class TilePrompts:
    """Prompts of single tiles, in place of that of the whole image.

    see_picture: the text encoder reads the tile's part of the picture that is changed or made
        larger, as an image in front of the prompt.
    texts: of each tile, from the top left row by row; None takes the prompt of the whole image.
    max_side: a tile's picture is read at most at the area of a square of this side.

    Raises ValueError for values out of range, and for prompts that are those of the whole image.
    """

    see_picture: bool = True
    texts: Sequence[str] | None = None
    max_side: int = MAX_SIDE

    def __post_init__(self):
        texts = self.texts
        is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
        if texts is not None and not (is_list and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"The texts of tiles are {texts!r}; expected a list of texts.")
        check_type("see_picture of tiles", self.see_picture, bool, "True or False")
        if not self.see_picture and not texts:
            raise ValueError(
                "Prompts of tiles without texts and pictures are that of the whole image; expected "
                "see_picture=True or texts, one a tile."
            )
        if not (is_whole(self.max_side) and 32 <= self.max_side <= 2048):
            raise ValueError(
                f"max_side of tiles' pictures is {self.max_side!r}; expected 32 to 2048 pixels."
            )

    def texts_of(self, tiles: Sequence[Tile], prompts: Sequence[str]) -> list[list[str]]:
        """The texts of each tile, one for each of these prompts of images or one for all.

        Raises ValueError where there are more or fewer texts than tiles.
        """
        if self.texts is None:
            return [list(prompts)] * len(tiles)
        if len(self.texts) != len(tiles):
            rows = len({tile.rows for tile in tiles})
            raise ValueError(
                f"{there_are(len(self.texts), 'text')} for {counted(len(tiles), 'tile')} "
                f"({counted(rows, 'row')} of "
                f"{len(tiles) // rows}); expected one a tile, from the top left row by row."
            )
        return [[text] for text in self.texts]


@dataclass(frozen=True)
class TileSettings:
    """Tiles of a run.

    size: side in pixels of a tile, a multiple of 16; the checkpoint's own size is best.
    overlap: least share of a tile that it has in common with each neighbour, 0 to 0.5.
    moves: inner tiles lie elsewhere at each step.
    true_places: rotary positions are those in the whole image.
    batch: tiles in one call of the model, which takes the memory of so many; 0 is as many as fit,
        up to 8. Tiles that differ in more than their latents and control images (regions, masks of
        controls, style pictures, boosts, parts of references) are called one by one.
    cut_references: a tile sees its own part of references, as for an edit of the image; else all
        of them.
    prompts: of single tiles, None for that of the whole image; such tiles are called one by one.

    Raises ValueError for values out of range.
    """

    size: int = 1024
    overlap: float = 0.25
    moves: bool = True
    true_places: bool = False
    batch: int = 1
    cut_references: bool = False
    prompts: TilePrompts | None = None

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
        if not (is_whole(self.batch) and 0 <= self.batch <= MAX_BATCH):
            raise ValueError(
                f"The batch of tiles is {self.batch!r}; expected 1 to {MAX_BATCH} tiles in one "
                "call, or 0 for as many as fit in memory."
            )
        if self.prompts is not None:
            check_type("prompts of tiles", self.prompts, TilePrompts, "TilePrompts, or None")

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

    def distance(self, other: Tile) -> int:
        """Of the centres of two tiles, squared, in half tokens."""
        rows, columns = (
            sum(a) - sum(b) for a, b in ((self.rows, other.rows), (self.columns, other.columns))
        )
        return rows**2 + columns**2

    def cut(self, latents: Tensor) -> Tensor:
        """The tile of latents (..., h, w), a view; the last one may lack a padded row or column."""
        rows, columns = (slice(PATCH * a, PATCH * b) for a, b in (self.rows, self.columns))
        return latents[..., rows, columns]

    def cut_pixels(self, pixels: Tensor) -> Tensor:
        """The tile of an image's pixels (..., H, W), whose sides are whole tokens; a view."""
        rows, columns = (slice(MULTIPLE * a, MULTIPLE * b) for a, b in (self.rows, self.columns))
        return pixels[..., rows, columns]

    def cut_tokens(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tile of values (..., rows * columns) of the tokens of an image's grid."""
        whole = values.unflatten(-1, grid)
        return whole[..., slice(*self.rows), slice(*self.columns)].flatten(-2)

    def cut_other(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """The same part of latents (..., h, w) of another size, in whole tokens of theirs.

        grid: rows and columns of tokens of the image that the tile is of.
        """
        spans = []
        for (first, end), own, other in zip(
            (self.rows, self.columns), grid, grid_size(latents, PATCH), strict=True
        ):
            start = min(round(first * other / own), other - 1)
            spans.append(slice(PATCH * start, PATCH * max(start + 1, round(end * other / own))))
        return latents[..., spans[0], spans[1]]


@dataclass(frozen=True)
class TileTexts:
    """The positive texts of tiles that lie still, for those of each step.

    texts: of each tile, by the sigma at which a step begins.
    """

    tiles: Sequence[Tile]
    texts: Sequence[Callable[[float], TextStates]]

    @property
    def tokens(self) -> int:
        """Tokens of the longest text."""
        return max(text(1.0).states.shape[1] for text in self.texts)

    def of(self, tile: Tile | None) -> Callable[[float], TextStates]:
        """The text of the nearest tile; of the only one where the image is not in tiles."""
        if tile is None:
            return self.texts[0]
        distances = [tile.distance(still) for still in self.tiles]
        return self.texts[distances.index(min(distances))]


def tiles_at(
    grid: tuple[int, int], settings: TileSettings, sigma: float
) -> list[tuple[Tile, Tensor]]:
    """Tiles of an image at a step, and the weight of each token in them, (rows, columns).

    grid: rows and columns of the image's tokens. sigma: at which the step begins. Weights sum to 1
    at every token.
    """
    phase = math.modf(round(sigma, 5) * 1009 * _GOLDEN)[0]
    # Rows and columns move by different parts of their room.
    shifts = 2 * phase - 1, 2 * math.modf(phase + _GOLDEN)[0] - 1
    rows, columns = _both_spans(grid, settings, shifts)
    row_weights, column_weights = _weights(rows), _weights(columns)
    return [
        (Tile(row, column), row_weight[:, None] * column_weight)
        for row, row_weight in zip(rows, row_weights, strict=True)
        for column, column_weight in zip(columns, column_weights, strict=True)
    ]


def still_tiles(grid: tuple[int, int], settings: TileSettings) -> list[Tile]:
    """As many tiles of an image as at each step, where they lie before they move."""
    rows, columns = _both_spans(grid, settings, (0.0, 0.0))
    return [Tile(row, column) for row in rows for column in columns]


def fuse(
    latents: Tensor,
    tiles: list[tuple[Tile, Tensor]],
    velocity_of: Callable[[list[Tile], Tensor], Tensor],
    batch: int = 1,
) -> Tensor:
    """The velocity of latents (B, C, h, w) from the velocities of tiles, in float32.

    velocity_of: called with up to `batch` tiles of one size and their latents (N * B, C, h', w'),
        tile by tile.
    """
    total = torch.zeros_like(latents, dtype=torch.float32)
    for group in _groups(latents, tiles, batch):
        parts = torch.cat([tile.cut(latents) for tile, _ in group])
        velocities = velocity_of([tile for tile, _ in group], parts).float()
        for (tile, weights), velocity in zip(group, velocities.chunk(len(group)), strict=True):
            cells = weights.to(latents.device).repeat_interleave(PATCH, 0)
            cells = cells.repeat_interleave(PATCH, 1)
            cells = cells[: velocity.shape[-2], : velocity.shape[-1]]
            tile.cut(total).add_(velocity * cells)
    return total


def _groups(
    latents: Tensor, tiles: list[tuple[Tile, Tensor]], batch: int
) -> Iterator[list[tuple[Tile, Tensor]]]:
    """Up to `batch` tiles each whose latents are of one size: the last may lack a padded row."""
    by_size: dict[tuple[int, ...], list[tuple[Tile, Tensor]]] = {}
    for tile, weights in tiles:
        by_size.setdefault(tuple(tile.cut(latents).shape[-2:]), []).append((tile, weights))
    for group in by_size.values():
        for first in range(0, len(group), batch):
            yield group[first : first + batch]


def _both_spans(
    grid: tuple[int, int], settings: TileSettings, shifts: tuple[float, float]
) -> list[list[tuple[int, int]]]:
    """Spans of the tiles along rows and along columns, see `_spans`."""
    tile = settings.size // MULTIPLE
    overlap = round(settings.overlap * tile)
    room = round(_ROOM * tile) if settings.moves else 0
    return [
        _spans(length, tile, overlap, room, shift)
        for length, shift in zip(grid, shifts, strict=True)
    ]


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
