"""Files that images are written to: checked before the work, replaced only when they are whole."""

from __future__ import annotations

import errno
import io
import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..replacing import replacing
from .picture_texts import save_options

_ENDINGS = ".png, .jpg or .webp"
_MOVING = (".webp", ".gif", ".png")


def to_picture(array: np.ndarray) -> Image.Image:
    """An image (H, W, 3) in [0, 1] in 8 bits."""
    return Image.fromarray((array * 255).round().astype(np.uint8))


def numbered(path: Path, count: int, overwrite: bool = True) -> list[Path]:
    """Names of several images: `fox.png`, `fox-2.png`, `fox-3.png`.

    overwrite: False leaves out names that are there already.
    """
    names = (path if n == 1 else path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))
    free = names if overwrite else (name for name in names if not os.path.lexists(name))
    return list(itertools.islice(free, count))


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
        image_format(path)
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


def check_animation(path: Path) -> None:
    """Refuse what a moving picture could not be written to, see `check_outputs`."""
    if path.suffix.lower() not in _MOVING:
        raise ValueError(f"The animation is {path}; expected a .webp, .gif or .png file.")
    check_outputs([path])


def save_animation(frames: Sequence[Path], path: Path, seconds: float) -> None:
    """Write pictures of one size as a moving one, which repeats. seconds: that each stays."""
    options: dict[str, Any] = {"duration": round(1000 * seconds), "loop": 0, "save_all": True}
    if path.suffix.lower() == ".webp":
        options |= {"quality": 90}
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        first, *others = (opened.enter_context(Image.open(file)) for file in frames)
        file = opened.enter_context(opened.enter_context(replacing(path)).open("xb"))
        first.save(file, image_format(path), append_images=others, **options)


def save_image(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> list[str]:
    """Write an image; an existing file is replaced once the new one is complete.

    texts: kept in the file by `picture_texts.save_options`. Returns the names of those that the
    format does not take.
    """
    kind = image_format(path)
    options, left_out = save_options(kind, texts or {})
    with replacing(path) as partial, partial.open("xb") as file:
        image.save(file, kind, **options)
    return left_out
