"""An image in tiles: encoded in overlapping ones that are blended, decoded in exact ones.

The decoder's attention runs over the whole image at the size of the latents. Behind it are only
convolutions, which reach a few cells: a tile with that margin around it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Called with (tiles done, tiles in all).
Progress = Callable[[int, int], None]


def convert_tiled(
    source: Tensor,
    result: Tensor,
    convert: Callable[[Tensor], Tensor],
    cell: int,
    tile: int,
    overlap: int,
    progress: Progress | None,
) -> Tensor:
    """Convert `source` (images or latents) a tile at a time into `result`, which is zeros.

    cell: pixels along a latent cell. tile, overlap: in pixels, multiples of it.
    """
    if tile % cell or overlap % cell or not 0 <= overlap < tile:
        raise ValueError(
            f"tile {tile} and overlap {overlap} (pixels) must be multiples of {cell}, "
            "with 0 <= overlap < tile"
        )
    # Spans are in latent cells, so that a tile is the same region in source and result.
    height, width = min(source.shape[2:], result.shape[2:])
    source_cell, result_cell = source.shape[2] // height, result.shape[2] // height
    row_spans = plan_tiles(height, tile // cell, overlap // cell)
    column_spans = plan_tiles(width, tile // cell, overlap // cell)
    row_weights = feather_weights(row_spans, result_cell)
    column_weights = feather_weights(column_spans, result_cell)
    done = 0
    for rows, row_weight in zip(row_spans, row_weights, strict=True):
        for columns, column_weight in zip(column_spans, column_weights, strict=True):
            part = source[..., _slice(rows, source_cell), _slice(columns, source_cell)]
            weight = (row_weight[:, None] * column_weight).to(result.device)
            place = result[..., _slice(rows, result_cell), _slice(columns, result_cell)]
            place += convert(part) * weight
            done += 1
            if progress is not None:
                progress(done, len(row_spans) * len(column_spans))
    return result


def apply_in_tiles(
    source: Tensor,
    result: Tensor,
    apply: Callable[[Tensor], Tensor],
    tile: int,
    margin: int,
    progress: Callable[[], None],
) -> None:
    """Write `apply(source)` (1, C, h, w) into `result` a tile at a time, without seams.

    tile: cells of `source` along a side that one call gives; it sees `margin` more on each side,
    as far as `apply` reaches. result: a whole multiple of the source's sides, on any device.
    progress: called after each tile.
    """
    height, width = source.shape[2:]
    scale = result.shape[2] // height
    for rows in plan_tiles(height, tile, 0):
        for columns in plan_tiles(width, tile, 0):
            top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
            part = source[..., top : rows[1] + margin, left : columns[1] + margin]
            own = (..., _slice(rows, scale, top), _slice(columns, scale, left))
            place = result[..., _slice(rows, scale), _slice(columns, scale)]
            place.copy_(apply(part)[own])
            progress()


def plan_tiles(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles along one axis, all as long as `tile`, spread evenly.

    Neighbours share at least `overlap`. One span of `size` where a tile covers it.
    """
    if tile >= size:
        return [(0, size)]
    steps = math.ceil((size - tile) / (tile - overlap))
    starts = [step * (size - tile) // steps for step in range(steps + 1)]
    return [(start, start + tile) for start in starts]


def feather_weights(spans: list[tuple[int, int]], scale: int = 1) -> list[Tensor]:
    """A float32 weight for each position of each span: linear ramps where spans overlap.

    Each unit of a span has `scale` positions. The weights at a position sum to 1 over the spans.
    Nothing fades at the ends of the axis.
    """
    total = torch.zeros(spans[-1][1] * scale)
    weights = []
    for index, span in enumerate(spans):
        length = (span[1] - span[0]) * scale
        position = torch.arange(length) + 0.5
        weight = torch.ones(length)
        if index > 0 and (shared := spans[index - 1][1] - span[0]):
            weight = weight.minimum(position / (shared * scale))
        if index < len(spans) - 1 and (shared := span[1] - spans[index + 1][0]):
            weight = weight.minimum(position.flip(0) / (shared * scale))
        total[_slice(span, scale)] += weight
        weights.append(weight)
    return [
        weight / total[_slice(span, scale)] for weight, span in zip(weights, spans, strict=True)
    ]


def _slice(span: tuple[int, int], scale: int, origin: int = 0) -> slice:
    return slice((span[0] - origin) * scale, (span[1] - origin) * scale)
