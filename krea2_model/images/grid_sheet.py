"""Pictures of a grid on one sheet: columns and rows with labels, in blocks one below the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from .contact_sheet import wrapped

_PAPER, _INK = "white", "black"
# The longest side of a sheet, which every format takes, and the largest of its pictures.
MAX_SHEET, MAX_CELL = 16_000, 512
# Pictures beside or below each other.
MAX_COUNT = 500
# Characters of a label that are written; a longer one ends in dots.
MAX_LABEL = 160
# Pixels of a column beside which longer words are broken, where pictures are narrower.
_LABEL_WIDTH = 120
# Lines of a label above a column.
_MAX_LINES = 8

Place = tuple[int, int, int]


def check_counts(columns: int, rows: int, blocks: int = 1) -> None:
    """Refuse a sheet whose pictures would be too small to see."""
    for count, kind in ((columns, "beside"), (rows * blocks, "below")):
        if count > MAX_COUNT:
            raise ValueError(
                f"A sheet would have {count} pictures {kind} each other; expected at most "
                f"{MAX_COUNT}. Take fewer values, or put them on another axis."
            )


def cell_side(columns: int, rows: int, blocks: int = 1) -> int:
    """The longest side of a picture with which a sheet stays within about `MAX_SHEET` pixels."""
    return max(16, min(MAX_CELL, MAX_SHEET // (max(columns, rows * blocks) + 1) - 32))


def small_copy(picture: Image.Image, columns: int, rows: int, blocks: int = 1) -> Image.Image:
    """A picture as it is shown on a sheet: in RGB, and no larger than its cell."""
    side = cell_side(columns, rows, blocks)
    small = picture.convert("RGB")  # a copy, also of what is RGB
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def grid_sheet(
    pictures: Mapping[Place, Image.Image],
    columns: Sequence[str],
    rows: Sequence[str] = ("",),
    blocks: Sequence[str] = ("",),
    *,
    text_size: int = 16,
) -> Image.Image:
    """One picture of many, each at its column, row and block, counted from 0.

    pictures: as large as they are shown; places without one stay blank. Cells are of one size,
        that of the widest and the highest picture. columns, rows, blocks: the labels, above, at the
        left and above each block; where all of a kind are empty they take no room.
    Raises ValueError without pictures or columns, and for a place that is none of the sheet.
    """
    if not pictures:
        raise ValueError("There is no picture to put on the sheet; expected at least one.")
    sizes = (len(columns), len(rows), len(blocks))
    for place in pictures:
        if not all(0 <= index < size for index, size in zip(place, sizes, strict=True)):
            raise ValueError(
                f"A picture is at {place}; expected a column, a row and a block below {sizes}."
            )
    font = ImageFont.load_default(text_size)
    line_height, gap = math.ceil(text_size * 1.25), 8
    columns, rows, blocks = (
        [_cut(label) for label in labels] for labels in (columns, rows, blocks)
    )

    def width_of(labels: Sequence[str], most: int) -> int:
        return min(most, max(math.ceil(font.getlength(label)) for label in labels))

    height = max(picture.height for picture in pictures.values())
    width = max(picture.width for picture in pictures.values())
    room = max(width, MAX_SHEET // len(columns) - gap)
    width = max(width, width_of(columns, min(_LABEL_WIDTH, room)))
    margin = width_of(rows, max(width // 2, _LABEL_WIDTH))
    left = gap + (margin + gap if margin else 0)
    total = left + len(columns) * (width + gap)
    fitting = max(1, height // line_height)
    above = [wrapped(label, width, font)[:_MAX_LINES] for label in columns]
    beside = [wrapped(label, margin, font)[:fitting] if margin else [] for label in rows]
    titles = [wrapped(label, total - 2 * gap, font) for label in blocks]

    header = line_height * max(map(len, above))
    heights = [max(height, line_height * len(lines)) for lines in beside]
    block_heights = [
        line_height * len(lines) + (gap if lines else 0) + header + sum(heights) + gap * len(rows)
        for lines in titles
    ]
    sheet = Image.new("RGB", (total, gap + sum(block_heights) + gap * (len(blocks) - 1)), _PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(lines: Sequence[str], x: int, y: int, room: int = 0) -> None:
        """Lines from the place on, each in the middle of the room in pixels, if any."""
        for number, line in enumerate(lines):
            shift = max(0, (room - math.ceil(font.getlength(line))) // 2)
            draw.text((x + shift, y + number * line_height), line, _INK, font)

    top = gap
    for block, lines in enumerate(titles):
        write(lines, gap, top)
        y = top + line_height * len(lines) + (gap if lines else 0)
        for column, label in enumerate(above):
            # Labels of fewer lines stand right above their pictures.
            lower = header - line_height * len(label)
            write(label, left + column * (width + gap), y + lower, width)
        y += header
        for row, label in enumerate(beside):
            write(label, gap, y + (heights[row] - line_height * len(label)) // 2)
            for column in range(len(columns)):
                if (picture := pictures.get((column, row, block))) is not None:
                    x = left + column * (width + gap)
                    sheet.paste(
                        picture,
                        (
                            x + (width - picture.width) // 2,
                            y + (heights[row] - picture.height) // 2,
                        ),
                    )
            y += heights[row] + gap
        top += block_heights[block] + gap
    sheet.thumbnail((MAX_SHEET, MAX_SHEET), Image.Resampling.LANCZOS)  # where labels are long
    return sheet


def _cut(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 3] + "..."
