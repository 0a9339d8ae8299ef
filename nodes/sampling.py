"""Sampling: Krea 2's schedule and guidance on ComfyUI's samplers."""

import logging

from comfy_api.latest import io, ui

from ..krea2_model.config import PRESETS, Preset
from ..krea2_model.sampling import check_guidance, shift_mu, sigma_schedule
from ..krea2_model.sizes import MAX_SIZE, check_size, image_tokens, round_size
from .reports import sampling_report, shift_report, size_report, unused_report

logger = logging.getLogger(__name__)

AUTO, CUSTOM = "auto", "custom"
BY_SIZE, FIXED = "by size", "fixed"
ONE_STREAM, ONE_EACH = "one for the batch", "one an image"
TURBO_MU = PRESETS["turbo"].mu

_MEMORY_REMEDY = (
    "Make fewer or smaller images at once, load a smaller file (fp8_scaled, GGUF), or close what "
    "else uses the device."
)

_PRESET_INPUT = io.Combo.Input(
    "preset",
    options=[AUTO, *PRESETS, CUSTOM],
    default=AUTO,
    tooltip=(
        "Steps and guidance: auto takes what the checkpoint was made for, raw is 28 steps at "
        "guidance 4.5, turbo 8 steps at 0, custom the values below. The node shows what was taken."
    ),
)
_STEPS_INPUT = io.Int.Input(
    "steps", default=28, min=1, max=1000, tooltip="Steps; used with preset custom only."
)
_DENOISE_INPUT = io.Float.Input(
    "denoise",
    default=1.0,
    min=0.01,
    max=1.0,
    step=0.01,
    tooltip=(
        "Where to start: 1 from pure noise; below, the latent image keeps part of itself, the more "
        "the lower."
    ),
)


def _shift_input(advanced: bool = True):
    return io.Combo.Input(
        "shift",
        options=[AUTO, BY_SIZE, FIXED],
        default=AUTO,
        advanced=advanced,
        tooltip=(
            "The time shift: auto is the preset's, fixed 1.15 for Turbo and by size for Raw, as "
            "Krea trained them; fixed takes mu from below."
        ),
    )


_MU_INPUT = io.Float.Input(
    "mu",
    default=TURBO_MU,
    min=-10.0,
    max=10.0,
    step=0.01,
    advanced=True,
    tooltip="The shift's exponent, for shift fixed. At 1024 x 1024 Raw's is 0.90625.",
)


def check_model(model) -> None:
    import comfy.model_base

    family = type(model.model)
    if not issubclass(family, getattr(comfy.model_base, "Krea2", ())):
        raise ValueError(
            f"The model is {family.__name__}; expected Krea 2. Connect Load Krea 2, or use a "
            "sampler for that family."
        )


def preset_of(model, name: str, steps: int | None = None, guidance: float = 0.0) -> Preset:
    """The sampling settings of a choice in the preset input."""
    known = getattr(model.model, "preset", None)
    if name == CUSTOM:
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


def _mu(preset: Preset, shift: str, mu: float, tokens: int) -> float:
    """The exponent of the time shift for an image of so many tokens."""
    if shift == FIXED:
        return mu
    if shift not in (AUTO, BY_SIZE):
        raise ValueError(f"shift is {shift!r}; expected {AUTO}, {BY_SIZE} or {FIXED}.")
    if shift == AUTO and preset.mu is not None:
        return preset.mu
    return shift_mu(tokens)


def _warn_of_size(model, samples) -> None:
    """Say where an image has over four times the area the checkpoint is made for."""
    known = getattr(model.model, "preset", None)
    height, width = (8 * side for side in samples.shape[-2:])
    if known is not None and width * height > 4 * known.size**2:
        logger.warning(
            "%d x %d px is far from the %d x %d this checkpoint was trained at; expect repeated "
            "or broken shapes.",
            width, height, known.size, known.size,
        )  # fmt: skip


def _measures(samples) -> str:
    """What a run makes, in words: "2 images of 1024 x 768 px"."""
    images, (rows, columns) = samples.shape[0], samples.shape[-2:]
    return f"{images} image{'s' * (images > 1)} of {8 * columns} x {8 * rows} px"


def _sigmas(settings: Preset, mu: float, denoise: float, sampler: str | None = None):
    """The schedule as a tensor, with the step that some of ComfyUI's samplers need left out."""
    import comfy.samplers
    import torch

    if sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS:
        sigmas = sigma_schedule(settings.steps + 1, mu, denoise)
        del sigmas[-2]
    else:
        sigmas = sigma_schedule(settings.steps, mu, denoise)
    return torch.tensor(sigmas)


