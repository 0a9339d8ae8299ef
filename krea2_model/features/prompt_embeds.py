"""Encoded prompts, before the transformer fuses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lora.live import live_loras_of_text
from ..text.encoder import Qwen3VLTextEncoder
from ..text.layer_weights import weigh_taps
from ..text.prompt_images import PromptImage
from ..text.prompt_tokens import stack_weights, tokenize_prompt
from ..transformer.model import Krea2Transformer
from ..transformer.text_attention import TextStates
from .run_features import RunFeatures


@dataclass(frozen=True)
class PromptEmbeds:
    """Taps (B, L, taps, D) of prompts, with mask (B, L) bool and token weights (B, L), or None.

    Raises ValueError where the mask is not of the taps' size.
    """

    taps: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self):
        if self.mask is not None and self.mask.shape != self.taps.shape[:2]:
            raise ValueError(
                f"The mask has shape {tuple(self.mask.shape)}; expected "
                f"{tuple(self.taps.shape[:2])}, the first two sizes of the embeddings it belongs "
                "to."
            )

    def with_layer_weights(self, weights: Sequence[float] | None) -> PromptEmbeds:
        """Taps scaled by a weight for each tapped layer; None leaves them as they are."""
        return self if weights is None else replace(self, taps=weigh_taps(self.taps, weights))

    def rows(self, numbers: Sequence[int]) -> PromptEmbeds:
        """The prompts of these numbers, from 0, in this order; a number may come twice."""

        def of(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[list(numbers)]

        return PromptEmbeds(self.taps[list(numbers)], of(self.mask), of(self.weights))

    def unfused(self) -> TextStates:
        """The text of one prompt as features of a run hold it until it is fused."""
        return TextStates(self.taps, self.mask, self.weights)

    def fuse(self, transformer: Krea2Transformer, repeats: int = 1) -> TextStates:
        """Fused text on the transformer's device, each prompt `repeats` times."""
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


class StepTexts:
    """Fused text of each step of a run: LoRAs that change the fusion may act in some steps.

    repeats: see `PromptEmbeds.fuse`.
    """

    def __init__(
        self,
        prompt: PromptEmbeds,
        transformer: Krea2Transformer,
        repeats: int,
        features: RunFeatures,
    ):
        self._prompt, self._transformer, self._repeats = prompt, transformer, repeats
        self._features = features
        self._texts: dict[tuple, TextStates] = {}

    def __call__(self, sigma: float) -> TextStates:
        """The text of a step that begins at a sigma."""
        uses = self._features.uses_on_all_text(sigma)
        key = tuple((id(use.lora), use.strength) for use in uses)
        if key not in self._texts:
            with live_loras_of_text(self._transformer, uses):
                self._texts[key] = self._prompt.fuse(self._transformer, self._repeats)
        return self._texts[key]


def stack_embeds(rows: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """Prompts of any lengths as one batch, padded at the end."""
    longest = max(row.taps.shape[1] for row in rows)

    def padded(part: Tensor, value: float) -> Tensor:
        sides = (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])
        return F.pad(part, sides, value=value)

    masks = [
        row.taps.new_ones(row.taps.shape[:2], dtype=torch.bool) if row.mask is None else row.mask
        for row in rows
    ]
    weights = None
    if any(row.weights is not None for row in rows):
        ones = [row.taps.new_ones(row.taps.shape[:2], dtype=torch.float32) for row in rows]
        pairs = zip(rows, ones, strict=True)
        weights = torch.cat(
            [padded(one if row.weights is None else row.weights, 1) for row, one in pairs]
        )
    mask = torch.cat([padded(mask.bool(), False) for mask in masks])
    return PromptEmbeds(
        torch.cat([padded(row.taps, 0) for row in rows]),
        None if bool(mask.all()) else mask,
        weights,
    )


def encode_prompts(
    encoder: Qwen3VLTextEncoder,
    prompts: Sequence[str],
    *,
    images: Sequence[PromptImage] = (),
    labels: bool = True,
    weighted: bool = False,
    max_sequence_length: int | None = None,
) -> PromptEmbeds:
    """Encode prompts, each with the same images in front; arguments of `tokenize_prompt`."""
    tokens = [
        tokenize_prompt(
            encoder.get_tokenizer(),
            prompt,
            images=images,
            labels=labels,
            weighted=weighted,
            max_sequence_length=max_sequence_length,
        )
        for prompt in prompts
    ]
    taps, mask = encoder.encode_tokens(tokens)
    return PromptEmbeds(taps, mask, stack_weights([prompt.weight_row for prompt in tokens]))
