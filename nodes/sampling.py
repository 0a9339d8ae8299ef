"""Sampling: Krea 2's schedule and guidance on ComfyUI's samplers."""

from comfy_api.latest import io, ui

from ..krea2_model.config import PRESETS, Preset
from ..krea2_model.images.sizes import check_size, image_tokens, round_size
from ..krea2_model.schedule import check_guidance, sigma_schedule
from ..krea2_model.transformer.patches import token_count
from . import inputs
from .inputs import AUTO, CUSTOM, TURBO_MU, check_limits, verdict
from .managed.core_model import unknown_to
from .prepared_run import prepare
from .reports import (
    sampling_report,
    shift_report,
    size_report,
    unknown_report,
    unused_negative_report,
    unused_report,
)
from .sampler_run import (
    ONE_EACH,
    ONE_STREAM,
    check_mask,
    check_model,
    check_negative,
    has_other_negative,
    latent_report,
    preset_of,
    schedule,
    shift_exponent,
    shifted,
    start_of,
    with_samples,
)


class K2Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Sampler",
            display_name="Krea 2 Sampler",
            category="Krea 2",
            description=(
                "Samples with the schedule and guidance Krea 2 was trained with, chosen from the "
                "checkpoint and the image size."
            ),
            search_aliases=inputs.aliases("turbo, raw, ksampler, image to image"),
            inputs=[
                inputs.MODEL,
                inputs.POSITIVE,
                inputs.NEGATIVE,
                io.Latent.Input(
                    "latent", tooltip="An empty latent, or an encoded image for image to image."
                ),
                inputs.PRESET,
                inputs.seed("Seed of the initial noise."),
                inputs.STEPS,
                inputs.GUIDANCE,
                inputs.DENOISE,
                inputs.SAMPLER,
                inputs.shift(),
                inputs.MU,
                io.Combo.Input(
                    "seeds",
                    options=[ONE_STREAM, ONE_EACH],
                    default=ONE_STREAM,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "For batches: one seed for the whole batch, as in ComfyUI, or seed + i for "
                        "image i, which matches the image this seed makes alone. Samplers that add "
                        "noise then run one image after the other."
                    ),
                ),
                inputs.START_SIGMA,
                io.Noise.Input(
                    "noise",
                    optional=True,
                    tooltip=(
                        "Noise in place of that of seed, from Krea 2 Vary, Krea 2 Walk or "
                        "RandomNoise; its own seed counts then."
                    ),
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The sampled latent, to be decoded.")],
        )

    @classmethod
    def validate_inputs(cls, steps=None, guidance=None, denoise=None, mu=None, start_sigma=None):
        values = {"steps": steps, "guidance": guidance, "denoise": denoise, "mu": mu}
        return verdict(cls, lambda: _check_settings(**values), **values, start_sigma=start_sigma)

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
        start_sigma=0.0,
        noise=None,
    ):
        check_model(model)
        numbers = {"steps": steps, "guidance": guidance, "denoise": denoise, "mu": mu}
        choices = {"preset": preset, "sampler": sampler, "shift": shift, "seeds": seeds}
        check_limits(cls, seed=seed, start_sigma=start_sigma, **numbers, **choices)
        check_mask(latent)
        settings = preset_of(model, preset, steps, guidance)
        check_negative(settings, preset, negative)
        run = prepare(model, latent, settings, denoise, sampler, shift, mu, start_sigma)
        samples = run.sample(positive, negative, seed, seeds, noise)
        report = [
            sampling_report(preset, settings, run.exponent, run.sigmas),
            latent_report(run.start),
        ]
        if run.far:
            report.append(run.far)
        if settings.guidance == 0 and negative is not None and not has_other_negative(model):
            report += filter(None, [unused_negative_report(negative)])
        if unknown := unknown_to(model, positive, negative):
            report.append(unknown_report(unknown))
        if start_sigma and denoise != 1:
            report.append(f"not used: denoise {denoise:g}\n(start_sigma is set)")
        values = Preset(CUSTOM, steps, guidance, None)
        # The defaults of the inputs are Raw's.
        if settings.name != CUSTOM and (unused := unused_report(settings, values, PRESETS["raw"])):
            report.append(unused)
        return io.NodeOutput(with_samples(latent, samples), ui=ui.PreviewText("\n".join(report)))