def latent_tokens(samples) -> int:
    """Tokens of latents (..., h, w), two cells a side, the last ones padded."""
    height, width = samples.shape[-2:]
    return -(-height // 2) * -(-width // 2)


def _size_report(samples) -> str:
    height, width = (8 * side for side in samples.shape[-2:])
    return size_report(width, height, latent_tokens(samples), len(samples))


def _shifted(model, mu: float):
    """A clone of the model whose own schedule has this shift: percentages and samplers use it."""
    import comfy.model_sampling

    class Shifted(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    sampling = Shifted(model.model.model_config)
    sampling.set_parameters(shift=mu)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def start_of(model, latent):
    """The latent image as the sampler takes it: (B, 16, 1, h, w)."""
    import comfy.sample

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
    return samples


def noise_for(start, seed: int, latent, seeds: str = ONE_STREAM):
    """Noise for a batch (B, 16, 1, h, w), on the CPU and in float32."""
    import comfy.sample
    import torch

    numbers = latent.get("batch_index")
    if seeds == ONE_STREAM:
        return comfy.sample.prepare_noise(start, seed, numbers)
    if seeds != ONE_EACH:
        raise ValueError(f"seeds is {seeds!r}; expected {ONE_STREAM} or {ONE_EACH}.")
    numbers = range(len(start)) if numbers is None else numbers
    # ComfyUI's seeds are 64 bits wide.
    return torch.cat([comfy.sample.prepare_noise(start[:1], (seed + n) % 2**64) for n in numbers])


def with_samples(latent, samples):
    """A latent with other samples, of which its hints for empty ones are no longer true."""
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
    return {**kept, "samples": samples}


class K2Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        import comfy.samplers

        return io.Schema(
            node_id="K2Sampler",
            display_name="Krea 2 Sampler",
            category="Krea 2",
            description=(
                "Samples with the schedule and the guidance Krea 2 was trained with, chosen by "
                "the checkpoint and the size."
            ),
            search_aliases=["krea", "krea2", "k2", "turbo", "raw", "ksampler", "image to image"],
            inputs=[
                io.Model.Input("model", tooltip="Krea 2, Raw or Turbo."),
                io.Conditioning.Input("positive", tooltip="What the image shows."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What guidance leads away from; needed where guidance is above 0.",
                ),
                io.Latent.Input("latent", tooltip="An empty latent, or an image to change."),
                _PRESET_INPUT,
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise to start from.",
                ),
                _STEPS_INPUT,
                io.Float.Input(
                    "guidance",
                    default=4.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip=(
                        "Used with preset custom only; in Krea's convention: 0 is off. "
                        "ComfyUI cfg = guidance + 1."
                    ),
                ),
                _DENOISE_INPUT,
                io.Combo.Input(
                    "sampler",
                    options=list(comfy.samplers.KSampler.SAMPLERS),
                    default="euler",
                    advanced=True,
                    tooltip="ComfyUI's samplers; euler is what Krea uses.",
                ),
                _shift_input(),
                _MU_INPUT,
                io.Combo.Input(
                    "seeds",
                    options=[ONE_STREAM, ONE_EACH],
                    default=ONE_STREAM,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "For batches: the whole batch from one seed, as ComfyUI does, or image i "
                        "from seed + i, which is the image that this seed makes alone."
                    ),
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The image, to be decoded.")],
        )

    @classmethod
    def validate_inputs(cls, steps=None, guidance=None, denoise=None, mu=None):
        return _check_settings(steps, guidance, denoise, mu)

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent,
        negative=None,
        preset=AUTO,
        seed=0,
        steps=28,
        guidance=4.5,
        denoise=1.0,
        sampler="euler",
        shift=AUTO,
        mu=TURBO_MU,
        seeds=ONE_STREAM,
    ):
        check_model(model)
        settings = preset_of(model, preset, steps, guidance)
        if settings.guidance > 0 and negative is None:
            raise ValueError(
                f"Guidance is {settings.guidance} (preset {settings.name}) but nothing is "
                "connected to negative. Connect the negative output of Krea 2 Prompt (an empty "
                "text is fine), or choose guidance 0."
            )
        start = start_of(model, latent)
        _warn_of_size(model, start)
        exponent = _mu(settings, shift, mu, latent_tokens(start))
        sigmas = _sigmas(settings, exponent, denoise, sampler)
        noise = noise_for(start, seed, latent, seeds)
        samples = sample(
            model,
            positive,
            negative,
            start,
            noise,
            sigmas,
            settings.guidance,
            exponent,
            latent=latent,
            seed=seed,
            sampler=sampler,
            total=settings.steps,
        )
        report = [sampling_report(preset, settings, exponent, sigmas), _size_report(start)]
        given = Preset(CUSTOM, steps, guidance, None)
        # The defaults of the inputs are Raw's.
        if settings.name != CUSTOM and (unused := unused_report(settings, given, PRESETS["raw"])):
            report.append(unused)
        return io.NodeOutput(with_samples(latent, samples), ui=ui.PreviewText("\n".join(report)))


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
    see. `total` steps are shown, `before` of which were done by others.
    """
    import comfy.model_management
    import comfy.samplers
    import comfy.utils
    import latent_preview
    import torch

    from .managed.memory import advise

    model = _shifted(model, mu)
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
            denoise_mask=latent.get("noise_mask"),
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    return samples.to(comfy.model_management.intermediate_device())


class K2Sigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Sigmas",
            display_name="Krea 2 Schedule",
            category="Krea 2",
            description=(
                "Krea 2's sigmas, for SamplerCustomAdvanced and its like. Krea 2 Sampler makes "
                "them by itself."
            ),
            search_aliases=["krea", "krea2", "k2", "turbo", "raw", "scheduler", "sigmas"],
            inputs=[
                io.Model.Input("model", tooltip="Krea 2, for what the checkpoint was made for."),
                io.Latent.Input("latent", tooltip="For its size."),
                _PRESET_INPUT,
                _STEPS_INPUT,
                _DENOISE_INPUT,
                _shift_input(),
                _MU_INPUT,
            ],
            outputs=[io.Sigmas.Output(tooltip="From noise to 0.")],
        )

    @classmethod
    def validate_inputs(cls, steps=None, denoise=None, mu=None):
        return _check_settings(steps, None, denoise, mu)

    @classmethod
    def execute(cls, model, latent, preset=AUTO, steps=28, denoise=1.0, shift=AUTO, mu=TURBO_MU):
        check_model(model)
        settings = preset_of(model, preset, steps)
        start = start_of(model, latent)
        exponent = _mu(settings, shift, mu, latent_tokens(start))
        sigmas = _sigmas(settings, exponent, denoise)
        report = sampling_report(preset, settings, exponent, sigmas, guided=False)
        return io.NodeOutput(sigmas, ui=ui.PreviewText(f"{report}\n{_size_report(start)}"))


class K2ModelSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2ModelSampling",
            display_name="Krea 2 Shift for Stock Samplers",
            category="Krea 2",
            description=(
                "Gives the model Krea 2's time shift for a size, so that KSampler with scheduler "
                "simple follows the right schedule. Krea 2 Sampler does this by itself."
            ),
            search_aliases=["krea", "krea2", "k2", "turbo", "raw", "model sampling", "mu"],
            inputs=[
                io.Model.Input("model", tooltip="Krea 2, Raw or Turbo."),
                *(
                    io.Int.Input(
                        side,
                        default=1024,
                        min=16,
                        max=MAX_SIZE,
                        step=16,
                        tooltip=f"The image's {side} in pixels, for example from Krea 2 Size.",
                    )
                    for side in ("width", "height")
                ),
                _shift_input(advanced=False),
                _MU_INPUT,
            ],
            outputs=[io.Model.Output(tooltip="The model with its shift set.")],
        )

    @classmethod
    def validate_inputs(cls, width=None, height=None, mu=None):
        try:
            for name, pixels in (("width", width), ("height", height)):
                if pixels is not None:
                    check_size(name, pixels)
        except ValueError as error:
            return str(error)
        return _check_settings(None, None, None, mu)

    @classmethod
    def execute(cls, model, width=1024, height=1024, shift=AUTO, mu=TURBO_MU):
        check_model(model)
        # Without a known variant this has no mu; only shift auto asks for it.
        settings = preset_of(model, CUSTOM if shift != AUTO else AUTO)
        width, height = round_size("width", width), round_size("height", height)
        tokens = image_tokens(width, height)
        exponent = _mu(settings, shift, mu, tokens)
        report = f"{shift_report(exponent)}\n{size_report(width, height, tokens)}"
        return io.NodeOutput(_shifted(model, exponent), ui=ui.PreviewText(report))


def _check_settings(steps, guidance, denoise, mu):
    """True, or what is wrong with a setting; a linked one is not known yet and checked later."""
    try:
        if guidance is not None:
            check_guidance(guidance)
        sigma_schedule(
            1 if steps is None else steps,
            TURBO_MU if mu is None else mu,
            1.0 if denoise is None else denoise,
        )
    except ValueError as error:
        return str(error)
    return True
