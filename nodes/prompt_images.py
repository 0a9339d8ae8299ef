"""Prompts with images to conditioning."""

import math

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..krea2_model.text.prompt_images import (
    MAX_IMAGES,
    MAX_SIDE,
    PromptImage,
    grid_of,
    nonzero_images,
    read_roles,
    read_strengths,
    sheet,
)
from . import inputs
from .inputs import MAX_MAX_SIDE
from .managed.encode import encode_with_images
from .managed.vision import resize_all
from .prompts import advised, check_clip, encode, length_options
from .reports import image_report, prompt_report

_REMEDY = (
    "Lower max_side, leave images out, load a smaller file of the text encoder (fp8_scaled), or "
    "close what else uses the device."
)


class K2TextEncodeImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TextEncodeImages",
            display_name="Krea 2 Prompt with Images",
            category="Krea 2",
            description=(
                "Encodes a prompt with up to eight images, which the text encoder reads before the "
                "text. Made for LoRAs trained on prompts with images (style, editing); Krea 2 "
                "itself was trained on text only."
            ),
            search_aliases=inputs.aliases(
                "prompt, image prompt, style reference, vision, edit, qwen vl, ip adapter"
            ),
            inputs=[
                inputs.VISION_CLIP,
                inputs.prompt(
                    "What the image should show. Refer to the images as Picture 1, Picture 2 "
                    "and so on."
                ),
                *inputs.images(
                    "An image for the prompt; a batch adds all of its images. At most eight in "
                    "total."
                ),
                inputs.negative_prompt(
                    "Negative prompt, text only. No effect at guidance 0 (Turbo)."
                ),
                io.Boolean.Input(
                    "labels",
                    default=True,
                    tooltip=(
                        "Write Picture 1: before the first image and so on, as LoRAs with image "
                        "prompts were trained. When off, images have no label."
                    ),
                ),
                inputs.max_side(
                    "Larger images are shrunk to the area of a square with this side; none is "
                    "enlarged. LoRAs were trained with 384, which is 144 tokens."
                ),
                io.String.Input(
                    "roles",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Role of each image, one per line, such as: the style.",
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    optional=True,
                    tooltip=(
                        "Strength of each image, such as 1, 0.5: 1 is unchanged, 0 leaves the "
                        "image out, 2 doubles its weight. Images without a number use 1."
                    ),
                ),
                inputs.official_length(
                    "Truncate the text at the 507 tokens the model was trained with; images do "
                    "not count. When off, longer texts are used in full, with a warning in the "
                    "log.",
                    optional=True,
                ),
                inputs.max_tokens(
                    "Truncate the text after this many tokens; images do not count, and 0 is "
                    "no limit."
                ),
                inputs.WEIGHTS,
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The encoded prompt with its images."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The encoded negative prompt."
                ),
                io.Image.Output(
                    display_name="seen",
                    tooltip=(
                        "The images as the text encoder received them, on grey. Without images, "
                        "nodes connected here do not run."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip,
        prompt,
        negative="",
        labels=True,
        max_side=MAX_SIDE,
        roles="",
        strengths="",
        official_length=False,
        max_tokens=0,
        weights=True,
        **images,
    ):
        check_clip(clip)
        if not 32 <= max_side <= MAX_MAX_SIDE:
            raise ValueError(f"max_side is {max_side}; expected 32 to {MAX_MAX_SIDE}.")
        options = length_options(official_length, max_tokens)
        batches = [images.get(f"image_{number}") for number in range(1, MAX_IMAGES + 1)]
        pixels = resize_all([batch for batch in batches if batch is not None], max_side)
        count = len(pixels)
        fields = zip(
            pixels, read_roles(roles, count), read_strengths(strengths, count), strict=True
        )
        all_images = [PromptImage(*each) for each in fields]
        used_images = nonzero_images(all_images)
        if used_images:
            with advised(_REMEDY):
                positive = encode_with_images(
                    clip, prompt, used_images, labels=labels, weighted=weights, **options
                )
        else:
            positive = encode(clip, [prompt], weights, **options)
        encoded_negative = encode(clip, [negative], weights, **options)
        tokens = [math.prod(grid_of(image.pixels)) for image in used_images]
        lines = [prompt_report("prompt", positive, sum(tokens))]
        lines += [image_report(n, image) for n, image in enumerate(all_images, start=1)]
        lines += [prompt_report("negative", encoded_negative)] if negative else []
        view = ExecutionBlocker(None)
        if used_images:
            view = sheet([image.pixels for image in used_images]).movedim(1, -1).contiguous().cpu()
        return io.NodeOutput(positive, encoded_negative, view, ui=ui.PreviewText("\n".join(lines)))