class K2Sigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Sigmas",
            display_name="Krea 2 Schedule",
            category="Krea 2",
            description=(
                "Krea 2's sigmas, for SamplerCustomAdvanced and similar nodes. Krea 2 Sampler "
                "computes them itself."
            ),
            search_aliases=inputs.aliases("turbo, raw, scheduler, sigmas"),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2; its checkpoint sets the values for auto."),
                io.Latent.Input("latent", tooltip="The latent to sample, for its size."),
                inputs.PRESET,
                inputs.STEPS,
                inputs.DENOISE,
                inputs.shift(),
                inputs.MU,
                inputs.START_SIGMA,
            ],
            outputs=[io.Sigmas.Output(tooltip="The sigmas, from noise down to 0.")],
        )

    @classmethod
    def validate_inputs(cls, steps=None, denoise=None, mu=None, start_sigma=None):
        values = {"steps": steps, "denoise": denoise, "mu": mu}
        return verdict(cls, lambda: _check_settings(**values), **values, start_sigma=start_sigma)

    @classmethod
    def execute(
        cls,
        model,
        latent,
        preset=AUTO,
        steps=28,
        denoise=1.0,
        shift=AUTO,
        mu=TURBO_MU,
        start_sigma=0.0,
    ):
        check_model(model)
        numbers = {"steps": steps, "denoise": denoise, "mu": mu, "start_sigma": start_sigma}
        check_limits(cls, preset=preset, shift=shift, **numbers)
        settings = preset_of(model, preset, steps)
        start = start_of(model, latent)
        exponent = shift_exponent(settings, shift, mu, token_count(start))
        sigmas = schedule(settings, exponent, denoise, start_sigma=start_sigma)
        report = sampling_report(preset, settings, exponent, sigmas, guided=False)
        return io.NodeOutput(sigmas, ui=ui.PreviewText(f"{report}\n{latent_report(start)}"))


class K2ModelSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2ModelSampling",
            display_name="Krea 2 Shift for Stock Samplers",
            category="Krea 2",
            description=(
                "Sets Krea 2's time shift for an image size, so that KSampler with scheduler "
                "simple follows the right schedule. Krea 2 Sampler does this itself."
            ),
            search_aliases=inputs.aliases("turbo, raw, model sampling, mu"),
            inputs=[
                inputs.MODEL,
                *inputs.width_and_height(
                    "The image's {side} in pixels, for example from Krea 2 Size."
                ),
                inputs.shift(advanced=False),
                inputs.MU,
            ],
            outputs=[io.Model.Output(tooltip="The model with the shift set.")],
        )

    @classmethod
    def validate_inputs(cls, width=None, height=None, mu=None):
        def check():
            for name, pixels in (("width", width), ("height", height)):
                if pixels is not None:
                    check_size(name, pixels)
            _check_settings(mu=mu)

        return verdict(cls, check, width=width, height=height, mu=mu)

    @classmethod
    def execute(cls, model, width=1024, height=1024, shift=AUTO, mu=TURBO_MU):
        check_model(model)
        check_limits(cls, width=width, height=height, mu=mu)
        # Without a known variant this has no mu; only shift auto asks for it.
        settings = preset_of(model, CUSTOM if shift != AUTO else AUTO)
        width, height = round_size("width", width), round_size("height", height)
        tokens = image_tokens(width, height)
        exponent = shift_exponent(settings, shift, mu, tokens)
        report = f"{shift_report(exponent)}\n{size_report(width, height, tokens)}"
        return io.NodeOutput(shifted(model, exponent), ui=ui.PreviewText(report))


def _check_settings(steps=None, guidance=None, denoise=None, mu=None):
    """Raise ValueError for a bad setting; a linked one is not known yet and checked later."""
    if guidance is not None:
        check_guidance(guidance)
    sigma_schedule(
        1 if steps is None else steps,
        TURBO_MU if mu is None else mu,
        1.0 if denoise is None else denoise,
    )
