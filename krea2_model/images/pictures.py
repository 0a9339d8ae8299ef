"""Conversion of pictures between callers' types (PIL, tensors, paths) and tensors."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import open as open_image
from torch import Tensor

from ..checks import check_finite
from .output_files import to_picture
from .resize import on_white, resize_and_crop
from .sizes import MAX_SIZE, limit_area

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# A picture: an image of PIL's, a path, a tensor (3 or 4, H, W) or an array (H, W, 3 or 4), the last
# two in [0, 1] or in bytes.
Picture = Tensor | np.ndarray | Image.Image | PathLike[str] | str


class PictureList(list[Image.Image]):
    """Pictures; `images` is the list itself, for programs written for diffusers."""

    @property
    def images(self) -> list[Image.Image]:
        return self


# Images of a run, by `OUTPUT_TYPES`.
Images = PictureList | np.ndarray | Tensor

# As many as the largest image has that this package makes; they would take 4 GB as numbers.
MAX_PIXELS = MAX_SIZE**2

_REMEDY = "Save it as PNG or JPEG with 8 or 16 bits per channel."


def pixels_of(picture: Picture, name: str) -> Tensor:
    """A picture as (3, H, W) in [0, 1], in float32; where it is transparent, white shows.

    It stands as its EXIF orientation says. 16 bits of grey keep their range; so do floating-point
    numbers in [0, 1]. Of several frames the first counts.

    Raises ValueError, with the name of the argument, for what is no picture, cannot be read, or
    does not say what its white is.
    """
    if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] in (3, 4):
        picture = torch.from_numpy(np.array(picture)).movedim(-1, 0)
    if isinstance(picture, (str, PathLike)):
        return pixels_of(_opened(picture, name), name)
    if isinstance(picture, Image.Image):
        return on_white(_channels(picture, name))
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (3, 4):
        shape = tuple(getattr(picture, "shape", ())) or type(picture).__name__
        raise ValueError(
            f"{name} is {shape}; expected an image of PIL's, the path of one, a tensor (3, height, "
            "width) or an array (height, width, 3) in [0, 1], or with 4 channels."
        )
    if 0 in picture.shape:
        raise ValueError(f"{name} has shape {tuple(picture.shape)}; expected at least one pixel.")
    if picture.dtype == torch.uint8:
        picture = picture.float() / 255
    return on_white(_in_range(picture.float(), name, f"a tensor of {picture.dtype}"))


def fit(pixels: Tensor, width: int | None, height: int | None) -> Tensor:
    """A picture (3, H, W) cropped to a size; to its own in whole tokens where it is None."""
    size = limit_area(pixels.shape[2], pixels.shape[1], math.prod(pixels.shape[1:]) / 1024**2)
    image = pixels.movedim(0, -1)[None]
    result, _ = resize_and_crop(image, image[..., 0], width or size[0], height or size[1], "crop")
    return result[0].movedim(-1, 0)


def reference_pixels(pixels: Tensor, megapixels: float) -> Tensor:
    """A picture (3, H, W) at the size that it has as a reference, for pipeline and nodes.

    At its own aspect and of at most an area, see `limit_area`: scaled evenly, and cropped at both
    ends to whole tokens, which is less than 16 pixels of the result.
    """
    width, height = limit_area(pixels.shape[2], pixels.shape[1], megapixels)
    return fit(pixels, width, height)


def to_output(images: Tensor, output_type: str) -> Images:
    """Images (B, 3, H, W) in [0, 1] as one of `OUTPUT_TYPES`."""
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return PictureList(map(to_picture, array))


def _opened(path: PathLike[str] | str, name: str) -> Image.Image:
    try:
        return open_image(path)
    except Image.DecompressionBombError as error:
        raise _too_large(f"{name} {path}", str(error)) from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} is {path}, which is not there; expected a picture.") from error
    except Exception as error:  # decoders of damaged files raise whatever comes
        if Path(path).is_dir():
            raise ValueError(f"{name} is {path}, a folder; expected a picture in it.") from error
        raise ValueError(
            f"{name} is {path}, which cannot be read as a picture ({error}). Expected PNG, JPEG, "
            "WebP or another kind that Pillow reads."
        ) from error


def _channels(image: Image.Image, name: str) -> Tensor:
    """An image of PIL's as (3 or 4, H, W) in [0, 1], in float32."""
    if path := getattr(image, "filename", ""):
        name = f"{name} {path}"
    if math.prod(image.size) > MAX_PIXELS:
        raise _too_large(name, f"{image.width} x {image.height} pixels")
    if 0 in image.size:
        raise ValueError(
            f"{name} is {image.width} x {image.height} px; expected at least one pixel."
        )
    # A PNG of 16 bits is opened in this mode by some versions of Pillow.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode == "I" and not sixteen:
        raise ValueError(f"{name} holds 32-bit integers, which do not say what is white. {_REMEDY}")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if sixteen or image.mode == "F":
            return _numbers(image, sixteen, name)
        # Premultiplied colours have to be divided by alpha before they become others.
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
        array = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except MemoryError as error:
        raise _too_large(name, f"{image.width} x {image.height} pixels") from error
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise _unreadable(image, name, error) from error
    except Exception as error:
        raise _unreadable(image, name, error) from error
    return torch.from_numpy(array).movedim(-1, 0)


def _numbers(image: Image.Image, sixteen: bool, name: str) -> Tensor:
    """One channel of 16 bits, or of floating-point numbers, as three and perhaps alpha."""
    array = np.asarray(image)
    # Files may have the other byte order, and numbers of one kind in another's size.
    values = torch.from_numpy(array.astype(np.float32))
    grey = values / 65535 if sixteen else values
    grey = _in_range(grey[None], name, f"mode {image.mode}").expand(3, -1, -1)
    hidden = image.info.get("transparency")
    if sixteen and isinstance(hidden, int):
        return torch.cat([grey, (values != hidden).float()[None]])
    return grey


def _in_range(values: Tensor, name: str, kind: str) -> Tensor:
    """Values within [0, 1], but for what scaling oversteps; Raises ValueError for others."""
    check_finite(values, name)
    low, high = (value.item() for value in values.aminmax())
    if low < -0.1 or high > 1.1:
        raise ValueError(
            f"{name} has values from {low:g} to {high:g} ({kind}); expected 0 (black) to 1 (white)."
            f" Scale it to that, or: {_REMEDY[0].lower()}{_REMEDY[1:]}"
        )
    return values.clamp(0, 1)


def _too_large(name: str, found: str) -> ValueError:
    return ValueError(
        f"{name} is too large: {found}; expected at most {MAX_PIXELS} pixels "
        f"({MAX_SIZE} x {MAX_SIZE}). Make it smaller."
    )


def _unreadable(image: Image.Image, name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name} cannot be read ({image.format or 'an image'} of mode {image.mode}: {error}). It "
        f"is damaged or of a kind that Pillow does not know. {_REMEDY}"
    )
