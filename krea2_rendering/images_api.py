"""Requests in the shape of OpenAI's images API, checked, as options of pictures.

Of that API: `POST /v1/images/generations` (JSON) and `/v1/images/edits` (a form with pictures).
Beside its own names a request may have negative_prompt, seed, steps, guidance and strength.
"""

from __future__ import annotations

import base64
import io
import re
import secrets
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from krea2_model.cli.errors import suggestion
from krea2_model.schedule import MAX_GUIDANCE, MAX_SEED, MAX_STEPS

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
# Of OpenAI's, without a meaning here; and values of others that we would have to refuse.
_IGNORED = (
    *("model", "user", "quality", "style", "moderation", "input_fidelity", "safety_identifier"),
    *("partial_images", "stream", "background", "response_format"),
)
_REFUSED = {
    "stream": (True, "true"),
    "background": ("transparent",),
    "response_format": ("url",),
}
_OWN = ("negative_prompt", "seed", "steps", "guidance", "strength")
_KNOWN = ("prompt", "n", "size", "output_format", "output_compression", *_OWN, *_IGNORED)
_STRENGTH = 0.7


class RequestError(Exception):
    """A request that is refused: the status, the message, and the parameter that is wrong."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400):
        super().__init__(message)
        self.parameter, self.status = parameter, status

    @property
    def body(self) -> dict[str, Any]:
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.parameter, "code": None}
        return {"error": error}


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for. bytes: of all its pictures together."""

    images: int
    side: int
    steps: int = 100
    bytes: int = 50_000_000
    prompt: int = 32_000


@dataclass(frozen=True)
class ImageRequest:
    """A request: the options of each of its pictures, and the form of the answer."""

    pictures: list[Namespace]
    format: str
    quality: int

    def answer(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        data = []
        for image in images:
            stored = io.BytesIO()
            image.save(stored, FORMATS[self.format], quality=self.quality)
            data.append({"b64_json": base64.b64encode(stored.getvalue()).decode()})
        width, height = images[0].size
        return {
            "created": int(time.time()),
            "data": data,
            "output_format": self.format,
            "size": f"{width}x{height}",
        }


def read_request(values: Mapping[str, Any], base: Namespace, limits: Limits) -> ImageRequest:
    """A request over the options of the command line. Raises RequestError."""
    for name in values:
        if name not in _KNOWN:
            hint = suggestion(name, _KNOWN)
            raise RequestError(f"There is no parameter {name}.{hint}", name)
    for name, refused in _REFUSED.items():
        if values.get(name) in refused:
            raise RequestError(f"{name} is {values[name]}, which is not supported.", name)
    args = copy(base)
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > limits.prompt:
        raise RequestError(
            f"The prompt is no text, empty or too long; expected 1 to {limits.prompt} characters.",
            "prompt",
        )
    args.prompt, args.wildcards = prompt, False
    if (negative := values.get("negative_prompt")) is not None:
        args.negative = str(negative)
    count = _whole(values, "n", 1, limits.images, 1)
    args.width, args.height = _size(values.get("size"), base, limits.side)
    args.steps = _whole(values, "steps", 1, min(limits.steps, MAX_STEPS), base.steps)
    args.guidance = _number(values, "guidance", MAX_GUIDANCE, base.guidance)
    seed = _whole(values, "seed", 0, MAX_SEED, None)
    seed = secrets.randbelow(2**32) if seed is None else seed
    form = values.get("output_format") or "png"
    if form not in FORMATS:
        raise RequestError(
            f"output_format is {form}; expected one of {', '.join(FORMATS)}.", "output_format"
        )
    quality = _whole(values, "output_compression", 0, 100, 90)
    pictures = []
    for number in range(count):
        one = copy(args)
        one.seed, one.images = (seed + number) % (MAX_SEED + 1), 1
        pictures.append(one)
    return ImageRequest(pictures, form, quality)


class InputPictures(AbstractContextManager):
    """The pictures of an edit as files, while it is made, and the options that name them."""

    def __init__(self, images: Sequence[bytes], mask: bytes | None, limits: Limits):
        if not images:
            raise RequestError("There is no picture to edit; expected a file as image.", "image")
        if sum(map(len, images)) + len(mask or b"") > limits.bytes:
            raise RequestError(
                f"The pictures are too large; expected at most {limits.bytes} bytes.", "image", 413
            )
        if mask is not None and len(images) > 1:
            raise RequestError("A mask goes with one picture; there are several.", "mask")
        for data in (*images, *([] if mask is None else [mask])):
            _check_picture(data, limits.side)
        self._folder = tempfile.TemporaryDirectory(prefix="krea2-edit-")
        folder = Path(self._folder.name)
        self._images, self._mask = [], None
        for number, data in enumerate(images):
            path = folder / f"{number}.png"
            path.write_bytes(data)
            self._images.append(path)
        if mask is not None:
            self._mask = folder / "mask.png"
            _white_where_clear(mask).save(self._mask)

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def give_to(self, request: ImageRequest, values: Mapping[str, Any], edits: bool) -> None:
        """Name the pictures in a request. edits: the model has an edit LoRA, which takes them."""
        strength = _number(values, "strength", 1.0, None)
        if strength == 0:
            raise RequestError(
                "strength is 0, which changes nothing; expected above 0, to 1.", "strength"
            )
        if not edits and len(self._images) > 1:
            raise RequestError(
                "This model changes one picture; several need an edit LoRA (krea2 serve --lora).",
                "image",
            )
        for args in request.pictures:
            if self._mask is None and edits and strength is None:
                args.edit = list(self._images)
                continue
            args.start_image, args.mask = self._images[0], self._mask
            args.denoise = strength or (1.0 if self._mask else _STRENGTH)
            if self._mask is not None:
                args.width = args.height = None


def _check_picture(data: bytes, most: int) -> None:
    """Refuse what is no picture, and sides above `most` before it is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception as error:
        raise RequestError(f"A file is no picture ({_line(error)}).", "image") from error
    if max(width, height) > most:
        raise RequestError(
            f"A picture has {width} x {height} px; expected sides up to {most}.", "image"
        )


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow names an object in memory
        return "no known format"
    return str(error)


def _white_where_clear(data: bytes) -> Image.Image:
    """OpenAI's mask, where what is transparent is painted, as ours, where white is."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            alpha = image.convert("RGBA").getchannel("A")
    except Exception as error:  # a file that is cut short
        raise RequestError(f"The mask cannot be read ({_line(error)}).", "mask") from error
    return alpha.point(lambda value: 255 - value)


def _size(text: Any, base: Namespace, most: int) -> tuple[int | None, int | None]:
    if text in (None, "", "auto"):
        return base.width, base.height
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(text))
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(0 < side <= most for side in sides):
        raise RequestError(
            f"size is {text}; expected WIDTHxHEIGHT with sides from 1 to {most}, or auto.", "size"
        )
    return sides


def _whole(values: Mapping[str, Any], name: str, least: int, most: int, default: Any) -> Any:
    value = values.get(name)
    if value is None:
        return default
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise RequestError(f"{name} is {value}; expected {least} to {most}.", name)
    return number


def _number(values: Mapping[str, Any], name: str, most: float, default: Any) -> Any:
    value = values.get(name)
    if value is None:
        return default
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not 0 <= number <= most:
        raise RequestError(f"{name} is {value}; expected a number from 0 to {most:g}.", name)
    return number
