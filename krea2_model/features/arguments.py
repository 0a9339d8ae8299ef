"""Arguments of `Krea2Pipeline`: checked, and as lists with one entry per prompt or image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import check_finite, check_type, counted, is_whole
from ..guidance import GuidanceSchedule
from ..images.pictures import Picture, pixels_of, reference_pixels
from ..images.sizes import round_size
from ..schedule import MAX_SEED, check_seed
from ..text.prompt_images import MAX_SIDE, PromptImage, nonzero_images
from ..transformer.references import TIME_ZERO, Reference, ReferenceSettings
from ..transformer.text_attention import NegativeGuidance
from .edits import Edit
from .inpainting import Canvas, Inpaint
from .variations import Variation, slerp_each


@dataclass(frozen=True)
class PromptImages:
    """Images in front of a prompt.

    images: PIL images, paths, tensors (3 or 4, H, W) in [0, 1], or `PromptImage`.
    labels: number them, `Picture 1: `, as in the training of LoRAs that read images.
    max_side: images with more pixels than a square of this side are reduced.
    """

    images: Sequence[PromptImage | Picture] = ()
    labels: bool = True
    max_side: int = MAX_SIDE

    @classmethod
    def of(cls, images: PromptImages | Sequence[PromptImage | Picture] | None) -> PromptImages:
        return images if isinstance(images, PromptImages) else cls(_as_list("images", images))

    def prepared(self) -> list[PromptImage]:
        """The images at the size that the vision tower reads, without those of strength 0.

        Raises ValueError for what is no image.
        """
        images = [
            image
            if isinstance(image, PromptImage)
            else PromptImage(pixels_of(image, "an entry of images"))
            for image in self.images
        ]
        return [image.resized(self.max_side) for image in nonzero_images(images)]


@dataclass(frozen=True)
class ReferencePicture:
    """A reference before it is encoded: pixels (3, H, W) at their final size, and its settings."""

    pixels: Tensor
    settings: ReferenceSettings = field(default_factory=ReferenceSettings)


@dataclass(frozen=True)
class References:
    """Reference images of a run.

    images: PIL images, paths, tensors (3, H, W) in [0, 1], or `Reference`.
    method, cache: see `sampling.denoise`.
    max_megapixels: larger images are reduced to this area, in units of 1024 x 1024 pixels.
    """

    images: Sequence[Reference | ReferencePicture | Picture] = ()
    method: str = TIME_ZERO
    cache: bool = False
    max_megapixels: float = 1.0

    @classmethod
    def of(cls, references: References | Sequence[Reference | Picture] | None) -> References:
        if isinstance(references, References):
            return references
        return cls(_as_list("references", references))

    def prepared(self) -> list[Reference | ReferencePicture]:
        """`Reference`s as they are, other images at their final size.

        Raises ValueError for what is no image.
        """
        return [
            image
            if isinstance(image, (Reference, ReferencePicture))
            else ReferencePicture(
                reference_pixels(pixels_of(image, "an entry of references"), self.max_megapixels)
            )
            for image in self.images
        ]


def _as_list(name: str, images) -> list:
    """Pictures as a list; one alone is a list of one."""
    if images is None:
        return []
    if isinstance(images, (str, PathLike, Image.Image, PromptImage, Reference)):
        return [images]
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 3:
        return [images]
    if not isinstance(images, Iterable):
        raise ValueError(f"{name} is {images!r}; expected an image or a list of images.")
    return list(images)


def check_embeds(name: str, embeds: object, mask: object) -> None:
    """Raise ValueError unless embeddings are a tensor of 4 axes, and their mask one of 2."""
    if embeds is None:
        if mask is not None:
            raise ValueError(f"{name}_mask belongs to {name}; give both.")
        return
    for which, value, axes, shape in (
        (name, embeds, 4, "(B, tokens, 12, text width)"),
        (f"{name}_mask", mask, 2, "(B, tokens)"),
    ):
        if value is None:
            continue
        check_type(which, value, Tensor, f"a tensor {shape}")
        if value.ndim != axes:  # type: ignore[attr-defined]
            raise ValueError(f"{which} has shape {tuple(value.shape)}; expected {shape}.")  # type: ignore[attr-defined]


def check_edit(edit: Edit, prompts, images: PromptImages, references: References) -> Edit:
    """The edit with its pictures read. Raises ValueError beside arguments that it gives itself."""
    if prompts is None:
        raise ValueError("edit puts its pictures in front of a prompt; give prompt, no embeddings.")
    for name, given in (("images", images.images), ("references", references.images)):
        if given:
            raise ValueError(
                f"edit gives {name} itself, as its family needs them; leave {name} out."
            )
    return replace(edit, images=edit.pictures())


def check_latents(latents: object) -> None:
    """Raise ValueError for what is no tensor, and for NaN."""
    check_type("latents", latents, Tensor, "a tensor (B, 16, height / 8, width / 8)")
    check_finite(latents, "latents")


def check_options(callback, negative_guidance, guidance_schedule) -> None:
    """Raise ValueError for options of a run that are of another type."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {callback!r}; expected callback(step, latents, predicted).")
    if negative_guidance is not None:
        kind = NegativeGuidance
        check_type("negative_guidance", negative_guidance, kind, "a NegativeGuidance, or None")
    check_type("guidance_schedule", guidance_schedule, GuidanceSchedule, "a GuidanceSchedule")


