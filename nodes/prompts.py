"""Prompts to conditioning."""

from comfy_api.latest import io, ui

from ..krea2_model.text.tokenizer import OFFICIAL_LENGTH, SUFFIX_TOKENS
from . import inputs
from .inputs import MAX_TOKENS, check_limits
from .managed.encode import encode_prompts
from .managed.memory import advise
from .reports import prompt_report

_REMEDY = (
    "Shorten the prompt, load a smaller file of the text encoder (fp8_scaled), or close what else "
    "uses the device."
)


class K2TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TextEncode",
            display_name="Krea 2 Prompt",
            category="Krea 2",
            description=(
                "Encodes a prompt and a negative prompt with Krea 2's chat template. The negative "
                "prompt only has an effect when guidance is above 0 (Raw); you can leave it empty."
            ),
            search_aliases=inputs.aliases("prompt, text encode, qwen"),
            inputs=[
                inputs.CLIP,
                inputs.prompt(
                    "What the image should show. Full sentences work best, up to 507 tokens."
                ),
                inputs.negative_prompt(),
                inputs.official_length(
                    "Truncate prompts at the 507 tokens the model was trained with. When off, "
                    "longer prompts are used in full, with a warning in the log."
                ),
                inputs.max_tokens(
                    "Truncate prompts after this many tokens; 0 is no limit. Shorter prompts "
                    "make steps slightly faster."
                ),
                inputs.WEIGHTS,
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The encoded negative prompt."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt, negative="", official_length=False, max_tokens=0, weights=True):
        check_limits(cls, prompt=prompt, negative=negative, max_tokens=max_tokens)
        options = length_options(official_length, max_tokens)
        encoded = [encode(clip, [text], weights, **options) for text in (prompt, negative)]
        names = ("prompt", "negative") if negative else ("prompt",)
        counts = [prompt_report(name, result) for name, result in zip(names, encoded, strict=False)]
        return io.NodeOutput(*encoded, ui=ui.PreviewText("\n".join(counts)))


def length_options(official_length: bool, max_tokens: int) -> dict[str, int]:
    """Options of the CLIP's tokenizer for the length of prompts."""
    if not 0 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"max_tokens is {max_tokens}; expected 0 (all) to {MAX_TOKENS}.")
    limits = [OFFICIAL_LENGTH] if official_length else []
    if max_tokens:
        limits.append(max_tokens + SUFFIX_TOKENS)
    return {"max_sequence_length": min(limits)} if limits else {}


def check_clip(clip) -> None:
    """Raise ValueError for the empty CLIP of a checkpoint without a text encoder."""
    if clip is None:
        raise ValueError(
            "clip is empty: this checkpoint holds no text encoder. Connect Load Krea 2 Text "
            "Encoder."
        )


def encode(clip, prompts: list[str], weights: bool = True, **options):
    """Conditioning of a prompt, or of one for each image, in Krea 2's template.

    weights: read `(word:1.3)` as weights. options go to the CLIP's tokenizer.
    """
    check_clip(clip)
    with advised(_REMEDY):
        return encode_prompts(clip, prompts, weighted=weights, **options)


def advised(remedy: str):
    """A context that adds a remedy to the text encoder's out-of-memory error."""
    return advise("The text encoder", remedy)
