"""The parts of a sampler run: settings, schedule, start, noise, and the run itself."""

import logging

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..krea2_model.checks import check_finite, counted
from ..krea2_model.config import PRESETS, Preset
from ..krea2_model.images.masks import EMPTY, NOISE, ROUNDING, remaining_mask, without_noise
from ..krea2_model.images.sizes import is_far
from ..krea2_model.schedule import (
    MAX_SEED,
    check_guidance,
    resolve_mu,
    sigma_schedule,
    unshift_time,
)
from ..krea2_model.transformer.patches import token_count
from .inputs import AUTO, BY_SIZE, CUSTOM, FIXED
from .managed.conditions import NEGATIVE_GUIDANCE
from .managed.core_model import is_core
from .managed.diffusion_model import TILES
from .managed.lora import known_preset
from .managed.memory import advise
from .reports import far_size_report, size_report
from .single_images import conditioning_of, latent_of, model_of

logger = logging.getLogger(__name__)

ONE_STREAM, ONE_EACH = "one for the batch", "one an image"
# Key of a latent whose mask is soft: the share of the run in which each cell is painted.
SOFT_MASK = "krea2_soft_mask"

_MEMORY_REMEDY = (
    "Make fewer or smaller images or references at once, load a smaller file (fp8_scaled, GGUF), "
    "or close what else uses the device."
)


def check_model(model) -> None:
    family = type(model.model)
    if not issubclass(family, getattr(comfy.model_base, "Krea2", ())):
        raise ValueError(
            f"The model is {family.__name__}; expected Krea 2. Connect Load Krea 2, or use a "
            "sampler for that family."
        )


def check_ours(model, lack: str) -> None:
    """Raise ValueError for a MODEL that is no Krea 2, or runs ComfyUI's own implementation.

    lack: says of that one what it cannot do, such as "which has no tiles".
    """
    check_model(model)
    if is_core(model):
        raise ValueError(
            f"model runs ComfyUI's own implementation of Krea 2, {lack}. Load it with Load Krea "
            "2, implementation this pack."
        )


def has_other_negative(model) -> bool:
    """True if Krea 2 Negative (NAG) gives the model a negative."""
    return NEGATIVE_GUIDANCE in model.model_options.get("transformer_options", {})


def preset_of(model, name: str, steps: int | None = None, guidance: float = 0.0) -> Preset:
    """The sampling settings for a choice of the preset input."""
    known = known_preset(model)
    if name == CUSTOM:  # other steps and guidance; the shift stays the checkpoint's
        mu = known.mu if known is not None else None
        return Preset(CUSTOM, steps if steps is not None else 28, guidance, mu)
    if name in PRESETS:
        return PRESETS[name]
    if name != AUTO:
        raise ValueError(f"preset is {name!r}; expected {AUTO}, {', '.join(PRESETS)} or {CUSTOM}.")
    if known is None:
        raise ValueError(
            "This checkpoint does not say whether it is Raw or Turbo, which auto needs. Choose raw "
            "or turbo (in Krea 2 Shift for Stock Samplers: by size or fixed), or put the word raw "
            "or turbo into the name of the file."
        )
    return known


def check_negative(settings: Preset, preset: str, negative) -> None:
    """Raise ValueError where guidance needs a negative and there is none.

    preset: the choice that gave the settings.
    """
    if settings.guidance > 0 and negative is None:
        choice = settings.name if preset == settings.name else f"{preset}: {settings.name}"
        widget = "guidance 0" if preset == CUSTOM else "preset custom with guidance 0"
        raise ValueError(
            f"Guidance is {settings.guidance} (preset {choice}) but nothing is "
            "connected to negative. Connect the negative output of Krea 2 Prompt (an empty "
            f"text is fine), or choose {widget}."
        )


def shift_exponent(preset: Preset, shift: str, mu: float, tokens: int) -> float:
    """The exponent of the time shift for an image of `tokens` tokens."""
    if shift == FIXED:
        return mu
    if shift not in (AUTO, BY_SIZE):
        raise ValueError(f"shift is {shift!r}; expected {AUTO}, {BY_SIZE} or {FIXED}.")
    return resolve_mu(preset if shift == AUTO else None, tokens)


