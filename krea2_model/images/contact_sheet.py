"""Many pictures on one sheet, each with its caption underneath."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..checks import counted, there_are

_PAPER, _INK = "white", "black"

# Characters of a caption that are written; a longer one ends in dots. Captions of 200 words have
# 1,200.
MAX_CAPTION = 2000


def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str] = (),
    *,
    columns: int = 0,
    cell: int = 512,
    text_size: int = 16,
) -> np.ndarray:
    """One picture (H, W, 3) in [0, 1] of many (h, w, 3), row by row.

    captions: one per picture, wrapped to the cell; missing ones are empty. Cells are as wide as the
        widest character. Of a long one `MAX_CAPTION` characters are written.
    columns: 0 makes the sheet about square. cell: the longest side of a picture there, in pixels;
        smaller ones are not enlarged.
    Raises ValueError without pictures, for more captions than pictures, and for bad sizes.
    """
    if not len(images):
        raise ValueError("There is no picture to put on the sheet; expected at least one.")
    if len(captions) > len(images):
        raise ValueError(
            f"{there_are(len(captions), 'caption')} for {counted(len(images), 'picture')}; "
            "expected at most one per picture, each on a line of its own."
        )
    if columns < 0 or cell < 16 or text_size < 4:
        raise ValueError(
            f"columns is {columns}, cell {cell} and text_size {text_size}; expected at least 0, 16 "
            "and 4."
        )
    pictures = [_picture(image, cell) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    font = ImageFont.load_default(text_size)
    captions = [_cut(caption) for caption in captions]
    width = max(
        *(picture.width for picture in pictures),
        *(math.ceil(font.getlength(character)) for character in {" ", *"".join(captions)}),
    )
    lines = [wrapped(caption, width, font) for caption in captions]
    lines += [[] for _ in range(len(pictures) - len(lines))]
    gap, line_height = max(4, cell // 64), math.ceil(text_size * 1.25)

    rows = [
        range(first, min(first + columns, len(pictures)))
        for first in range(0, len(pictures), columns)
    ]
    tops, top = [], gap
    for row in rows:
        tops.append(top)
        captioned = max(len(lines[index]) for index in row)
        top += max(pictures[index].height for index in row) + line_height * captioned + gap
    sheet = Image.new("RGB", (gap + columns * (width + gap), top), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops, strict=True):
        below = top + max(pictures[index].height for index in row)
        for column, index in enumerate(row):
            left = gap + column * (width + gap)
            picture = pictures[index]
            sheet.paste(picture, (left + (width - picture.width) // 2, below - picture.height))
            for number, line in enumerate(lines[index]):
                draw.text((left, below + number * line_height), line, _INK, font)
    return np.asarray(sheet, dtype=np.float32) / 255


def _picture(image: np.ndarray, cell: int) -> Image.Image:
    pixels = (np.clip(image[..., :3], 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _cut(caption: str) -> str:
    return caption if len(caption) <= MAX_CAPTION else caption[: MAX_CAPTION - 3] + "..."


def wrapped(caption: str, width: int, font) -> list[str]:
    """Lines that fit a width; a word that does not fit alone is broken."""
    lines, line = [], ""
    for word in caption.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        *full, line = _broken(word, width, font)
        lines += full
    return [*lines, line] if line else lines


def _broken(word: str, width: int, font) -> Iterator[str]:
    """A word in pieces that fit a width, of a character at least."""
    while word:
        # Doubled and then halved, so that no more is measured than about twice what fits.
        most = 2
        while most < len(word) and font.getlength(word[:most]) <= width:
            most *= 2
        lengths = range(2, min(most, len(word)) + 1)
        fits = 1 + bisect_right(lengths, width, key=lambda length: font.getlength(word[:length]))
        yield word[:fits]
        word = word[fits:]
