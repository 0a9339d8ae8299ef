"""Inputs that several nodes share, and the limits of a schema.

ComfyUI does not check numbers that a node's `validate_inputs` names, nor those that come through a
link, against the schema: `check_limits` and `verdict` do.
"""

import math
from typing import cast

import comfy.samplers
from comfy_api.latest import io

from ..krea2_model.config import PRESETS
from ..krea2_model.images.sizes import MAX_SIZE, MULTIPLE
from ..krea2_model.schedule import MAX_GUIDANCE, MAX_SEED
from ..krea2_model.text.prompt_images import MAX_IMAGES, MAX_SIDE
from .reports import settings_report

# Choices of preset and shift.
AUTO, CUSTOM = "auto", "custom"
BY_SIZE, FIXED = "by size", "fixed"

TURBO_MU = cast(float, PRESETS["turbo"].mu)

# Key of an input's options, beside its tooltip: the settings that each choice means, as text. The
# page (web/js/settings.js) shows them on the sampler before a run.
SETTINGS = "krea2_settings"

# The highest max_side, max_tokens, and distance in pixels.
MAX_MAX_SIDE = 2048
MAX_TOKENS = 100_000
MAX_PIXELS = 1024


def aliases(words: str) -> list[str]:
    """Search words of a node: those of all nodes, then `words`, with commas between them."""
    return ["krea", "krea2", "k2", *words.split(", ")]


MODEL = io.Model.Input("model", tooltip="Krea 2, Raw or Turbo.")
VAE = io.Vae.Input("vae", tooltip="The VAE.")
CLIP = io.Clip.Input("clip", tooltip="The text encoder.")
VISION_CLIP = io.Clip.Input(
    "clip",
    tooltip="The text encoder from a Krea 2 loader; its file must contain the vision tower.",
)
POSITIVE = io.Conditioning.Input("positive", tooltip="The encoded prompt.")


NEGATIVE = io.Conditioning.Input(
    "negative", optional=True, tooltip="Negative prompt; required when guidance is above 0."
)


def prompt(tooltip: str):
    return io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip=tooltip)


def negative_prompt(
    tooltip="Negative prompt: what the image should not show. No effect at guidance 0 (Turbo).",
):
    return io.String.Input(
        "negative", multiline=True, dynamic_prompts=True, default="", tooltip=tooltip
    )


def images(tooltip: str, first: int = 1):
    """image_1 to image_8, or from a later one, all optional."""
    names = (f"image_{number}" for number in range(first, MAX_IMAGES + 1))
    return [io.Image.Input(name, optional=True, tooltip=tooltip) for name in names]


def max_side(tooltip: str, advanced: bool | None = None, default: int = MAX_SIDE):
    return io.Int.Input(
        "max_side",
        default=default,
        min=32,
        max=MAX_MAX_SIDE,
        step=32,
        advanced=advanced,
        tooltip=tooltip,
    )


def official_length(tooltip: str, optional: bool = False):
    return io.Boolean.Input(
        "official_length", default=False, optional=optional, advanced=True, tooltip=tooltip
    )


