"""Files that images are written to: checked before the work, replaced only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

_ENDINGS = ".png, .jpg or .webp"


def numbered(path: Path, count: int) -> list[Path]:
    """Names of several images: `fox.png`, `fox-2.png`, `fox-3.png`."""
    return [path, *(path.with_stem(f"{path.stem}-{n}") for n in range(2, count + 1))]


def image_format(path: Path) -> str:
    """Pillow's name of the format that a file's ending says.

    Raises ValueError for an ending that is none, or of a format that takes no colours.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        if kind is None:
            raise KeyError
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError):
        ending = f"the ending {path.suffix}" if path.suffix else "no ending"
        raise ValueError(
            f"The output {path} has {ending}, in which no image can be written; expected "
            f"{_ENDINGS}."
        ) from None
    return kind


def check_outputs(paths: Sequence[Path]) -> None:
    """Refuse what images could not be written to; nothing is left behind.

    Raises ValueError for an ending of no format, a folder and what is no file, and for a place
    that does not take files.
    """
    for path in paths:
        image_format(path)
        if len(os.fsencode(path.name)) > 255:
            raise ValueError(
                f"The name of the output has {len(os.fsencode(path.name))} bytes; expected at most "
                "255. Choose a shorter --output."
            )
        if path.is_dir():
            raise ValueError(
                f"The output {path} is a folder; expected the name of a file, such as "
                f"{path / 'fox.png'}."
            )
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise ValueError(
                f"The output {path} cannot be written over; expected a new name, or a file that "
                "you may change. Choose another --output."
            )
    for folder in {path.parent for path in paths}:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent  # the others are made when there is an image
        try:
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"Nothing can be written to {folder} ({error.strerror}); expected a folder that "
                "takes files. Choose another --output."
            ) from error


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image; an existing file is replaced once the new one is complete.

    A full disk or a cancel leaves the old file as it was.
    """
    path = Path(os.path.realpath(path))  # what a link points to is written, and the link stays
    beside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # With the rights that a new file has here, which a temporary one would not.
        with beside.open("xb") as file:
            image.save(file, image_format(path))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
