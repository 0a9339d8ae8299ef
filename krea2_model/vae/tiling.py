"""Encode and decode an image in overlapping tiles, whose results are blended linearly."""

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

    `result` may be on another device than `source`.

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
            converted = convert(part)
            converted *= (row_weight[:, None] * column_weight).to(converted.device)
            place = result[..., _slice(rows, result_cell), _slice(columns, result_cell)]
            place += converted.to(place.device)
            done += 1
            if progress is not None:
                progress(done, len(row_spans) * len(column_spans))
    return result


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


def _slice(span: tuple[int, int], scale: int) -> slice:
    return slice(span[0] * scale, span[1] * scale)
