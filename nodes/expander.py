"""Short prompts to dense captions, written by the text encoder that is loaded anyway."""

import logging

from comfy_api.latest import io, ui

from ..krea2_model.text.expander import LENGTHS, MAX_VARIANTS, Expansion, expand
from . import inputs
from .prompts import check_clip
from .writer import NodeWriter


class K2PromptExpander(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2PromptExpander",
            display_name="Expand a Krea 2 Prompt",
            category="Krea 2",
            description=(
                "Expands a short prompt into a detailed caption, as Krea 2 was trained on, with "
                "the loaded text encoder. Checks quoted text and numbers. Needs the real text "
                "encoder: krea2-nano's cannot write."
            ),
            search_aliases=inputs.aliases(
                "expand, enhance, upsample, caption, llm, magic prompt, rewrite"
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder; it also writes the text."),
                inputs.prompt(
                    "What the image should show, in a few words. Text in quotation marks "
                    '("OPEN") and numbers must appear unchanged in the result.'
                ),
                io.Float.Input(
                    "creativity",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "0 always picks the most likely words, whatever the seed; 1 invents "
                        "freely. Sets the temperature (1.4 times the value), top-k, top-p and the "
                        "instructions."
                    ),
                ),
                io.Combo.Input(
                    "length",
                    options=list(LENGTHS),
                    default="medium",
                    tooltip=(
                        "Target length: about 60, 120 or 200 words. A longer prompt is not "
                        "shortened."
                    ),
                ),
                inputs.seed("Seed of the first variant; each further variant uses the next seed."),
                io.Int.Input(
                    "variants",
                    default=1,
                    min=1,
                    max=MAX_VARIANTS,
                    tooltip=(
                        "Number of different captions; each one makes its own image. From the "
                        "second on, the view, light or surroundings change."
                    ),
                ),
                io.String.Input(
                    "style",
                    default="",
                    optional=True,
                    tooltip="Style keywords, such as: watercolour, muted colours.",
                ),
                io.String.Input(
                    "language",
                    default="",
                    optional=True,
                    tooltip=(
                        "Language of the caption, such as English or Japanese; empty uses the "
                        "prompt's."
                    ),
                ),
                io.Boolean.Input(
                    "enabled",
                    default=True,
                    optional=True,
                    tooltip="When off, the prompt goes on as it is and nothing is written.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompts",
                    display_name="prompts",
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
        prompt,
        creativity=0.5,
        length="medium",
        seed=0,
        variants=1,
        style="",
        language="",
        enabled=True,
    ):
        check_clip(clip)
        if not enabled:
            return io.NodeOutput([prompt], ui=ui.PreviewText("off: the prompt goes on as it is"))
        writer = NodeWriter(clip, cls.hidden.unique_id if cls.hidden else None)
        expansions = expand(
            writer,
            prompt,
            creativity=creativity,
            length=length,
            seed=seed,
            variants=variants,
            style=style,
            language=language,
        )
        for expansion in expansions:
            if note := expansion.note():
                logging.warning("Krea 2 prompt expander: %s", note)
        texts = [expansion.text for expansion in expansions]
        return io.NodeOutput(texts, ui=ui.PreviewText(_report(expansions)))


def _report(expansions: list[Expansion]) -> str:
    return "\n\n".join(
        f"{expansion.text}\n[{expansion.note()}]" if expansion.note() else expansion.text
        for expansion in expansions
    )
