"""Measurements of a picture file: its size, its hashes, and how plain it is.

Nothing here decides whether a picture is good: limits change more often than files, and the numbers
are kept in a table.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import open as open_image

# Bits of a perceptual hash a side, as Krea's report has them.
HASH_SIDE = 12
HASH_BITS = HASH_SIDE**2
# Shares of a colour hash: black, grey, and six hues each faint and bright, in so many bits.
COLOUR_SHARES = 14
COLOUR_BITS = 6

# Longer side in pixels of the copy that is measured. JPEG files are decoded at about this size,
# which takes a fraction of the time.
_SIDE = 256
# Luma, of 255, up to and from which pixels are black and white.
_BLACK, _WHITE = 8, 247
# Rows and columns of a border differ by no more than this from the outermost ones, in luma of 255.
_BORDER_TOLERANCE = 6


@dataclass(frozen=True)
class File:
    """A file as it was found: enough to know whether it has changed."""

    size: int
    modified_ns: int


@dataclass(frozen=True)
class Measures:
    """The numbers of a picture.

    size, modified_ns: of the file; md5: of its bytes, in hexadecimal; "" where
        it could not be opened.
    error: why it cannot be read, and then nothing below is known; "" where it can.
    width, height: in pixels, upright.
    phash: `HASH_BITS` bits of the perceptual hash, packed. colours: `COLOUR_SHARES` numbers of
        0 to 2**COLOUR_BITS - 1, of `imagehash.colorhash`.
    entropy: of the histogram of luma, in bits, 0 to 8.
    black, white: shares of the pixels, 0 to 1. border: share of the area in bars of one colour at
        two opposite edges.
    """

    size: int
    modified_ns: int
    md5: str
    error: str = ""
    width: int = 0
    height: int = 0
    phash: bytes = b""
    colours: bytes = b""
    entropy: float = 0.0
    black: float = 0.0
    white: float = 0.0
    border: float = 0.0

    @property
    def file(self) -> File:
        return File(self.size, self.modified_ns)


def file_of(path: Path) -> File:
    stat = path.stat()
    return File(stat.st_size, stat.st_mtime_ns)


def measure(path: Path) -> Measures:
    """Read a picture and measure it. What is wrong with it is in `Measures.error`."""
    file = file_of(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        return Measures(file.size, file.modified_ns, "", error=_line(error))
    # Not for security: equal files are looked for.
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    try:
        with warnings.catch_warnings():
            # Damaged EXIF and large pictures: whether they can be read is what counts.
            warnings.simplefilter("ignore")
            size, copy = _small_copy(io.BytesIO(content))
    except Exception as error:  # decoders of damaged files raise whatever comes
        return Measures(file.size, file.modified_ns, md5, error=_line(error))
    grey = copy.convert("L")
    luma = np.asarray(grey)
    return Measures(
        file.size,
        file.modified_ns,
        md5,
        width=size[0],
        height=size[1],
        phash=np.packbits(imagehash.phash(copy, hash_size=HASH_SIDE).hash).tobytes(),
        colours=_colours(copy),
        entropy=grey.entropy(),
        black=float((luma <= _BLACK).mean()),
        white=float((luma >= _WHITE).mean()),
        border=border_share(luma),
    )


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow names an object in memory
        return "no picture of a known format"
    return " ".join(str(error).split()) or type(error).__name__


def thumbnail(path: Path, side: int) -> bytes | None:
    """A picture as JPEG of at most `side` pixels a side; None where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, copy = _small_copy(path)
    except Exception:  # as in `measure`
        return None
    copy.thumbnail((side, side))
    written = io.BytesIO()
    copy.save(written, "JPEG", quality=80)
    return written.getvalue()


def _small_copy(source: Path | io.BytesIO) -> tuple[tuple[int, int], Image.Image]:
    """Width and height of a picture, upright, and a small copy in RGB; white where transparent."""
    with open_image(source) as image:
        width, height = image.size
        # At least twice the size of the copy, so that resizing averages as it does of other files.
        image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
        image.load()
        upright = ImageOps.exif_transpose(image)
        is_turned = image.getexif().get(0x0112, 1) >= 5
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    copy = upright.convert("RGB")
    copy.thumbnail((_SIDE, _SIDE))
    return (height, width) if is_turned else (width, height), copy


def _colours(image: Image.Image) -> bytes:
    bits = imagehash.colorhash(image, binbits=COLOUR_BITS).hash.reshape(COLOUR_SHARES, COLOUR_BITS)
    return bytes(int(value) for value in bits @ (1 << np.arange(COLOUR_BITS)[::-1]))


def border_share(luma: np.ndarray) -> float:
    """Share of the area in bars of one colour, at two opposite edges each: (H, W) in 0 to 255."""
    rows, columns = _inside(luma), _inside(luma.T)
    return 1 - rows * columns / luma.size


def _inside(luma: np.ndarray) -> int:
    """Number of rows between bars at the top and at the bottom, which have the same colour.

    All rows where one of the bars is missing, or the whole picture is of one colour.
    """
    colour = int(luma[0, 0])
    furthest = np.abs(luma.astype(np.int16) - colour).max(axis=1)
    is_bar = furthest <= _BORDER_TOLERANCE
    if is_bar.all() or not (is_bar[0] and is_bar[-1]):
        return len(luma)
    return len(luma) - int(np.argmin(is_bar)) - int(np.argmin(is_bar[::-1]))
