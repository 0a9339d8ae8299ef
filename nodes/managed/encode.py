"""Prompts, with weights and images, to CONDITIONING."""

from ...krea2_model.text.prompt_images import PromptImage
from ...krea2_model.text.prompt_tokens import (
    PromptTokens,
    stack_weights,
    tokenize_prompt,
    weigh_tokens,
)
from ...krea2_model.text.prompt_weights import parse_weights
from ...krea2_model.text.tokenizer import PREFIX_TOKENS, SUFFIX_TOKENS, check_tokens
from .conditions import TOKEN_WEIGHTS
from .tokenizer import Krea2ClipTokenizer


def encode_prompts(clip, prompts: list[str], *, weighted: bool, **options):
    """Prompts to CONDITIONING, one for each image of a batch, by our CLIP or core's.

    weighted: read `(word:1.3)`; the sentence is encoded once, without the marks, and the weights of
    its tokens go with it. options: `max_sequence_length`, for our CLIP.
    """
    marked = [parse_weights(prompt) for prompt in prompts] if weighted else []
    texts = [prompt.text for prompt in marked] or list(prompts)
    tokens = clip.tokenize(texts[0] if len(texts) == 1 else texts, always_wrap=True, **options)
    check_tokens(_longest(tokens))  # core's CLIP does not
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if not any(prompt.is_weighted for prompt in marked):
        return conditioning
    # Core's CLIP has no tokenizer with spans, and never cuts.
    if isinstance(clip.tokenizer, Krea2ClipTokenizer):
        tokenizer, limit = clip.tokenizer.tokenizer, options.get("max_sequence_length")
    else:
        tokenizer, limit = Krea2ClipTokenizer().tokenizer, None
    rows = [weigh_tokens(tokenizer, prompt, max_sequence_length=limit) for prompt in marked]
    return _with_weights(conditioning, rows)


def count_tokens(clip, prompt: str) -> int:
    """Tokens of a prompt, of any length."""
    if isinstance(clip.tokenizer, Krea2ClipTokenizer):
        return clip.tokenizer.tokenizer.count(prompt)
    return _longest(clip.tokenize(prompt, always_wrap=True))


def _longest(tokens: dict) -> int:
    """Tokens of the longest of a CLIP's prompts."""
    rows = (len(row) for rows in tokens.values() for row in rows)
    return max(rows, default=0) - PREFIX_TOKENS - SUFFIX_TOKENS


def encode_with_images(
    clip, prompt: str, images: list[PromptImage], *, labels: bool, weighted: bool, **options
):
    """A prompt with images in front of it to CONDITIONING, by a CLIP of ours.

    images: in sizes that the tower takes (`vision.resize_all`), with strengths other than 0. A
        strength other than 1 becomes the weight of the image's tokens, like a word's.
    labels, weighted, options: see `tokenize_prompt`.

    Raises ValueError for another CLIP, and CheckpointError where its file has no vision tower.
    """
    layout = layout_with_images(clip, prompt, images, labels=labels, weighted=weighted, **options)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenizer.rows([layout]))
    return _with_weights(conditioning, [layout.weight_row])


def layout_with_images(clip, prompt: str, images: list[PromptImage], **options) -> PromptTokens:
    """The tokens of a prompt with images in front; arguments of `tokenize_prompt`.

    Raises ValueError for a CLIP that is not ours.
    """
    return tokenize_prompt(own_tokenizer(clip).tokenizer, prompt, images=images, **options)


def own_tokenizer(clip) -> Krea2ClipTokenizer:
    """The tokenizer of a CLIP of ours. Raises ValueError for another."""
    if not isinstance(clip.tokenizer, Krea2ClipTokenizer):
        raise ValueError(
            "clip is not from a Krea 2 loader of this pack; images in prompts need one. Connect "
            "Load Krea 2 or Load Krea 2 Text Encoder."
        )
    return clip.tokenizer


def _with_weights(conditioning, rows):
    """A CONDITIONING with the weights of its tokens; as it is where all are 1."""
    weights = stack_weights(rows)
    if weights is None:
        return conditioning
    return [[states, extra | {TOKEN_WEIGHTS: weights}] for states, extra in conditioning]
