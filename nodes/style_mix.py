"""Style of images to conditioning."""

from comfy_api.latest import io, ui

from ..krea2_model.images.pictures import reference_pixels
from ..krea2_model.text.prompt_images import MAX_IMAGES, MAX_SIDE, read_strengths
from ..krea2_model.text.style_mix import MAX_STRENGTH, shares_of
from ..krea2_model.transformer.references import TIME_ZERO, ReferenceSettings
from . import inputs
from .inputs import CUSTOM
from .latents import given_vae
from .managed.references import add_references
from .managed.style_mix import encode_style_mix, same_size
from .managed.vision import pictures
from .prompts import advised, check_clip, encode
from .reports import prompt_report

PROMPT, REFERENCES, BOTH = "prompt", "references", "prompt and references"
# Path of the images, labels, suppression. The LoRAs were trained with both paths and labels.
PRESETS = {
    "style-reference LoRA": (BOTH, True, 0.0),
    "no LoRA": (PROMPT, False, 1.0),
}

_REMEDY = (
    "Lower max_side, mix fewer images, load a smaller file of the text encoder (fp8_scaled), or "
    "close what else uses the device."
)


class K2StyleMix(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2StyleMix",
            display_name="Krea 2 Style Mix",
            category="Krea 2",
            description=(
                "Encodes a prompt in the style of one to eight images: the prompt is encoded after "
                "each image, and the results are averaged by weight. Made for style-reference "
                "LoRAs."
            ),
            search_aliases=inputs.aliases(
                "style, style transfer, style reference, moodboard, mood, ip adapter, image prompt"
            ),
            inputs=[
                inputs.VISION_CLIP,
                inputs.prompt("What the image should show."),
                io.Image.Input(
                    "image_1",
                    tooltip=(
                        "A style image; a batch adds all of its images. At most eight in total."
                    ),
                ),
                *inputs.images("Another style image, or a batch.", first=2),
                io.String.Input(
                    "shares",
                    default="",
                    tooltip=(
                        "Weight of each image, such as 2, 1: the first counts twice as much. "
                        "Images without a number use 1."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="Style strength: 0 is the plain prompt, 1 the full style.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default=next(iter(PRESETS)),
                    tooltip=(
                        "How the LoRA was trained: with labels, and images both in the prompt and "
                        "as references. Without a LoRA, images go into the prompt only; custom "
                        "uses the values below."
                    ),
                ),
                inputs.negative_prompt(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The Krea 2 VAE, to encode the images as references.",
                ),
                io.Combo.Input(
                    "through",
                    options=[PROMPT, REFERENCES, BOTH],
                    default=BOTH,
                    advanced=True,
                    tooltip=(
                        "For preset custom: use the images in the prompt (text encoder), as "
                        "references (transformer), or both."
                    ),
                ),
                io.Boolean.Input(
                    "labels",
                    default=True,
                    advanced=True,
                    tooltip=(
                        "For preset custom: write Picture 1: before the first image and so on."
                    ),
                ),
                io.Float.Input(
                    "suppression",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip=(
                        "For preset custom: averages out the content of the images and its place, "
                        "so that mostly the style stays; 1 is fully averaged."
                    ),
                ),
                inputs.max_side(
                    "Larger images are shrunk to the area of a square with this side for the "
                    "text encoder; LoRAs were trained with 384.",
                    advanced=True,
                ),
                inputs.megapixels(
                    "Maximum area of a reference, in units of 1024 x 1024 pixels.",
                    lowest=0.01,
                    step=0.01,
                    advanced=True,
                ),
                io.Boolean.Input(
                    "weights",
                    default=True,
                    advanced=True,
                    tooltip=(
                        "Read (word:1.3) as a prompt weight. When off, brackets are plain text."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The encoded prompt in this style."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The encoded negative prompt, with the same references.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip,
        prompt,
        shares="",
        strength=1.0,
        preset=next(iter(PRESETS)),  # noqa: B008 - a constant
        negative="",
        vae=None,
        through=BOTH,
        labels=True,
        suppression=0.0,
        max_side=MAX_SIDE,
        megapixels=1.0,
        weights=True,
        **images,
    ):
        check_clip(clip)
        if preset != CUSTOM:
            if preset not in PRESETS:
                raise ValueError(
                    f"preset is {preset!r}; expected one of {', '.join((*PRESETS, CUSTOM))}."
                )
            through, labels, suppression = PRESETS[preset]
        if through not in (PROMPT, REFERENCES, BOTH):
            raise ValueError(f"through is {through!r}; expected {PROMPT}, {REFERENCES} or {BOTH}.")
        if not 0 <= strength <= MAX_STRENGTH:
            raise ValueError(f"strength is {strength}; expected 0 (off) to {MAX_STRENGTH:g}.")
        batches = [images.get(f"image_{number}") for number in range(1, MAX_IMAGES + 1)]
        styles = pictures([batch for batch in batches if batch is not None])
        if not 1 <= len(styles) <= MAX_IMAGES:
            raise ValueError(
                f"There are {len(styles)} style images; expected 1 to {MAX_IMAGES}. Connect "
                "image_1, or take some out."
            )
        parts = shares_of(read_strengths(shares, len(styles)))
        # Images without a share are not encoded.
        styles = [style for style, part in zip(styles, parts, strict=True) if part]
        parts = [part for part in parts if part]
        if through != PROMPT and strength > 0 and vae is None:
            raise ValueError(
                f"The images are to be references (preset {preset}, through {through}) but vae is "
                "not connected. Connect the Krea 2 VAE, or choose preset custom and through prompt."
            )
        prompt = prompt.lstrip()
        plain = positive = encode(clip, [prompt], weights)
        if through != REFERENCES and strength > 0:
            with advised(_REMEDY):
                positive = encode_style_mix(
                    clip,
                    prompt,
                    plain,
                    same_size([style.cpu() for style in styles], max_side),
                    parts,
                    strength=strength,
                    suppression=suppression,
                    labels=labels,
                    weighted=weights,
                )
        encoded_negative = encode(clip, [negative], weights)
        if through != PROMPT and strength > 0:
            for latent, part in zip(_latents(vae, styles, megapixels), parts, strict=True):
                # All at one index, with strengths that add up: two equal images count as one.
                settings = ReferenceSettings(index=1, strength=strength * part)
                positive, encoded_negative = (
                    add_references(text, [latent], settings, TIME_ZERO)
                    for text in (positive, encoded_negative)
                )
        report = [prompt_report("prompt", plain)]
        report += [f"style {n}: {part:.0%}" for n, part in enumerate(parts, 1)]
        return io.NodeOutput(positive, encoded_negative, ui=ui.PreviewText("\n".join(report)))


def _latents(vae, styles, megapixels: float):
    for style in styles:
        yield given_vae(vae).encode(reference_pixels(style, megapixels).movedim(0, -1)[None])
