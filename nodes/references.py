"""Reference images for the transformer to look at."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.images.pictures import reference_pixels
from ..krea2_model.images.resize import resize_and_crop
from ..krea2_model.transformer.references import SHARED_TIME, TIME_ZERO, ReferenceSettings
from . import inputs
from .inputs import check_limits, verdict
from .latents import given_vae
from .managed.references import add_references
from .managed.vision import pictures
from .reports import reference_report

# The method of each family of LoRAs; their weights do not tell it.
FAMILIES = {"edit and style LoRAs (time 0)": TIME_ZERO, "identity LoRAs (shared time)": SHARED_TIME}
KEEP_SHAPE, CROP, STRETCH = "keep its shape", "crop to the latent", "stretch to the latent"
FITS = (KEEP_SHAPE, CROP, STRETCH)


class K2Reference(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Reference",
            display_name="Krea 2 Reference",
            category="Krea 2",
            description=(
                "Adds a reference image that the model attends to while sampling. Needs a LoRA "
                "trained with references; chain several nodes for several images."
            ),
            search_aliases=inputs.aliases(
                "reference, reference latent, edit, style, identity, kontext, image prompt"
            ),
            inputs=[
                inputs.POSITIVE,
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "Also gets the reference, so that guidance does not push the image away "
                        "from it."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The Krea 2 VAE."),
                io.Image.Input(
                    "image", tooltip="The reference image; a batch adds all of its images."
                ),
                io.Combo.Input(
                    "family",
                    options=list(FAMILIES),
                    default=next(iter(FAMILIES)),
                    tooltip=(
                        "How the LoRA was trained: with references as clean images at time 0 "
                        "(ai-toolkit's edit and style LoRAs), or at the time of the current step "
                        "(identity LoRAs)."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip=(
                        "Attention strength of the reference: 1 is as trained, 0 leaves it out."
                    ),
                ),
                inputs.window(
                    "start",
                    0.0,
                    "Start percent of the schedule (0 to 1): the reference is used from here "
                    "on. A run at denoise 0.6 begins at 0.4.",
                    advanced=True,
                ),
                inputs.window(
                    "end",
                    1.0,
                    "End percent of the schedule (0 to 1): the reference is not used after this.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=KEEP_SHAPE,
                    advanced=True,
                    tooltip=(
                        "Resizing: keep the shape and shrink to the area below if larger, or crop "
                        "or stretch to the size of the latent."
                    ),
                ),
                inputs.megapixels(
                    "Maximum area, in units of 1024 x 1024 pixels. Twice the area means twice "
                    "the tokens and more than twice the time.",
                    lowest=0.01,
                    step=0.01,
                    advanced=True,
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The sampler's latent, for its size; needed when fit is crop or stretch."
                    ),
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=255,
                    advanced=True,
                    tooltip=(
                        "Position on the time axis of the rotary embedding; 0 takes the next free "
                        "one."
                    ),
                ),
                io.Boolean.Input(
                    "apart",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Cache the references' keys and values: computed once per run, so steps "
                        "are faster, but it takes memory. References then attend only to "
                        "themselves, so the image changes; works at time 0 only."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The conditioning with the reference."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The conditioning with the reference."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, strength=None, start=None, end=None, index=None):
        def check():
            ReferenceSettings(
                index or None,
                1.0 if strength is None else strength,
                0.0 if start is None else start,
                1.0 if end is None else end,
            )

        return verdict(cls, check, strength=strength, start=start, end=end, index=index)

    @classmethod
    def execute(
        cls,
        positive,
        vae,
        image,
        negative=None,
        family=next(iter(FAMILIES)),  # noqa: B008 - a constant
        strength=1.0,
        start=0.0,
        end=1.0,
        fit=KEEP_SHAPE,
        megapixels=1.0,
        latent=None,
        index=0,
        apart=False,
    ):
        settings = ReferenceSettings(index or None, strength, start, end)
        check_limits(cls, strength=strength, megapixels=megapixels)
        if family not in FAMILIES:
            raise ValueError(f"family is {family!r}; expected one of {', '.join(FAMILIES)}.")
        method = FAMILIES[family]
        if apart and method != TIME_ZERO:
            raise ValueError(
                f"apart caches references, which works at time 0 only; family is {family!r}. "
                f"Switch it off, or choose {next(iter(FAMILIES))}."
            )
        resized = _resized(image, fit, megapixels, latent)
        latents = [given_vae(vae).encode(picture[None]) for picture in resized]
        results = [
            conditioning and add_references(conditioning, latents, settings, method, apart)
            for conditioning in (positive, negative)
        ]
        report = [reference_report(p.shape[1], p.shape[0], strength) for p in resized]
        return io.NodeOutput(*results, ui=ui.PreviewText("\n".join(report)))


def _resized(image, fit: str, megapixels: float, latent):
    """The pictures (H, W, 3) of a batch at the size to encode."""
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; expected one of {', '.join(FITS)}.")
    if fit == KEEP_SHAPE:
        return [reference_pixels(picture, megapixels).movedim(0, -1) for picture in pictures(image)]
    images = torch.stack([picture.movedim(0, -1) for picture in pictures(image)])
    if latent is None:
        raise ValueError(
            f"fit is {fit!r} but latent is not connected. Connect the sampler's latent, or choose "
            f"{KEEP_SHAPE!r}."
        )
    height, width = (8 * side for side in latent["samples"].shape[-2:])
    mode = "crop" if fit == CROP else "stretch"
    return resize_and_crop(images, images[..., 0], width, height, mode)[0]
