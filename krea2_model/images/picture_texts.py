"""Texts inside picture files, where ComfyUI and others look for them.

- PNG: text chunks by name. That is how ComfyUI keeps `prompt`, and how `parameters` is usual.
- JPEG and WebP: EXIF. A text of a name is `name:text` in a tag of the first directory, as ComfyUI
  writes WebP; `parameters` is the user comment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

PARAMETERS = "parameters"
# Tags of EXIF: Model and Make, the sub-directory of EXIF, and the user comment there.
_TAGS = {"prompt": 0x0110, "krea2": 0x010F}
_EXIF_FOLDER, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\0"

# A segment of a JPEG file holds this many bytes, less its length and the word Exif.
_MAX_JPEG = 65_533 - 6


def save_options(kind: str, texts: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Options of Pillow's `save` that keep texts by name; and the names that `kind` cannot keep.

    kind: Pillow's name of a format. JPEG takes 64 kB: the longest texts are left out.
    """
    if not texts:
        return {}, []
    if kind == "PNG":
        chunks = PngInfo()
        for name, text in texts.items():
            chunks.add_text(name, text)
        return {"pnginfo": chunks}, []
    if kind not in ("JPEG", "WEBP"):
        return {}, list(texts)
    held, left_out = dict(texts), list[str]()
    while held:
        exif = _exif_of(held).tobytes()
        if kind == "WEBP" or len(exif) <= _MAX_JPEG:
            return {"exif": exif}, left_out
        longest = max(held, key=lambda name: len(held[name]))
        left_out.append(longest)
        del held[longest]
    return {}, left_out


def read_texts(path: Path) -> dict[str, str]:
    """Texts of a picture by name: `prompt`, `parameters`, `krea2`, `workflow`; others of a PNG too.

    Raises ValueError for what is no picture, or cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.load()  # chunks may follow the pixels
                return {str(k): str(v) for k, v in image.info.items() if isinstance(v, str)}
            return _texts_of(image.getexif())
    except FileNotFoundError as error:
        raise ValueError(f"There is no picture {path}. Check the name and the folder.") from error
    except Exception as error:  # decoders of damaged files raise whatever comes
        if path.is_dir():
            raise ValueError(f"{path} is a folder; expected a picture in it.") from error
        raise ValueError(f"{path} cannot be read as a picture ({error}).") from error


def _exif_of(texts: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    for name, tag in _TAGS.items():
        if name in texts:
            exif[tag] = f"{name}:{texts[name]}"
    if PARAMETERS in texts:
        comment = _UNICODE + texts[PARAMETERS].encode("utf-16-be")
        exif.get_ifd(_EXIF_FOLDER)[_USER_COMMENT] = comment
    return exif


def _texts_of(exif: Image.Exif) -> dict[str, str]:
    texts = {}
    for value in exif.values():
        name, colon, text = value.partition(":") if isinstance(value, str) else ("", "", "")
        if colon:
            texts[name] = text
    comment = exif.get_ifd(_EXIF_FOLDER).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        texts[PARAMETERS] = comment[len(_UNICODE) :].decode("utf-16-be", "replace")
    return texts
