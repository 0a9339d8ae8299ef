"""Settings that change during a run: the guidance, and the checkpoint."""

from dataclasses import replace

import comfy.patcher_extension
import torch
from comfy_api.latest import io, ui

from ..krea2_model.config import PRESETS
from ..krea2_model.guidance import RAMPS, GuidanceSchedule, fraction_at, rescaled
from ..krea2_model.schedule import resolve_mu, two_stage_sigmas
from ..krea2_model.transformer.patches import token_count
from . import inputs
from .inputs import check_limits, verdict
from .sampler_run import (
    check_model,
    noise_for,
    sample,
    start_of,
    warn_of_size,
    with_samples,
)

TURBO = PRESETS["turbo"]


class K2GuidanceSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2GuidanceSchedule",
            display_name="Krea 2 Guidance Schedule",
            category="Krea 2",
            description=(
                "Limits guidance to a range of the schedule, ramps it, or rescales it. Steps "
                "outside the range skip the negative prompt, which halves their work."
            ),
            search_aliases=inputs.aliases("cfg, interval, rescale, ramp"),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 Raw, or Turbo with guidance on."),
                inputs.window(
                    "start",
                    0.0,
                    "Start percent of the schedule (0 to 1): guidance begins here, 0 is pure "
                    "noise. A run at denoise 0.6 begins at 0.4.",
                ),
                inputs.window(
                    "end", 1.0, "End percent of the schedule (0 to 1): guidance stops here."
                ),
                io.Combo.Input(
                    "ramp",
                    options=list(RAMPS),
                    default="constant",
                    tooltip=(
                        "Guidance inside the range: constant, rising from zero, falling to zero, "
                        "or highest in the middle."
                    ),
                ),
                io.Float.Input(
                    "rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Reduces the contrast that strong guidance adds (CFG rescale): 0 is off, "
                        "0.7 is strong."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, for any sampler with guidance.")],
        )

    @classmethod
    def validate_inputs(cls, start=None, end=None, rescale=None):
        def check():
            first, last = (0.0 if start is None else start), (1.0 if end is None else end)
            _schedule(first, last, rescale=rescale or 0.0)

        return verdict(cls, check, start=start, end=end, rescale=rescale)

    @classmethod
    def execute(cls, model, start=0.0, end=1.0, ramp="constant", rescale=0.0):
        check_model(model)
        schedule = _schedule(start, end, ramp, rescale)
        report = []
        if start > end:
            report.append(f"read as sigmas: {start:g} to {end:g}\n(start is after end)")
        model = model.clone()

        def predict(executor, x, timestep, model_options, seed):
            guider = executor.class_obj
            cfg = guider.cfg
            sigma_at = guider.inner_model.model_sampling.percent_to_sigma
            now = schedule
            if start > end:
                first, last = (fraction_at(sigma, sigma_at) for sigma in (start, end))
                now = replace(schedule, start=first, end=last)
            # At cfg 1 ComfyUI skips the negative.
            factor = now.factor(timestep.flatten()[0].item(), sigma_at)
            guider.cfg = 1.0 + (cfg - 1.0) * factor
            try:
                return executor(x, timestep, model_options, seed)
            finally:
                guider.cfg = cfg

        def rescale_velocity(args):
            x, sigma = args["input"], args["sigma"].flatten()[0]
            guided, conditional = (
                (x - args[name]) / sigma for name in ("denoised", "cond_denoised")
            )
            return x - sigma * rescaled(guided, conditional, schedule.rescale)

        if start > end or schedule != GuidanceSchedule(rescale=rescale):
            kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
            model.add_wrapper_with_key(kind, "krea2_guidance", predict)
        if rescale:
            model.set_model_sampler_post_cfg_function(rescale_velocity)
        preview = ui.PreviewText("\n".join(report)) if report else None
        return io.NodeOutput(model, ui=preview)


