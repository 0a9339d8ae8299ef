"""The detailer: areas of an image painted again, each at the size that the model paints best."""

import comfy.model_management
import comfy.sample
import torch
from comfy_api.latest import io, ui

from ..krea2_model.checks import check_finite, counted
from ..krea2_model.config import RAW
from ..krea2_model.images.areas import (
    MAX_AREAS,
    Area,
    AreaCanvas,
    batches,
    masks_of,
    painted_mask,
    plan_areas,
)
from ..krea2_model.images.masks import cell_mask, mask_for
from ..krea2_model.images.sizes import image_tokens
from ..krea2_model.schedule import MAX_SEED
from . import inputs
from .inputs import AUTO, TURBO_MU, check_limits
from .latents import given_vae
from .managed.conditions import TOKEN_WEIGHTS
from .managed.memory import images_at_once
from .managed.regions import REGIONS
from .prompts import encode
from .reports import detail_report, sampling_report
from .sampler_run import (
    SOFT_MASK,
    check_model,
    check_negative,
    preset_of,
    sample,
    schedule,
    shift_exponent,
    start_of,
)
from .segs import SEGS, masks_of_segs
from .single_images import SIDE_BY_SIDE, rows_of

# Options of a CONDITIONING that belong to its text.
_OF_TEXT = ("attention_mask", "pooled_output", TOKEN_WEIGHTS)


class K2Detailer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Detailer",
            display_name="Krea 2 Detailer",
            category="Krea 2",
            description=(
                "Paints areas of an image again, such as faces: each is cropped, scaled to the "
                "size the model paints best, repainted and pasted back. Outside the areas every "
                "pixel is unchanged."
            ),
            search_aliases=inputs.aliases(
                "detailer, face detailer, adetailer, segs, impact, hires fix, refine, inpaint"
            ),
            inputs=[
                inputs.MODEL,
                io.Conditioning.Input(
                    "positive", tooltip="The encoded prompt: what the areas show, not the image."
                ),
                inputs.NEGATIVE,
                inputs.VAE,
                io.Image.Input("image", tooltip="One image of any size."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "The areas: a mask for each, or one mask whose separate parts are areas."
                    ),
                ),
                SEGS.Input(
                    "segs",
                    optional=True,
                    tooltip="The areas as a detector of the Impact Pack gives them, instead.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder, for the prompts below."
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "One prompt per line for each area, in order. An empty line uses positive."
                    ),
                ),
                inputs.PRESET,
                inputs.seed("Seed of the noise: area i uses seed + i."),
                inputs.STEPS,
                inputs.GUIDANCE,
                io.Float.Input(
                    "denoise",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "How much of the areas to change: 0.3 sharpens, 0.5 redraws, 1 paints anew."
                    ),
                ),
                io.Float.Input(
                    "context",
                    default=2.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Width and height of each crop, as a multiple of the area's.",
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=0,
                    max=inputs.MAX_PIXELS,
                    tooltip="Pixels of the image by which each area grows.",
                ),
                inputs.feather("Pixels of the image beyond that, in which the change fades out."),
                io.Int.Input(
                    "blend",
                    default=8,
                    min=0,
                    max=inputs.MAX_PIXELS,
                    advanced=True,
                    tooltip=(
                        "Pixels inside an area's edge over which the new image fades in. Outside "
                        "every pixel is unchanged."
                    ),
                ),
                io.Float.Input(
                    "megapixels",
                    default=0.0,
                    min=0.0,
                    max=16.0,
                    step=0.05,
                    advanced=True,
                    tooltip=(
                        "Size to paint each crop at, in units of 1024 x 1024 pixels; 0 is the "
                        "checkpoint's own size (1 for the released model)."
                    ),
                ),
                io.Boolean.Input(
                    "islands",
                    default=True,
                    advanced=True,
                    tooltip="On: separate parts of a mask are areas of their own. Not for segs.",
                ),
                io.Int.Input(
                    "max_batch",
                    default=0,
                    min=0,
                    max=MAX_AREAS,
                    advanced=True,
                    tooltip=("Areas of one size to sample at once; 0 is as many as fit in memory."),
                ),
                inputs.SAMPLER,
                inputs.shift(),
                inputs.MU,
                inputs.START_SIGMA,
            ],
            outputs=[
                io.Image.Output(tooltip="The image with the areas painted again."),
                io.Mask.Output(tooltip="All that was painted."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        vae,
        image,
        negative=None,
        mask=None,
        segs=None,
        clip=None,
        prompts="",
        preset=AUTO,
        seed=0,
        steps=28,
        guidance=4.5,
        denoise=0.5,
        context=2.0,
        grow=8,
        feather=8,
        blend=8,
        megapixels=0.0,
        islands=True,
        max_batch=0,
        sampler="euler",
        shift=AUTO,
        mu=TURBO_MU,
        start_sigma=0.0,
    ):
        check_model(model)
        vae = given_vae(vae)
        check_limits(
            cls, seed=seed, steps=steps, guidance=guidance, denoise=denoise, context=context,
            grow=grow, feather=feather, blend=blend, megapixels=megapixels, max_batch=max_batch,
            mu=mu, start_sigma=start_sigma,
        )  # fmt: skip
        settings = preset_of(model, preset, steps, guidance)
        check_negative(settings, preset, negative)
        _check_regions(positive)
        height, width = _one_image(image)
        areas = plan_areas(
            _masks(image, mask, segs, islands),
            width,
            height,
            megapixels=megapixels or _best_size(model) ** 2 / 1024**2,
            context=context,
            grow=grow,
            feather=feather,
        )
        lines = _lines(prompts, clip)
        own = _encoded(clip, lines[: len(areas)], positive)

        def most(columns: int, rows: int) -> int:
            if sampler not in SIDE_BY_SIDE:
                return 1
            return max_batch or images_at_once(model, columns, rows, MAX_AREAS)

        groups = list(batches(areas, most, lambda area: area.number in own))
        canvas = AreaCanvas(image)
        sigmas = None
        for index, group in enumerate(groups):
            crops, masks = canvas.crop(group)
            tokens = image_tokens(group[0].width, group[0].height)
            exponent = shift_exponent(settings, shift, mu, tokens)
            sigmas = schedule(settings, exponent, denoise, sampler, start_sigma)
            # One by one: core's own VAE takes a batch for a video.
            encoded = torch.cat([vae.encode(crop[None]) for crop in crops])
            latent = {
                "samples": encoded,
                "noise_mask": cell_mask(masks)[:, None, None],
                SOFT_MASK: True,
            }
            start = start_of(model, latent)
            seeds = [(seed + area.number) % (MAX_SEED + 1) for area in group]
            samples = sample(
                model,
                _positive_of(group, positive, own),
                None if negative is None else rows_of(negative, [a.number for a in group]),
                start,
                torch.cat([comfy.sample.prepare_noise(start[:1], each) for each in seeds]),
                sigmas,
                settings.guidance,
                exponent,
                latent=latent,
                seed=seeds[0],
                sampler=sampler,
                total=settings.steps * len(groups),
                before=settings.steps * index,
            )
            painted = vae.decode(samples)
            painted = painted.flatten(0, 1) if painted.ndim == 5 else painted
            canvas.paste(group, painted, blend)
        report = [sampling_report(preset, settings, exponent, sigmas), detail_report(areas, groups)]
        if len(lines) > len(areas):
            report.append(f"not used: {len(lines) - len(areas)} of {counted(len(lines), 'prompt')}")
        text = ui.PreviewText("\n".join(report))
        return io.NodeOutput(canvas.image, painted_mask(areas, width, height), ui=text)


def _one_image(image) -> tuple[int, int]:
    """Height and width. Raises ValueError for a batch."""
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; expected one image (1, height, width, 3), "
            "whose areas these are. Take the images of a batch one by one (Rebatch Images, or a "
            "list)."
        )
    check_finite(image, "image")
    return image.shape[1], image.shape[2]