def warn_of_size(model, samples, first_sigma: float = 1.0) -> str:
    """Log a warning for an image far from the size that the checkpoint was trained at.

    Tiles of a picture that exists already (first_sigma below 1) are what the model sees then. From
    pure noise each would paint the whole prompt, so there the image's own size counts.
    Returns the text for the node, empty where all is well.
    """
    known = getattr(model.model, "preset", None)
    height, width = (8 * side for side in samples.shape[-2:])
    tiles = model.model_options.get("transformer_options", {}).get(TILES)
    if tiles is not None and first_sigma < 1:
        height, width = min(height, tiles.size), min(width, tiles.size)
    if known is None or not is_far(width, height, known.size):
        return ""
    logger.warning(
        "%d x %d px is far from the %d x %d this checkpoint was trained at; expect repeated "
        "or broken shapes.",
        width,
        height,
        known.size,
        known.size,
    )
    return far_size_report(known.size)


def _measures(samples) -> str:
    """The images of a run, in words: "2 images of 1024 x 768 px"."""
    images, (rows, columns) = samples.shape[0], samples.shape[-2:]
    return f"{counted(images, 'image')} of {8 * columns} x {8 * rows} px"


def schedule(
    settings: Preset, mu: float, denoise: float, sampler: str | None = None, start_sigma: float = 0
):
    """The schedule as a tensor.

    For a sampler of DISCARD_PENULTIMATE_SIGMA_SAMPLERS it has one step more, without its last sigma
    above 0, as ComfyUI computes it.
    start_sigma: the first sigma, in place of denoise; 0 leaves that to denoise.
    """
    if start_sigma:
        denoise = unshift_time(start_sigma, mu)
    if sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS:
        sigmas = sigma_schedule(settings.steps + 1, mu, denoise)
        del sigmas[-2]
    else:
        sigmas = sigma_schedule(settings.steps, mu, denoise)
    return torch.tensor(sigmas)


def latent_report(samples) -> str:
    height, width = (8 * side for side in samples.shape[-2:])
    return size_report(width, height, token_count(samples), len(samples))


