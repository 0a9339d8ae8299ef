"""Prompts as the text encoder gives them, before the transformer fuses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .images.pictures import Picture, pixels_of
from .images.resize import on_white
from .text.encoder import Qwen3VLTextEncoder
from .text.layer_weights import weigh_taps
from .text.prompt_images import MAX_SIDE, PromptImage, grid_of, image_text, image_weights
from .text.prompt_weights import parse_weights, plain_prompt, token_weights
from .text.vision import resize_for_tower
from .transformer.model import Krea2Transformer
from .transformer.text_attention import TextStates


@dataclass(frozen=True)
class PromptTaps:
    """Taps (B, L, taps, D), their mask (B, L) bool and weights (B, L) of tokens, each or None."""

    taps: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None

    def weighed(self, tap_weights: Sequence[float] | None) -> PromptTaps:
        """With weights of the encoder's layers; None leaves them as they are."""
        if tap_weights is None:
            return self
        return replace(self, taps=weigh_taps(self.taps, tap_weights))

    def fused(self, transformer: Krea2Transformer, repeats: int) -> TextStates:
        """Fused text, its mask and weights, on the transformer's device, each `repeats` times."""
        device = next(transformer.parameters()).device
        mask = None if self.mask is None else self.mask.to(device).bool()
        if mask is not None and mask.all():
            mask = None
        text = transformer.fuse_text(self.taps.to(device), mask)
        weights = None if self.weights is None else self.weights.to(device)

        def repeated(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.repeat_interleave(repeats, dim=0)

        states = text.repeat_interleave(repeats, dim=0)
        return TextStates(states, repeated(mask), repeated(weights))


def given_taps(taps: Tensor, mask: Tensor | None) -> PromptTaps:
    """Taps that a caller encoded. Raises ValueError where the mask does not belong to them."""
    if mask is not None and mask.shape != taps.shape[:2]:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}; expected {tuple(taps.shape[:2])}, the "
            "first two sizes of the embeddings it belongs to."
        )
    return PromptTaps(taps, mask)


def encode_prompts(
    encoder: Qwen3VLTextEncoder,
    prompts: Sequence[str],
    max_sequence_length: int | None,
    weighted: bool,
    images: Sequence[PromptImage] = (),
    labels: bool = True,
) -> PromptTaps:
    """Taps of prompts, each behind the same images; weighted: read `(word:1.3)` as weights."""
    read = parse_weights if weighted else plain_prompt
    marked = [read(prompt) for prompt in prompts]
    taps, mask = encoder.encode(
        [prompt.text for prompt in marked],
        max_sequence_length=max_sequence_length,
        images=[images] * len(marked),
        labels=labels,
        max_side=max((max(image.pixels.shape) for image in images), default=MAX_SIDE),
    )
    tokenizer = encoder.tokenizer
    assert tokenizer is not None  # or encode had raised
    weights = None
    if images or any(prompt.is_weighted for prompt in marked):
        before = image_text([image.role for image in images], labels)
        front = image_weights(tokenizer.front(before), [grid_of(i.pixels) for i in images], images)
        weights = token_weights(marked, tokenizer, max_sequence_length, before, front)
    return PromptTaps(taps, mask, weights)


def resized_prompt_image(image: PromptImage | Picture, max_side: int) -> PromptImage:
    """An image of a prompt at the size the vision tower sees it."""
    if not isinstance(image, PromptImage):
        image = PromptImage(pixels_of(image, "an entry of images"))
    return replace(image, pixels=resize_for_tower(on_white(image.pixels), max_side))
