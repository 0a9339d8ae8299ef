"""Positive and negative text in one call of the transformer, so that weights are read once a step.

Texts of different length are padded: at the front, where attention then leaves out the padding of
each sequence, so an image is the same as alone; or at the end, where there is a mask anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.attention import Attend, attend
from ..nn.kernels import Span, norm_and_rotate
from .backend import TORCH_BACKEND, Backend
from .references import Reference
from .text_attention import TextStates

# Up to so many image tokens a call is faster shared, also where texts are padded
# (benchmarks/sharing.py): reading weights and starting kernels weigh more than the padding.
SMALL_IMAGE = 1024


def pays_to_share(image_tokens: int, lengths: Sequence[int], streams: bool) -> bool:
    """True if one call for texts of these lengths is faster than two.

    image_tokens: of all images of one text. streams: weights are copied to the device at each call.
    """
    return streams or image_tokens <= SMALL_IMAGE or min(lengths) == max(lengths)


def attend_past_padding(
    attention: Attend,
    padding: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_slice: Span | None = None,
) -> Tensor:
    """Exact attention of each sequence by itself, without its padding; (B, L, H * D).

    padding: number of padding tokens at the front of each sequence.
    mask: None, or a bias that is the same for all sequences.
    query_slice: the tokens that have a query, after the padding; None for all.
    """
    batch, heads, tokens, dim = query.shape
    out = query.new_zeros(batch, tokens, heads * dim)
    for index, padded in enumerate(padding):
        one, first = slice(index, index + 1), padded if query_slice is None else 0
        out[one, first:] = attention(
            query[one, :, first:],
            key[one, :, padded:],
            value[one, :, padded:],
            None if mask is None else mask[..., padded:],
        )
    return out


class PaddedBackend(Backend):
    """A backend for sequences with padding at the front."""

    def __init__(self, padding: Sequence[int]):
        self.padding = padding

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        return attend_past_padding(attend, self.padding, query, key, value, mask, query_slice)


@dataclass(frozen=True)
class SharedTexts:
    """Texts (2 B, L, width) of a call: positives, then negatives."""

    states: Tensor
    mask: Tensor | None
    backend: Backend

    def velocities(
        self,
        transformer,
        latents: Tensor,
        timestep: Tensor,
        references: Sequence[Reference] = (),
        **options,
    ) -> tuple[Tensor, Tensor]:
        """Velocities (B, C, h, w) for the positives and for the negatives, in float32."""
        both = torch.cat((latents, latents))
        if references:
            options["references"] = [
                replace(r, latents=r.latents.repeat(len(both) // len(r.latents), 1, 1, 1))
                for r in references
            ]
        velocity = transformer(
            both, timestep.repeat(2), self.states, self.mask, backend=self.backend, **options
        )
        positive, negative = velocity.float().chunk(2)
        return positive, negative


def share(positive: TextStates | None, negative: TextStates | None) -> SharedTexts | None:
    """Both texts stacked for one call; None where one is missing or has weights."""
    if (
        positive is None
        or negative is None
        or positive.weights is not None
        or negative.weights is not None
    ):
        return None
    texts = (positive, negative)
    missing = [max(text.states.shape[1] for text in texts) - text.states.shape[1] for text in texts]
    if positive.mask is None and negative.mask is None:
        states = [
            F.pad(t.states, (0, 0, count, 0)) for t, count in zip(texts, missing, strict=True)
        ]
        padding = [count for t, count in zip(texts, missing, strict=True) for _ in t.states]
        backend = PaddedBackend(padding) if any(missing) else TORCH_BACKEND
        return SharedTexts(torch.cat(states), None, backend)
    masks, states = [], []
    for text, count in zip(texts, missing, strict=True):
        real = text.states.new_ones(text.states.shape[:2], dtype=torch.bool)
        real = real if text.mask is None else text.mask.bool()
        masks.append(F.pad(real, (0, count), value=False))
        states.append(F.pad(text.states, (0, 0, 0, count)))
    return SharedTexts(torch.cat(states), torch.cat(masks), TORCH_BACKEND)
