"""Prompts, with weights and images, to CONDITIONING."""

from ...krea2_model.text.prompt_images import (
    PromptImage,
    check_no_pads,
    grid_of,
    image_text,
    image_weights,
)
from ...krea2_model.text.prompt_weights import parse_weights, plain_prompt, token_weights
from .conditions import TOKEN_WEIGHTS
from .tokenizer import Krea2ClipTokenizer


def encode_prompts(clip, prompts: list[str], *, weighted: bool, **options):
    """Prompts to CONDITIONING, one for each image of a batch, by our CLIP or core's.

    weighted: read `(word:1.3)`; the sentence is encoded once, without the marks, and the weights of
    its tokens travel with the conditioning. options: `max_sequence_length`, for our CLIP.
    """
    marked = [parse_weights(prompt) for prompt in prompts] if weighted else []
    texts = [prompt.text for prompt in marked] or list(prompts)
    tokens = clip.tokenize(texts[0] if len(texts) == 1 else texts, always_wrap=True, **options)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if not any(prompt.is_weighted for prompt in marked):
        return conditioning
    ours = clip.tokenizer if isinstance(clip.tokenizer, Krea2ClipTokenizer) else None
    limit = options.get("max_sequence_length") if ours is not None else None
    weights = token_weights(marked, (ours or Krea2ClipTokenizer()).tokenizer, limit)
    if weights is None:  # all weighted words were cut
        return conditioning
    return [[states, extra | {TOKEN_WEIGHTS: weights}] for states, extra in conditioning]


def encode_with_images(
    clip, prompt: str, images: list[PromptImage], *, labels: bool, weighted: bool, **options
):
    """A prompt with images in front of it to CONDITIONING, by a CLIP of ours.

    images: in sizes that the tower takes (`vision.resize_all`), with strengths other than 0. A
        strength other than 1 becomes the weight of the image's tokens, like a word's.
    labels, weighted, options: see `prompt_images.image_text` and `encode_prompts`.

    Raises ValueError for another CLIP, and CheckpointError where its file has no vision tower.
    """
    if not isinstance(clip.tokenizer, Krea2ClipTokenizer):
        raise ValueError(
            "clip is not from a Krea 2 loader of this pack; images in prompts need one. Connect "
            "Load Krea 2 or Load Krea 2 Text Encoder."
        )
    marked = parse_weights(prompt) if weighted else plain_prompt(prompt)
    check_no_pads(marked.text)
    roles = [image.role for image in images]
    pixels = [image.pixels.movedim(0, -1)[None] for image in images]
    tokens = clip.tokenize(
        marked.text,
        always_wrap=True,
        as_trained=True,
        images=pixels,
        roles=roles,
        labels=labels,
        **options,
    )
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    tokenizer, prefix = clip.tokenizer.tokenizer, image_text(roles, labels)
    grids = [grid_of(image.pixels) for image in images]
    front = image_weights(tokenizer.front(prefix), grids, images)
    limit = options.get("max_sequence_length")
    weights = token_weights([marked], tokenizer, limit, prefix, front)
    if weights is None:
        return conditioning
    return [[states, extra | {TOKEN_WEIGHTS: weights}] for states, extra in conditioning]
