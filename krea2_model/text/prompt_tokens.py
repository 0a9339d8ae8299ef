"""A prompt laid out for the text encoder: the template, images, the words, and their weights.

The one place where a prompt becomes tokens, for the pipeline and for ComfyUI's CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .prompt_images import (
    IMAGE_PAD,
    Grid,
    PromptImage,
    check_no_pads,
    expand_image_tokens,
    grid_of,
    image_text,
    image_weights,
)
from .prompt_weights import WeightedPrompt, parse_weights, plain_prompt, token_weights
from .tokenizer import PREFIX_TOKENS, Krea2Tokenizer


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of one prompt in Krea 2's template.

    ids: the template's prefix, the images with one pad each, the prompt, the suffix.
    images: in their order, at the size that the vision tower reads.
    weights: one per token of `expanded_ids` after the prefix; None where all are 1.
    """

    ids: list[int]
    images: tuple[PromptImage, ...] = ()
    weights: tuple[float, ...] | None = None

    @cached_property
    def grids(self) -> list[Grid]:
        """Rows and columns of each image's tokens."""
        return [grid_of(image.pixels) for image in self.images]

    @cached_property
    def expanded_ids(self) -> list[int]:
        """The ids with each pad repeated for all tokens of its image."""
        return expand_image_tokens(self.ids, self.grids) if self.images else self.ids

    @property
    def weight_row(self) -> Sequence[float]:
        """The weights, also where all are 1."""
        return self.weights or [1.0] * (len(self.expanded_ids) - PREFIX_TOKENS)

    @property
    def image_slices(self) -> list[slice]:
        """The tokens of each image, counted from the end of the prefix."""
        slices, start = [], 0
        for rows, columns in self.grids:
            start = self.expanded_ids.index(IMAGE_PAD, start)
            stop = start + rows * columns
            slices.append(slice(start - PREFIX_TOKENS, stop - PREFIX_TOKENS))
            start = stop
        return slices


def tokenize_prompt(
    tokenizer: Krea2Tokenizer,
    prompt: str,
    *,
    images: Sequence[PromptImage] = (),
    labels: bool = True,
    weighted: bool = False,
    max_sequence_length: int | None = None,
) -> PromptTokens:
    """Lay out a prompt with images in front of it.

    images: at the size that the vision tower reads; their strengths become weights.
    labels: number the images, `Picture 1: `.
    weighted: read `(word:1.3)` as a weight, see `prompt_weights`; else brackets are text.
    max_sequence_length: see `Krea2Tokenizer.tokenize`.

    Raises ValueError for bad weights, for images in a prompt that names the image token itself,
    and as `Krea2Tokenizer.tokenize` does.
    """
    marked = parse_weights(prompt) if weighted else None
    text = prompt if marked is None else marked.text
    if images:
        check_no_pads(text)
    front_text = image_text([image.role for image in images], labels)
    ids = tokenizer.tokenize(text, max_sequence_length, front_text)
    weights = None
    if any(image.strength != 1 for image in images) or (marked and marked.is_weighted):
        prompt_weights = marked or plain_prompt(text)
        values = weigh_tokens(
            tokenizer,
            prompt_weights,
            images=images,
            labels=labels,
            max_sequence_length=max_sequence_length,
        )
        # A weighted word may have been cut.
        weights = tuple(values) if any(value != 1 for value in values) else None
    return PromptTokens(ids, tuple(images), weights)


def weigh_tokens(
    tokenizer: Krea2Tokenizer,
    prompt: WeightedPrompt,
    *,
    images: Sequence[PromptImage] = (),
    labels: bool = True,
    max_sequence_length: int | None = None,
) -> list[float]:
    """Weights of a prompt's tokens after the prefix, images expanded; see `tokenize_prompt`."""
    front_text = image_text([image.role for image in images], labels)
    grids = [grid_of(image.pixels) for image in images]
    weights = image_weights(tokenizer.front(front_text), grids, images)
    return weights + token_weights(
        prompt, tokenizer.spans(prompt.text, max_sequence_length, front_text)
    )


def stack_weights(rows: Sequence[Sequence[float]]) -> Tensor | None:
    """Weights (B, L) of rows of token weights, 1 for padding; None where all are 1."""
    if all(weight == 1 for row in rows for weight in row):
        return None
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[1.0] * (longest - len(row))] for row in rows])