def shifted(model, mu: float):
    """A clone of the model with this shift in the schedule that percentages and samplers use."""

    class Shifted(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    sampling = Shifted(model.model.model_config)
    sampling.set_parameters(shift=mu)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def start_of(model, latent):
    """The latent image as the sampler takes it: (B, 16, 1, h, w).

    Raises ValueError for a latent of another model, and for NaN.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        model,
        latent["samples"],
        latent.get("downscale_ratio_spacial"),
        latent.get("downscale_ratio_temporal"),
    )
    if samples.ndim != 5 or samples.shape[1:3] != (16, 1):
        raise ValueError(
            f"The latent has shape {tuple(latent['samples'].shape)}; Krea 2 needs (batch, 16, 1, "
            "height / 8, width / 8). Use Krea 2 Size, or encode the image with the Krea 2 VAE."
        )
    check_finite(samples, "The latent")
    return samples


def noise_for(start, seed: int, latent, seeds: str = ONE_STREAM):
    """Noise for a batch (B, 16, 1, h, w), on the CPU and in float32."""
    if seeds == ONE_STREAM:
        return comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    if seeds != ONE_EACH:
        raise ValueError(f"seeds is {seeds!r}; expected {ONE_STREAM} or {ONE_EACH}.")
    seed_of_image = seeds_of(start, seed, latent)
    return torch.cat([comfy.sample.prepare_noise(start[:1], one) for one in seed_of_image])


def seeds_of(start, seed: int, latent) -> list[int]:
    """The seed of each image of a batch: seed + i, or by the latent's batch_index."""
    numbers = latent.get("batch_index")
    numbers = range(len(start)) if numbers is None else numbers
    # ComfyUI's seeds are 64 bits wide.
    return [(seed + int(number)) % (MAX_SEED + 1) for number in numbers]


def with_samples(latent, samples):
    """A latent with other samples, without its hints for empty ones, which no longer hold."""
    entries = {
        key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")
    }
    return {**entries, "samples": samples}


def sample_each(model, positive, negative, start, noise, sigmas, guidance, mu, **options):
    """As `sample`, the images of the batch one after the other, each with its own seed.

    seeds has that of each image; see `single_images`.
    """
    latent, seeds, total = (options.pop(name) for name in ("latent", "seeds", "total"))
    samples = []
    for index, image_seed in enumerate(seeds):
        one = slice(index, index + 1)
        samples.append(
            sample(
                model_of(model, index),
                conditioning_of(positive, index),
                conditioning_of(negative, index),
                start[one],
                noise[one],
                sigmas.clone(),  # another object for each run, which tells runs apart
                guidance,
                mu,
                latent=latent_of(latent, index),
                seed=image_seed,
                total=total * len(start),
                before=total * index,
                **options,
            )
        )
    return torch.cat(samples)


def sample(
    model,
    positive,
    negative,
    start,
    noise,
    sigmas,
    guidance: float,
    mu: float,
    *,
    latent,
    seed: int,
    total: int,
    before: int = 0,
    sampler: str = "euler",
):
    """Latents (B, 16, 1, h, w) at the last of `sigmas`, from an image and noise at the first.

    guidance is in Krea's convention and needs a negative above 0; mu is the shift that other nodes
    see. The progress shows `total` steps, `before` of which belong to earlier runs.
    """
    model = shifted(model, mu)
    mask = _noise_mask(latent, model)
    if latent.get(SOFT_MASK) and "denoise_mask_function" not in model.model_options:
        model.set_model_denoise_mask_function(_soft_mask(mu))
    guider = comfy.samplers.CFGGuider(model)
    conditions = {"positive": positive}
    if guidance > 0:
        conditions["negative"] = negative
    guider.inner_set_conds(conditions)
    guider.set_cfg(check_guidance(guidance) + 1.0)

    preview = latent_preview.prepare_callback(model, total)

    def callback(step, predicted, current, _):
        if not torch.isfinite(predicted).all():
            raise ValueError(
                f"The latents turned NaN or infinite at step {before + step + 1} of {total} "
                f"({model.model.get_dtype_inference()}). Load the model as bf16 or fp32, or "
                "remove the last LoRA or patch."
            )
        preview(before + step, predicted, current, total)

    with advise(f"The transformer, at {_measures(start)},", _MEMORY_REMEDY):
        samples = guider.sample(
            noise,
            start,
            comfy.samplers.sampler_object(sampler),
            sigmas,
            denoise_mask=mask,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            # ComfyUI's samplers add 1 to the seed, which would overflow at the last one.
            seed=min(seed, MAX_SEED - 1),
        )
    return samples.to(comfy.model_management.intermediate_device())


def check_mask(latent) -> None:
    """Raise ValueError where a latent has a mask that is empty for all images."""
    mask = latent.get("noise_mask")
    if mask is not None and not without_noise(mask, ROUNDING).any():
        raise ValueError(
            f"{EMPTY}nothing of the latent would be painted. Paint a mask (Open in Mask Editor), "
            "or leave out the node that set it, such as Set Latent Noise Mask."
        )


def _noise_mask(latent, model):
    """The latent's mask with a frame axis, without which ComfyUI takes masks for frames."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    has_function = "denoise_mask_function" in model.model_options
    mask = without_noise(mask, ROUNDING if has_function else NOISE)
    return mask if mask.ndim > 4 else mask.reshape(-1, 1, 1, *mask.shape[-2:])


def _soft_mask(mu: float):
    """A function from a step to its mask, from 0 (kept) to 1 (painted), as ComfyUI calls it.

    In time before the shift, so that a mask means what denoise does. Core's Differential Diffusion
    counts in sigma.
    """

    def mask_at(sigma, denoise_mask, extra_options):
        now, start = (
            unshift_time(min(1.0, value.flatten()[0].item()), mu)
            for value in (sigma, extra_options["sigmas"])
        )
        return remaining_mask(denoise_mask, now / start)

    return mask_at
