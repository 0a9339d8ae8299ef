"""Style of pictures without a LoRA."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.features.style_transfer import MAX_STRENGTH, StyleSettings, style_shares
from ..krea2_model.features.styles import check_pictures, style_mask
from ..krea2_model.images.pictures import reference_pixels
from . import inputs
from .inputs import check_limits, verdict
from .latents import given_vae
from .managed.encode import encode_prompts
from .managed.styles import STYLES, Styles
from .managed.vision import pictures
from .reports import style_report
from .sampler_run import check_ours

_DEFAULTS = StyleSettings()


class K2StyleTransfer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2StyleTransfer",
            display_name="Krea 2 Style Transfer",
            category="Krea 2",
            description=(
                "Gives images the style of pictures (colours, texture, strokes) without a LoRA. "
                "The pictures are inverted along the run's own schedule, and the image attends to "
                "them."
            ),
            search_aliases=inputs.aliases(
                "style, style transfer, style aligned, ip adapter, reference, inversion, "
                "image prompt, look"
            ),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from a Krea 2 loader, Raw or Turbo."),
                io.Vae.Input("vae", tooltip="The Krea 2 VAE."),
                io.Image.Input(
                    "image", tooltip="The style picture; a batch gives several of one size."
                ),
                io.Float.Input(
                    "strength",
                    default=_DEFAULTS.strength,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip=(
                        "How strongly the image attends to the style; 0 is off. Lower it where "
                        "the prompt's layout suffers; with guidance (Raw) try 0.4."
                    ),
                ),
                inputs.window(
                    "start",
                    _DEFAULTS.start,
                    "Start percent of the schedule (0 to 1): the style acts from here on. A run "
                    "at denoise 0.6 begins at 0.4.",
                ),
                inputs.window(
                    "end",
                    _DEFAULTS.end,
                    "End percent of the schedule (0 to 1): the style stops here, and later steps "
                    "cost nothing extra. The last steps clean up edges.",
                ),
                *inputs.images(
                    "Another style picture, of any size; a batch gives several.", first=2
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip=(
                        "Weight of each style picture, such as: 2, 1. They are relative; empty "
                        "gives all the same."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where in the image the style acts, white, in the shape of the image; "
                        "without one, everywhere."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "The text encoder, for style_prompt. Without one the style pictures have "
                        "no text at all."
                    ),
                ),
                io.Float.Input(
                    "value_statistics",
                    default=_DEFAULTS.value_statistics,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip=(
                        "How far mean and deviation of the image's attention values move to the "
                        "style's: carries colours and contrast."
                    ),
                ),
                io.Float.Input(
                    "key_scale",
                    default=_DEFAULTS.key_scale,
                    min=0.5,
                    max=2.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Factor on the style's keys: higher takes more from the parts that "
                        "resemble the image, lower keeps more of the prompt's layout."
                    ),
                ),
                io.Float.Input(
                    "first_block",
                    default=_DEFAULTS.first_block,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="First block of the model with the style, as a fraction of its depth.",
                ),
                io.Float.Input(
                    "last_block",
                    default=_DEFAULTS.last_block,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="End of the blocks with the style, as a fraction of its depth.",
                ),
                inputs.megapixels(
                    "Maximum area of a style picture, in units of 1024 x 1024 pixels. A picture of "
                    "the image's size doubles the cost of a step.",
                    lowest=0.01,
                    step=0.01,
                    advanced=True,
                ),
                io.String.Input(
                    "style_prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Description of the style pictures; empty is mostly best.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the style, for any sampler.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        strength=None,
        start=None,
        end=None,
        value_statistics=None,
        key_scale=None,
        first_block=None,
        last_block=None,
    ):
        numbers = {name: value for name, value in locals().items() if name != "cls"}

        def check():
            # A linked end of a window may be any that fits the other one.
            widest = {"start": 0.0, "end": 1.0, "first_block": 0.0, "last_block": 1.0}
            known = {name: value for name, value in numbers.items() if value is not None}
            StyleSettings(**(widest | known))

        return verdict(cls, check, **numbers)

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image,
        strength=_DEFAULTS.strength,
        start=_DEFAULTS.start,
        end=_DEFAULTS.end,
        weights="",
        mask=None,
        clip=None,
        style_prompt="",
        value_statistics=_DEFAULTS.value_statistics,
        key_scale=_DEFAULTS.key_scale,
        first_block=_DEFAULTS.first_block,
        last_block=_DEFAULTS.last_block,
        megapixels=1.0,
        **images,
    ):
        settings = StyleSettings(
            strength, start, end, value_statistics, key_scale, first_block, last_block
        )
        check_limits(cls, megapixels=megapixels)
        _check_model(model)
        others = [images[name] for name in sorted(images) if images[name] is not None]
        shown = pictures([image, *others])
        check_pictures(shown)
        shares = style_shares(_weights(weights), len(shown))
        share_at = None if mask is None else style_mask(_one_mask(mask))
        if style_prompt.strip() and clip is None:
            raise ValueError(
                "style_prompt is set but clip is not connected. Connect the text encoder, or "
                "empty style_prompt."
            )
        vae = given_vae(vae)
        if settings.is_off:
            return io.NodeOutput(model, ui=ui.PreviewText("style: off"))
        resized = [reference_pixels(picture, megapixels) for picture in shown]
        latents = tuple(vae.encode(picture.movedim(0, -1)[None]) for picture in resized)
        text = None
        if clip is not None:
            text = encode_prompts(clip, [style_prompt], weighted=False)[0][0]
        styles = Styles(settings, latents, tuple(shares), share_at, text)
        model = model.clone()
        model.model_options["transformer_options"][STYLES] = styles
        report = style_report([(p.shape[2], p.shape[1]) for p in resized])
        return io.NodeOutput(model, ui=ui.PreviewText(report))


def _check_model(model) -> None:
    """Raise ValueError for a model that cannot take style pictures."""
    check_ours(model, "where style pictures have no effect")
    if STYLES in model.model_options["transformer_options"]:
        raise ValueError(
            "model has style pictures already. Connect all pictures to one Krea 2 Style Transfer, "
            "with weights."
        )


def _weights(text: str) -> list[float] | None:
    """Numbers of a text with commas between them; None for an empty text."""
    if not text.strip():
        return None
    try:
        return [float(part) for part in text.replace(";", ",").strip(" ,").split(",")]
    except ValueError:
        raise ValueError(
            f"weights is {text!r}; expected numbers with commas between them, one a style "
            "picture, such as: 2, 1."
        ) from None


def _one_mask(mask: torch.Tensor) -> torch.Tensor:
    """The mask (H, W) of a MASK. Raises ValueError for several."""
    if mask.ndim == 2:
        return mask
    if len(mask) != 1:
        raise ValueError(f"mask holds {len(mask)} masks; expected one, for all images of the run.")
    return mask[0]
