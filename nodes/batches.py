"""Many at once: a prompt an image in one batch, and the pictures side by side."""

import torch
from comfy_api.latest import io

from ..krea2_model.checks import check_finite, counted
from ..krea2_model.images.contact_sheet import contact_sheet
from ..krea2_model.text.wildcards import fill_in
from . import inputs
from .prompts import encode

MAX_IMAGES = 4096


class K2PromptBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2PromptBatch",
            display_name="Krea 2 Prompt Batch",
            category="Krea 2",
            description=(
                "Encodes many prompts, one per line, as one batch: each image gets its own prompt. "
                "Wildcards are drawn again for each image."
            ),
            search_aliases=inputs.aliases("prompts, wildcard, list, xy plot"),
            inputs=[
                inputs.CLIP,
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip=(
                        "One prompt per line. From words in braces separated by bars, one is "
                        "picked at random."
                    ),
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    tooltip="Negative prompt for all images; no effect at guidance 0.",
                ),
                io.Int.Input(
                    "images_per_prompt",
                    default=1,
                    min=1,
                    max=MAX_IMAGES,
                    tooltip="Number of images per line, one after the other.",
                ),
                inputs.seed(
                    "Seed for the wildcards: image i of the batch uses seed + i.",
                    "wildcard_seed",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The encoded prompts, as a batch."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The encoded negative prompt, for all images.",
                ),
                io.Int.Output(
                    display_name="count",
                    tooltip="Number of images; connect it to batch of Krea 2 Size.",
                ),
                io.String.Output(
                    display_name="prompts",
                    tooltip="Each image's prompt, one per line, for Krea 2 Contact Sheet.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, prompts, negative="", images_per_prompt=1, wildcard_seed=0):
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("prompts is empty; expected at least one line with a prompt.")
        count = len(lines) * images_per_prompt
        if not 1 <= count <= MAX_IMAGES:
            raise ValueError(
                f"{counted(len(lines), 'prompt')} with {counted(images_per_prompt, 'image')} each: "
                f"{count}; expected 1 to {MAX_IMAGES} images."
            )
        line_of_image = [line for line in lines for _ in range(images_per_prompt)]
        texts = [fill_in(line, wildcard_seed + index) for index, line in enumerate(line_of_image)]
        positive, encoded_negative = encode(clip, texts), encode(clip, [negative])
        return io.NodeOutput(positive, encoded_negative, count, "\n".join(texts))


class K2ContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2ContactSheet",
            display_name="Krea 2 Contact Sheet",
            category="Krea 2",
            description="Arranges the images of one or more batches on one sheet with captions.",
            search_aliases=inputs.aliases("grid, contact sheet, captions, xy plot"),
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A batch, or a list of batches of any size."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One caption per line, in the order of the images.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=MAX_IMAGES,
                    tooltip="Images per row; 0 makes the sheet about square.",
                ),
                io.Int.Input(
                    "cell",
                    default=512,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip=(
                        "Longest side of an image on the sheet, in pixels; images are not enlarged."
                    ),
                ),
                io.Int.Input(
                    "text_size",
                    default=16,
                    min=4,
                    max=256,
                    tooltip="Height of the captions, in px.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The sheet.")],
        )

    @classmethod
    def execute(cls, images, captions=("",), columns=(0,), cell=(512,), text_size=(16,)):
        pictures = [image for batch in images for image in batch]
        for number, picture in enumerate(pictures, 1):
            check_finite(picture, f"Image {number}")
        sheet = contact_sheet(
            [picture.cpu().numpy() for picture in pictures],
            [line for text in captions for line in text.splitlines()],
            columns=columns[0],
            cell=cell[0],
            text_size=text_size[0],
        )
        return io.NodeOutput(torch.from_numpy(sheet)[None])