class K2TwoStage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TwoStage",
            display_name="Krea 2 Raw, then Turbo",
            category="Krea 2",
            description=(
                "Starts an image with Raw and guidance and finishes it with Turbo: Raw's variety "
                "between seeds and its negative prompt, with Turbo's finish."
            ),
            search_aliases=inputs.aliases("turbo, raw, two stage, variety"),
            inputs=[
                io.Model.Input("raw", tooltip="Krea 2 Raw, for the first steps."),
                io.Model.Input("turbo", tooltip="Krea 2 Turbo, for the last steps."),
                inputs.POSITIVE,
                io.Conditioning.Input(
                    "negative", tooltip="Negative prompt for Raw's guidance; may be empty."
                ),
                io.Latent.Input("latent", tooltip="An empty latent."),
                io.Int.Input(
                    "turbo_last",
                    default=5,
                    min=1,
                    max=TURBO.steps - 1,
                    tooltip=(
                        f"How many of Turbo's {TURBO.steps} steps finish the image. More leave "
                        "less to Raw; at 5 it goes down to sigma 0.84."
                    ),
                ),
                inputs.seed("Seed of the initial noise."),
                io.Int.Input(
                    "raw_steps",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Steps of a full Raw run, which stops early here; 0 uses the preset.",
                ),
                inputs.guidance(
                    -1.0,
                    "Raw's guidance in Krea's convention: ComfyUI cfg = guidance + 1. 0 is "
                    "off, -1 uses the preset.",
                    lowest=-1.0,
                    advanced=True,
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The sampled latent, to be decoded.")],
        )

    @classmethod
    def execute(
        cls,
        raw,
        turbo,
        positive,
        negative,
        latent,
        turbo_last=5,
        seed=0,
        raw_steps=0,
        guidance=-1.0,
    ):
        check_limits(cls, turbo_last=turbo_last, seed=seed, raw_steps=raw_steps, guidance=guidance)
        first, second = _preset(raw, "raw"), _preset(turbo, "turbo")
        if "noise_mask" in latent:
            raise ValueError(
                "The latent has a mask, which this node does not support. Connect an empty latent, "
                "or inpaint with Krea 2 Sampler."
            )
        start = start_of(raw, latent)
        far = warn_of_size(raw, start)
        tokens = token_count(start)
        mus = [resolve_mu(preset, tokens) for preset in (first, second)]
        raw_sigmas, turbo_sigmas = two_stage_sigmas(
            raw_steps or first.steps, mus[0], second.steps, mus[1], turbo_last
        )
        total = len(raw_sigmas) + len(turbo_sigmas) - 2
        guidance = first.guidance if guidance < 0 else guidance
        noise = noise_for(start, seed, latent)
        common = {"latent": latent, "seed": seed, "total": total}
        middle = sample(
            raw,
            positive,
            negative,
            start,
            noise,
            torch.tensor(raw_sigmas),
            guidance,
            mus[0],
            **common,
        )
        # No new noise: Turbo removes what Raw left in the latents.
        samples = sample(
            turbo,
            positive,
            None,
            middle,
            torch.zeros_like(noise),
            torch.tensor(turbo_sigmas),
            0.0,
            mus[1],
            before=len(raw_sigmas) - 1,
            **common,
        )
        return io.NodeOutput(with_samples(latent, samples), ui=ui.PreviewText(far) if far else None)


def _schedule(start: float, end: float, ramp: str = "constant", rescale: float = 0.0):
    """The settings of Krea 2 Guidance Schedule.

    Its first workflows hold sigmas, which fall while the schedule's time rises: their window is
    converted when the schedule is known.
    """
    if 1 >= start > end >= 0:
        start, end = 0.0, 1.0
    return GuidanceSchedule(start, end, ramp, rescale)


def _preset(model, name: str):
    """The preset of a checkpoint, which has to be `name` or unknown."""
    check_model(model)
    preset = getattr(model.model, "preset", None) or PRESETS[name]
    if preset.name != name:
        raise ValueError(
            f"{name} is a {preset.name.capitalize()} checkpoint; expected {name.capitalize()}. "
            "Raw begins with guidance and Turbo finishes: connect each to its input."
        )
    return preset
