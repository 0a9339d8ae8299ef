"""The shapes of pictures that are painted for prompts: of a setting, or of a table's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..settings.checks import check, check_side
from .examples import MAX_ASPECT, bucket_size

# Columns of a row: pixels, or width to height.
WIDTH, HEIGHT, ASPECT = "width", "height", "aspect"
EXPECTED_ASPECT = (
    f"width to height, such as 3:4, from 1:{MAX_ASPECT:g} to {MAX_ASPECT:g}:1"  # for messages
)

# Width and height, as a ratio.
Ratio = tuple[float, float]
# Of the pictures that distillation paints where no setting says it: half of them are square.
_OTHERS = ((3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9))
ASPECTS = ((1, 1),) * len(_OTHERS) + _OTHERS


def parse_aspect(value: Any) -> Ratio | None:
    """The ratio of a text such as "3:4"; None for what is none, or too wide or tall."""
    try:
        width, height = map(float, str(value).split(":"))
    except ValueError:
        return None
    ok = height > 0 and 1 / MAX_ASPECT <= width / height <= MAX_ASPECT
    return (width, height) if ok else None


def check_shapes(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raise ValueError for rows whose pictures have no shape that can be painted, naming them."""
    for number, row in enumerate(rows, start=1):
        where = f"{path.name}, row {number}: "
        sides = {name: row[name] for name in (WIDTH, HEIGHT) if _is_set(row, name)}
        for name in (WIDTH, HEIGHT) if sides else ():
            value = sides.get(name)
            expected = f"pixels: a row has both {WIDTH} and {HEIGHT}, or neither"
            check(str(value).isdecimal(), where + name, value, expected)
            check_side(where + name, int(sides[name]))
        if _is_set(row, ASPECT):
            check(not sides, where + ASPECT, row[ASPECT], f"none beside {WIDTH} and {HEIGHT}")
            is_ratio = parse_aspect(row[ASPECT]) is not None
            check(is_ratio, where + ASPECT, row[ASPECT], EXPECTED_ASPECT)


def shape_of(row: Mapping[str, Any], side: int, otherwise: Ratio) -> tuple[int, int]:
    """Width and height in pixels of a row's picture, of the rows that `check_shapes` let through.

    side: of a square of the area of pictures without pixels of their own. otherwise: the ratio of
    rows that name no shape.
    """
    if _is_set(row, WIDTH):
        return int(row[WIDTH]), int(row[HEIGHT])
    own = parse_aspect(row[ASPECT]) if _is_set(row, ASPECT) else None
    return bucket_size(*(own or otherwise), side)


def _is_set(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) not in (None, "")
