"""Images to captions, written by the text encoder that is loaded anyway."""

from comfy_api.latest import io, ui

from ..krea2_model.text.describer import (
    CAPTION_LENGTHS,
    CREATIVITY,
    DESCRIBED_SIDE,
    describe,
)
from . import inputs
from .inputs import MAX_MAX_SIDE
from .managed.vision import resize_all
from .prompts import advised, check_clip
from .writer import NodeWriter

_REMEDY = (
    "Lower max_side, load a smaller file of the text encoder (fp8_scaled), or close what else uses "
    "the device."
)


class K2Describe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Describe",
            display_name="Describe an Image for Krea 2",
            category="Krea 2",
            description=(
                "Writes a caption of each image with the loaded text encoder, in the manner of the "
                "captions that Krea 2 was trained on. Needs the real text encoder: krea2-nano's "
                "cannot write."
            ),
            search_aliases=inputs.aliases(
                "caption, describe, interrogate, image to text, image to prompt, vlm, tag"
            ),
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "The text encoder from a Krea 2 loader; its file must hold the vision "
                        "tower and the last layer."
                    ),
                ),
                io.Image.Input(
                    "image", tooltip="The image to describe; each image of a batch gets a caption."
                ),
                io.Combo.Input(
                    "length",
                    options=list(CAPTION_LENGTHS),
                    default="long",
                    tooltip=(
                        "About 200, 90 or 25 words; style describes the look alone, and nothing "
                        "that is shown."
                    ),
                ),
                io.Float.Input(
                    "creativity",
                    default=CREATIVITY,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "0 always picks the most likely words, whatever the seed; higher values "
                        "are freer and less true to the image."
                    ),
                ),
                inputs.seed("Seed of every caption."),
                inputs.max_side(
                    "Larger images are shrunk to the area of a square with this side. 1024 is "
                    "1024 tokens; small lettering needs them.",
                    advanced=True,
                    default=DESCRIBED_SIDE,
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=(
                        "Goes on instead, where it is not empty, and nothing is written: paste a "
                        "caption here to change it."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(
                    "captions",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The captions as a list; connected nodes run once per caption.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip,
        image,
        length="long",
        creativity=CREATIVITY,
        seed=0,
        max_side=DESCRIBED_SIDE,
        caption="",
    ):
        check_clip(clip)
        if caption.strip():
            return io.NodeOutput([caption], ui=ui.PreviewText("off: the caption goes on as it is"))
        if not 32 <= max_side <= MAX_MAX_SIDE:
            raise ValueError(f"max_side is {max_side}; expected 32 to {MAX_MAX_SIDE}.")
        writer = NodeWriter(clip, cls.hidden.unique_id if cls.hidden else None)
        options = {"creativity": creativity, "seed": seed}
        with advised(_REMEDY):
            captions = [
                describe(writer.about(pixels), [length], **options)[0]
                for pixels in resize_all(image, max_side)
            ]
        return io.NodeOutput(captions, ui=ui.PreviewText("\n\n".join(captions)))