def _masks(image, mask, segs, islands: bool):
    if (mask is None) == (segs is None):
        raise ValueError(
            "Connect either mask or segs: the areas to paint. A mask comes from Open in Mask "
            "Editor or a segmentation, segs from a detector of the Impact Pack."
        )
    if segs is not None:
        return masks_of_segs(segs, *image.shape[1:3])
    return masks_of(mask_for(mask, image), islands)


def _best_size(model) -> int:
    """The side of the square images that the checkpoint is made for."""
    return (getattr(model.model, "preset", None) or RAW).size


def _check_regions(positive) -> None:
    if any(REGIONS in extra for _, extra in positive):
        raise ValueError(
            "positive has regions, which are parts of a whole image and not of a crop. Connect the "
            "prompt as it is before them; prompts gives each area its own."
        )


def _lines(prompts: str, clip) -> list[str]:
    lines = [line.strip() for line in prompts.splitlines()] if prompts.strip() else []
    if any(lines) and clip is None:
        raise ValueError("prompts needs the text encoder: connect clip of Load Krea 2.")
    return lines


def _encoded(clip, lines: list[str], positive) -> dict[int, tuple]:
    """By the number of an area: the CONDITIONING of all own prompts, and its row in it."""
    numbers = [number for number, line in enumerate(lines) if line]
    if not numbers:
        return {}
    others = {name: value for name, value in positive[0][1].items() if name not in _OF_TEXT}
    encoded = encode(clip, [lines[number] for number in numbers])
    encoded = [[states, {**others, **extra}] for states, extra in encoded]
    return {number: (encoded, row) for row, number in enumerate(numbers)}


def _positive_of(group: list[Area], positive, own: dict[int, tuple]):
    """The CONDITIONING of a group, whose areas all have own prompts or none."""
    if group[0].number not in own:
        return rows_of(positive, [area.number for area in group])
    encoded = own[group[0].number][0]
    return rows_of(encoded, [own[area.number][1] for area in group])
