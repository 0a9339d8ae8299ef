"""An image in tiles, each of which is exact.

The networks' attention runs over the whole image at the size of the latents. On its one side are
only convolutions, which reach a few cells: a tile with that margin around it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

# Called with (tiles done, tiles in all).
Progress = Callable[[int, int], None]


def apply_in_tiles(
    source: Tensor,
    result: Tensor,
    apply: Callable[[Tensor], Tensor],
    tile: int,
    margin: int,
    progress: Callable[[], None],
    cell: int = 1,
) -> None:
    """Write `apply(source)` (1, C, h, w) into `result` a tile at a time, without seams.

    cell: values of `source` along a side of a latent cell. tile: cells along a side that one call
    gives; it sees `margin` more on each side, as far as `apply` reaches. result: so many values a
    cell as it likes, on any device.
    progress: called after each tile.
    """
    height, width = (side // cell for side in source.shape[2:])
    scale = result.shape[2] // height
    for rows in plan_tiles(height, tile, 0):
        for columns in plan_tiles(width, tile, 0):
            top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
            seen = (top, rows[1] + margin), (left, columns[1] + margin)
            part = source[..., _slice(seen[0], cell), _slice(seen[1], cell)]
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


def _slice(span: tuple[int, int], scale: int, origin: int = 0) -> slice:
    return slice((span[0] - origin) * scale, (span[1] - origin) * scale)