def canvas_of(image: Picture | None, inpaint: Inpaint | Picture, sides: tuple) -> Canvas:
    """The image to paint in. Raises ValueError without one, and where a size is given too."""
    if image is None:
        raise ValueError("inpaint needs the picture that it is a mask of: give start_image.")
    if sides != (None, None):
        raise ValueError(
            f"height and width are {sides} with inpaint, where a picture keeps its size; leave "
            "them out, or resize picture and mask first."
        )
    return Canvas(image, Inpaint.of(inpaint))


def start_sides(*sides: int | None) -> list[int | None]:
    """Width and height of a start image, rounded to tokens; None for both keeps its own size."""
    if sides.count(None) == 1:
        raise ValueError("Give both height and width with start_image, or neither.")
    return [
        None if side is None else round_size(name, side)
        for name, side in zip(("width", "height"), sides, strict=True)
    ]


def prompt_list(prompt, embeds: Tensor | None) -> list[str] | None:
    """Prompts as a list, or None where there are embeddings."""
    if (prompt is None) == (embeds is None):
        raise ValueError("Give either prompt or prompt_embeds, and not both.")
    if embeds is not None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else _entries(prompt)
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompt is {prompt!r}; expected a text or a list of texts.")
    return prompts


def negative_list(negative, embeds: Tensor | None, count: int) -> list[str] | None:
    """Negatives of `count` prompts, or None where there are embeddings."""
    if embeds is not None:
        if len(embeds) not in (1, count):
            raise ValueError(
                f"negative_prompt_embeds has {len(embeds)} entries; expected 1 or {count}."
            )
        return None
    negative = "" if negative is None else negative
    negatives = [negative] * count if isinstance(negative, str) else _entries(negative)
    if len(negatives) != count or not all(isinstance(n, str) for n in negatives):
        raise ValueError(
            f"negative_prompt is {negative!r}; expected a text or a list of "
            f"{counted(count, 'text')}, one per prompt."
        )
    return negatives


def seed_list(seed, batch: int) -> list[int]:
    """The seed of each image; after the largest seed follows 0."""
    if is_whole(seed):
        first = check_seed(seed)
        return [(first + i) % (MAX_SEED + 1) for i in range(batch)]
    seeds = _entries(seed)
    if len(seeds) != batch or not all(map(is_whole, seeds)):
        raise ValueError(
            f"seed is {seed!r}; expected a whole number or a list of {batch}, one per image."
        )
    return [check_seed(s) for s in seeds]


def _entries(value) -> list:
    """The entries of a list, a tuple or another iterable; none for a text and anything else."""
    is_text = isinstance(value, (str, bytes))
    is_scalar = getattr(value, "ndim", 1) == 0
    return list(value) if isinstance(value, Iterable) and not (is_text or is_scalar) else []


def start_noise(
    latents: Tensor | None,
    shape: tuple[int, int, int],
    sides: tuple[int | None, int | None],
    default: int,
    seed,
    vary: Sequence[Variation] = (),
) -> Tensor:
    """Noise (B, C, h, w) in float32: the given latents, or noise of one seed per image.

    shape: B, C, and the VAE's downscale factor. sides: height and width in pixels, None for
        `default`. Noise is drawn on the CPU, so that a seed gives the same everywhere.
    vary: moves it towards other seeds' noise, one after the other. A seed that is a whole number is
        then that of all images.
    """
    batch, channels, downscale = shape
    height, width = (
        round_size(name, default if side is None else side)
        for name, side in zip(("height", "width"), sides, strict=True)
    )
    expected = (batch, channels, height // downscale, width // downscale)
    if latents is None:
        is_base = bool(vary) and is_whole(seed)
        noise = _draw([check_seed(seed)] * batch if is_base else seed_list(seed, batch), expected)
        return _varied(noise, vary)
    check_type("latents", latents, Tensor, f"a tensor {expected}")
    free = sides == (None, None) and latents.ndim == 4
    compared = expected[:2] if free else expected
    if tuple(latents.shape[: len(compared)]) != compared or latents.ndim != 4:
        raise ValueError(
            f"latents has shape {tuple(latents.shape)}; expected {expected}: {batch} images of "
            f"{height} x {width} px."
        )
    check_finite(latents, "latents")
    return _varied(latents.float(), vary)


def _draw(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    noise = [
        torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(each))
        for each in seeds
    ]
    return torch.stack(noise)


def _varied(noise: Tensor, vary: Sequence[Variation]) -> Tensor:
    """Noise (B, C, h, w) after variations."""
    for variation in vary:
        other = _draw(seed_list(variation.seed, len(noise)), noise.shape).to(noise)
        noise = slerp_each(noise, other, variation.strengths(len(noise)))
    return noise
