"""The detailer: areas of a picture painted again, each at the size that the model paints best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import check_type, counted, is_number, is_whole, there_are
from ..config import Preset
from ..features.arguments import check_options, prompt_list, seed_list
from ..features.inpainting import LatentMask, mask_pixels
from ..features.prompt_embeds import PromptEmbeds
from ..guidance import ALWAYS
from ..images.areas import (
    MAX_AREAS,
    Area,
    AreaCanvas,
    LocalMask,
    batches,
    masks_of,
    masks_of_boxes,
    plan_areas,
)
from ..images.masks import cell_mask, mask_for
from ..images.pictures import OUTPUT_TYPES, Images, Picture, pixels_of, to_output
from ..images.sizes import image_tokens
from ..schedule import check_guidance, resolve_mu, sigma_schedule, unshift_time
from .stages import Callback


@dataclass(frozen=True)
class DetailAreas:
    """The areas of a picture to paint again.

    masks: one or several, each (H, W) in [0, 1], a picture in grey or a path; white is painted.
    boxes: (left, top, right, bottom) in pixels, in place of masks.
    islands: parts of a mask that are apart from each other are areas of their own.
    context: sides of the crop around an area, over those of the area.
    grow: pixels by which an area grows. feather: pixels over which the change fades out beyond.
    blend: pixels inside of an area's edge over which the new picture fades in.
    megapixels: of the size that a crop is painted at, in units of 1024 x 1024 pixels; None takes
        the checkpoint's own size.

    Raises ValueError for values out of range when it is used.
    """

    masks: Picture | Sequence[Picture] | None = None
    boxes: Sequence[Sequence[float]] | None = None
    islands: bool = True
    context: float = 2.0
    grow: int = 8
    feather: int = 8
    blend: int = 8
    megapixels: float | None = None

    def plan(self, image: Tensor, preset: Preset) -> list[Area]:
        """The areas of an image (1, H, W, 3)."""
        height, width = image.shape[1:3]
        megapixels = self.megapixels
        return plan_areas(
            self._masks(image),
            width,
            height,
            megapixels=preset.size**2 / 1024**2 if megapixels is None else megapixels,
            context=self.context,
            grow=self.grow,
            feather=self.feather,
        )

    def _masks(self, image: Tensor) -> list[LocalMask]:
        if (self.masks is None) == (self.boxes is None):
            raise ValueError("Give either masks or boxes of the areas to paint, and not both.")
        if self.boxes is not None:
            boxes: list[Any] = list(self.boxes)
            if len(boxes) == 4 and all(map(is_number, boxes)):
                boxes = [boxes]
            return masks_of_boxes(boxes, image.shape[2], image.shape[1])
        masks: Any = self.masks
        if not isinstance(masks, (list, tuple)):
            masks = masks if isinstance(masks, Tensor) and masks.ndim == 3 else [masks]
        pixels = [mask_pixels(mask, "masks") for mask in masks]
        return masks_of(torch.cat([mask_for(each, image) for each in pixels]), self.islands)


# Of a run, which `detail` passes on.
_OPTIONS = (
    *("guidance_schedule", "negative_guidance", "evaluate_every", "references", "control"),
    *("tiles", "rotary", "sparse"),
)


class Stages(Protocol):
    """The stages of a pipeline that the detailer uses; see `Krea2Pipeline`."""

    @property
    def preset(self) -> Preset: ...
    def encode_prompt(self, prompts: str | Sequence[str], **options: Any) -> PromptEmbeds: ...
    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def denoise(
        self, latents: Tensor, positive: PromptEmbeds, *args: Any, **options: Any
    ) -> Tensor: ...
    def images_at_once(self, width: int, height: int, text_tokens: int) -> int: ...


@torch.no_grad()
def detail(
    self: Stages,
    image: Picture,
    prompt: str | Sequence[str],
    areas: DetailAreas | Picture | Sequence[Picture],
    *,
    negative_prompt: str = "",
    denoise: float = 0.5,
    start_sigma: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] = 0,
    max_batch: int | None = None,
    prompt_weights: bool = False,
    output_type: str = "pil",
    callback: Callback | None = None,
    progress: bool = False,
    **options: Any,
) -> Images:
    """Paint areas of a picture again, each at the size that the model paints best.

    image: the picture; it keeps its size, and outside of the areas every pixel.
    prompt: of all areas, or one for each in their order.
    areas: a mask, several, or `DetailAreas` with boxes or options. Areas are numbered in the order
        of masks, the islands of one mask from top to bottom. One that overlaps an earlier one is
        painted after it, on top of its result.
    denoise: how much of the areas to change, above 0 to 1. start_sigma: the first sigma, in place
        of denoise.
    steps, guidance: None takes the checkpoint's preset.
    seed: an int (area i uses seed + i), or one per area.
    max_batch: areas of one size in a run of the model; None for as many as fit in memory.
    callback: called as `callback(step, latents, predicted)` after each step, counted over all runs;
        raise in it to cancel.
    prompt_weights: read `(word:1.3)` as weights, in the prompts of areas and in the negative one.
    progress: show a bar of the steps on stderr.
    options: of a run, such as guidance_schedule, negative_guidance or evaluate_every, see
        `denoise`.

    Returns the picture as a list of one ("pil"), or (1, H, W, 3) and (1, 3, H, W).
    Raises ValueError that names the argument, what was expected and the remedy.
    """
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise TypeError(
            f"detail has no argument {unknown[0]}; options of it: {', '.join(_OPTIONS)}."
        )
    if output_type not in OUTPUT_TYPES or output_type == "latent":
        raise ValueError(f"output_type is {output_type!r}; expected pil, np or pt.")
    if max_batch is not None and not (is_whole(max_batch) and 1 <= max_batch <= MAX_AREAS):
        raise ValueError(
            f"max_batch is {max_batch!r}; expected a whole number from 1 to {MAX_AREAS}, or None."
        )
    nag, schedule = options.get("negative_guidance"), options.get("guidance_schedule", ALWAYS)
    check_options(callback, nag, schedule)
    check_type("negative_prompt", negative_prompt, str, "a text, which holds for all areas")
    steps = self.preset.steps if steps is None else steps
    guidance = check_guidance(self.preset.guidance if guidance is None else guidance)
    first_sigmas = _sigmas(self.preset, steps, denoise, start_sigma, 1)  # checks them
    prompts = prompt_list(prompt, None)
    assert prompts is not None
    picture = pixels_of(image, "image").movedim(0, -1)[None]
    chosen = areas if isinstance(areas, DetailAreas) else DetailAreas(areas)
    planned = chosen.plan(picture, self.preset)
    if len(prompts) not in (1, len(planned)):
        raise ValueError(
            f"{there_are(len(prompts), 'prompt')} for {counted(len(planned), 'area')}; expected "
            "one for all, or one for each."
        )
    seeds = seed_list(seed, len(planned))
    positive = self.encode_prompt(prompts, weighted=prompt_weights)
    if nag is not None and nag.is_off:
        options["negative_guidance"] = nag = None
    negative = None
    if guidance > 0 or nag is not None:
        negative = self.encode_prompt(negative_prompt, weighted=prompt_weights)
    text_tokens = positive.taps.shape[1]

    def most(width: int, height: int) -> int:
        return max_batch or self.images_at_once(width, height, text_tokens)

    groups, canvas = list(batches(planned, most)), AreaCanvas(picture)
    total = len(groups) * (len(first_sigmas) - 1)
    done = 0
    with tqdm(total=total, disable=not progress) as bar:

        def step_done(step: int, latents: Tensor, predicted: Tensor) -> None:
            bar.update()
            if callback is not None:
                callback(done + step, latents, predicted)

        for group in groups:
            crops, masks = canvas.crop(group)
            sigmas = _sigmas(
                self.preset,
                steps,
                denoise,
                start_sigma,
                image_tokens(group[0].width, group[0].height),
            )
            original = torch.cat([self.encode(crop[None]) for crop in crops.movedim(-1, 1)])
            noise = torch.stack(
                [
                    torch.randn(
                        original.shape[1:], generator=torch.Generator().manual_seed(seeds[a.number])
                    )
                    for a in group
                ]
            )
            original = original.to(noise)
            rows = [a.number if len(prompts) > 1 else 0 for a in group]
            result = self.denoise(
                torch.lerp(original, noise, sigmas[0]),
                positive.rows(rows),
                negative,
                sigmas=sigmas,
                guidance=guidance,
                inpaint=LatentMask(cell_mask(masks)[:, None], original, noise, soft=True),
                callback=step_done,
                **options,
            )
            done += len(sigmas) - 1
            canvas.paste(group, self.decode(result).movedim(1, -1), chosen.blend)
    return to_output(canvas.image.movedim(-1, 1), output_type)


def _sigmas(
    preset: Preset, steps: int, denoise: float, start_sigma: float | None, tokens: int
) -> list[float]:
    mu = resolve_mu(preset, tokens)
    if start_sigma is not None:
        if not (is_number(start_sigma) and 0 < start_sigma <= 1):
            raise ValueError(
                f"start_sigma is {start_sigma!r}; expected more than 0 and at most 1, or None."
            )
        denoise = unshift_time(start_sigma, mu)
    return sigma_schedule(steps, mu, denoise)
