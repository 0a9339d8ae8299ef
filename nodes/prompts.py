"""Prompts to conditioning."""

from comfy_api.latest import io, ui

from ..krea2_model.text.tokenizer import OFFICIAL_LENGTH, SUFFIX_TOKENS
from .managed.encode import encode_prompts
from .managed.memory import advise
from .reports import prompt_report

# What a prompt may be cut to; nobody writes longer ones.
MAX_TOKENS = 100_000

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
                "Encodes a prompt and a negative prompt in Krea 2's chat template. The negative "
                "counts only where guidance is above 0 (Raw); left empty it is the empty prompt."
            ),
            search_aliases=["krea", "krea2", "k2", "prompt", "text encode", "qwen"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the image shows. Whole sentences work best, up to 507 tokens.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What guidance leads away from; without effect at guidance 0 (Turbo).",
                ),
                io.Boolean.Input(
                    "official_length",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Cut prompts at the 507 tokens the model was trained with. Off, longer "
                        "ones are used whole, with a warning in the log."
                    ),
                ),
                io.Int.Input(
                    "max_tokens",
                    default=0,
                    min=0,
                    max=MAX_TOKENS,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Cut prompts after so many tokens, 0 for never: steps get faster and what "
                        "stands behind the cut is lost."
                    ),
                ),
                io.Boolean.Input(
                    "weights",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Read (word:1.3) as a weight: above 1 the words count more, below 1 less, "
                        "at 0 not at all, below 0 the picture avoids them. Off, brackets are text."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, encoded."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative, encoded."),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt, negative="", official_length=False, max_tokens=0, weights=True):
        options = length_options(official_length, max_tokens)
        encoded = [encode(clip, [text], weights, **options) for text in (prompt, negative)]
        names = ("prompt", "negative") if negative else ("prompt",)
        counts = [prompt_report(name, result) for name, result in zip(names, encoded, strict=False)]
        return io.NodeOutput(*encoded, ui=ui.PreviewText("\n".join(counts)))


def length_options(official_length: bool, max_tokens: int) -> dict[str, int]:
    """What the CLIP's tokenizer is told of the length of prompts."""
    if not 0 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"max_tokens is {max_tokens}; expected 0 (all) to {MAX_TOKENS}.")
    limits = [OFFICIAL_LENGTH] if official_length else []
    if max_tokens:
        limits.append(max_tokens + SUFFIX_TOKENS)
    return {"max_sequence_length": min(limits)} if limits else {}


def check_clip(clip) -> None:
    """Refuse the empty CLIP of a checkpoint without a text encoder."""
    if clip is None:
        raise ValueError(
            "clip is empty: this checkpoint holds no text encoder. Connect Load Krea 2 Text "
            "Encoder."
        )


def encode(clip, prompts: list[str], weights: bool = True, **options):
    """Conditioning of a prompt, or of one an image, in Krea 2's template.

    weights: read `(word:1.3)` as weights. options go to the CLIP's tokenizer.
    """
    check_clip(clip)
    with advised(_REMEDY):
        return encode_prompts(clip, prompts, weighted=weights, **options)


def advised(remedy: str):
    """A context in which the text encoder's running out of memory says what helps."""
    return advise("The text encoder", remedy)