def max_tokens(tooltip: str):
    return io.Int.Input(
        "max_tokens",
        default=0,
        min=0,
        max=MAX_TOKENS,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


WEIGHTS = io.Boolean.Input(
    "weights",
    default=True,
    optional=True,
    advanced=True,
    tooltip=(
        "Read (word:1.3) as a prompt weight: above 1 strengthens the words, below 1 weakens them, "
        "0 removes their effect, and negative values push the image away from them. When off, "
        "brackets are plain text."
    ),
)


def seed(tooltip: str, name: str = "seed"):
    return io.Int.Input(
        name, default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip
    )


PRESET = io.Combo.Input(
    "preset",
    options=[AUTO, *PRESETS, CUSTOM],
    default=AUTO,
    tooltip=(
        "Steps and guidance: auto uses the checkpoint's settings, raw is 28 steps at guidance 4.5, "
        "turbo 8 steps at 0, custom uses the values below. The node shows the values used."
    ),
    extra_dict={SETTINGS: {name: settings_report(preset) for name, preset in PRESETS.items()}},
)
STEPS = io.Int.Input(
    "steps", default=28, min=1, max=1000, tooltip="Number of steps, for preset custom only."
)


def guidance(default: float, tooltip: str, lowest: float = 0.0, advanced: bool | None = None):
    return io.Float.Input(
        "guidance",
        default=default,
        min=lowest,
        max=MAX_GUIDANCE,
        step=0.1,
        round=0.01,
        advanced=advanced,
        tooltip=tooltip,
    )


GUIDANCE = guidance(
    4.5,
    "Classifier-free guidance scale in Krea's convention, for preset custom only: 0 is off, "
    "ComfyUI cfg = guidance + 1.",
)
DENOISE = io.Float.Input(
    "denoise",
    default=1.0,
    min=0.01,
    max=1.0,
    step=0.01,
    tooltip=(
        "Denoising strength: 1 starts from pure noise, lower values keep more of the latent image."
    ),
)
START_SIGMA = io.Float.Input(
    "start_sigma",
    default=0.0,
    min=0.0,
    max=1.0,
    step=0.001,
    round=False,
    optional=True,
    advanced=True,
    tooltip=(
        "Sigma to start from, instead of denoise: 1 is pure noise, 0 uses denoise. The same sigma "
        "adds the same noise at every size and shift."
    ),
)


def shift(advanced: bool = True):
    return io.Combo.Input(
        "shift",
        options=[AUTO, BY_SIZE, FIXED],
        default=AUTO,
        advanced=advanced,
        tooltip=(
            "Time shift of the schedule: auto is the preset's (fixed 1.15 for Turbo, by size for "
            "Raw, as Krea trained them), fixed uses mu below."
        ),
    )


SAMPLER = io.Combo.Input(
    "sampler",
    options=list(comfy.samplers.KSampler.SAMPLERS),
    default="euler",
    advanced=True,
    tooltip="One of ComfyUI's samplers; Krea uses euler.",
)
MU = io.Float.Input(
    "mu",
    default=TURBO_MU,
    min=-10.0,
    max=10.0,
    step=0.01,
    advanced=True,
    tooltip="Exponent of the shift, for shift fixed. Raw at 1024 x 1024 uses 0.90625.",
)


def window(name: str, default: float, tooltip: str, advanced: bool | None = None):
    """start or end of a part of the run, in the schedule's time."""
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, advanced=advanced, tooltip=tooltip
    )


def width_and_height(tooltip: str):
    """tooltip: {side} is the name of either."""
    return [
        io.Int.Input(
            side,
            default=1024,
            min=MULTIPLE,
            max=MAX_SIZE,
            step=MULTIPLE,
            tooltip=tooltip.format(side=side),
        )
        for side in ("width", "height")
    ]


def megapixels(
    tooltip: str,
    lowest: float = 0.0,
    step: float = 0.05,
    advanced: bool | None = None,
    default: float = 1.0,
):
    return io.Float.Input(
        "megapixels",
        default=default,
        min=lowest,
        max=16.0,
        step=step,
        advanced=advanced,
        tooltip=tooltip,
    )


def feather(tooltip: str, default: int = 8, highest: int = MAX_PIXELS):
    return io.Int.Input("feather", default=default, min=0, max=highest, tooltip=tooltip)


def limit_error(node, **values) -> str | None:
    """The error for the first value of another type than its input's or outside its limits.

    node: the node's class. values: by input id; None for a linked input, not known yet.
    """
    # Not GET_SCHEMA, which writes to the class: ComfyUI runs nodes on a locked copy of it.
    for entry in node.define_schema().inputs:
        value = values.get(entry.id)
        if value is None:
            continue
        if isinstance(entry, io.String.Input) and not isinstance(value, str):
            return f"{entry.id} is {value!r:.80}; expected a text."
        if isinstance(entry, io.Combo.Input) and entry.options and value not in entry.options:
            return f"{entry.id} is {value!r:.80}; expected one of {', '.join(entry.options)}."
        low, high = (getattr(entry, limit, None) for limit in ("min", "max"))
        if low is None and high is None:
            continue
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        is_whole = isinstance(entry, io.Int.Input)
        kinds = int if is_whole else (int, float)
        if not isinstance(value, kinds) or not low <= value <= high:  # NaN too
            kind = "a whole number" if is_whole else "a number"
            return f"{entry.id} is {value!r:.80}; expected {kind} from {low} to {high}."
    return None


def check_limits(node, **values) -> None:
    """Raise ValueError for a value of another type than its input's, or outside its limits."""
    if (error := limit_error(node, **values)) is not None:
        raise ValueError(error)


def verdict(node, check, **values):
    """The result of `validate_inputs`: True, or an error message.

    check: raises ValueError; called first, since its messages say more than a limit.
    """
    try:
        check()
    except ValueError as error:
        return str(error)
    return limit_error(node, **values) or True
