"""Attention to text: weights of single tokens, and normalised attention guidance (NAG).

Both act inside attention. Scaling text states instead would do little: every block normalises them.

- A weight w moves the value of a token along the line through the mean of the unweighted tokens:
  `v <- mean + w (v - mean)`. At 0 a token adds nothing of its own, below 0 the opposite. Keys stay
  as they are, so no mask is needed.
- NAG (Chen and others, 2025, arXiv:2505.21179) gives a model without guidance a negative prompt:
  the image attends to the positive and to the negative text, and the output of attention is
  extrapolated from the second to the first, token by token and within a limit. Both texts pass
  through the blocks, the image once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number
from ..guidance import NEVER, SigmaAt, StepWindow, unshifted
from ..nn.attention import Attend
from ..nn.kernels import Span
from .references import additive_mask


@dataclass(frozen=True)
class NegativeGuidance:
    """Settings of NAG; scale, limit and blend have the authors' defaults.

    scale (phi): extrapolation away from the negative, 0 for none.
    limit (tau): largest norm of the result, as a multiple of the norm without NAG.
    blend (alpha): share of the result in the output of attention, 0 for none.
    start, end: fractions of the schedule's time between which NAG is on, see `guidance`.

    Raises ValueError for values out of range.
    """

    scale: float = 4.0
    limit: float = 2.5
    blend: float = 0.25
    start: float = 0.0
    end: float = 0.75

    def __post_init__(self):
        for name, low, high in (
            ("scale", 0.0, math.inf),
            ("limit", 1.0, math.inf),
            ("blend", 0.0, 1.0),
            ("start", 0.0, 1.0),
            ("end", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not (is_number(value) and math.isfinite(value) and low <= value <= high):
                allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
                raise ValueError(f"{name} is {value!r}; expected {allowed}.")

    @property
    def is_off(self) -> bool:
        return self.scale == 0 or self.blend == 0 or self.start >= self.end

    def window(self, sigma_at: SigmaAt = unshifted) -> StepWindow:
        """The steps of a schedule in which it is on."""
        return NEVER if self.is_off else StepWindow.between(self.start, self.end, sigma_at)


@dataclass(frozen=True)
class TextStates:
    """Fused text (B, L, width), its mask (B, L) bool and weights (B, L), each or None."""

    states: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None

    def repeated(self, times: int) -> TextStates:
        """The texts so many times, for a batch that repeats."""
        if times == 1:
            return self
        optional = (self.mask, self.weights)
        states = self.states.repeat(times, 1, 1)
        return TextStates(states, *(None if p is None else p.repeat(times, 1) for p in optional))


def normalised_guidance(positive: Tensor, negative: Tensor, settings: NegativeGuidance) -> Tensor:
    """NAG of attention outputs (B, L, D) for the positive and the negative text.

    `z + scale (z - z-)`, scaled down where its L1 norm exceeds `limit` times that of z, blended
    with z.
    """

    def l1_norm(output: Tensor) -> Tensor:
        return output.abs().sum(dim=-1, keepdim=True, dtype=torch.float32)

    extrapolated = torch.lerp(negative, positive, 1 + settings.scale)
    limit = settings.limit * l1_norm(positive)
    factor = (limit / l1_norm(extrapolated).clamp(min=1e-12)).clamp(max=1.0)
    return torch.lerp(positive, extrapolated * factor.to(extrapolated.dtype), settings.blend)


class TextAttention:
    """Text weights and NAG of one call of the model.

    weights, mask: (B, L) of the call's text tokens, each or None.
    negative, settings: the negative text of NAG, whose tokens come first, or None without NAG.
    before: texts of the call that stand in front of this text, after the negative.

    `prepare` is called once, before the blocks, and `attend` in each of them.
    """

    def __init__(
        self,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        negative: TextStates | None = None,
        settings: NegativeGuidance | None = None,
        before: Sequence[TextStates] = (),
    ):
        self._negative, self._settings = negative, settings
        self._text_tokens = 0
        # Tokens that `prepare` prepends.
        self.front = 0 if negative is None else negative.states.shape[1]
        texts, first = [], 0
        for text in before if negative is None else (negative, *before):
            texts.append((first, text.weights, text.mask))
            first += text.states.shape[1]
        texts.append((first, weights, mask))
        # Of each weighted text: its first token, the weights, and the shares of the mean.
        self._weights = [
            (first, weights, _shares(weights, mask))
            for first, weights, mask in texts
            if weights is not None
        ]

    def prepare(self, hidden: Tensor, query_slice: Span, rope: Tensor, mask: Tensor | None, split):
        """The blocks' arguments with the negative's tokens first, see `Backend.run_blocks`."""
        self._text_tokens, front = query_slice[0], self.front
        if self._negative is None:
            return hidden, query_slice, rope, mask, split
        hidden = torch.cat((self._negative.states.to(hidden.dtype), hidden), dim=1)
        # All text has position zero: any row of text will do.
        rope = torch.cat((rope[:, :, :1].expand(-1, -1, front, -1, -1, -1), rope), dim=2)
        negative_mask = self._negative.mask
        if negative_mask is not None or mask is not None:
            rows = max(1 if part is None else len(part) for part in (negative_mask, mask))
            ones = hidden.new_ones(rows, 1, 1, hidden.shape[1], dtype=torch.bool)
            left = ones[..., :front] if negative_mask is None else negative_mask[:, None, None, :]
            right = ones[..., front:] if mask is None else mask
            if right.dtype is not torch.bool:
                left = additive_mask(left)
            mask = torch.cat([part.expand(rows, -1, -1, -1) for part in (left, right)], dim=3)
        query_slice = (query_slice[0] + front, query_slice[1] + front)
        return hidden, query_slice, rope, mask, None if split is None else split + front

    def attend(
        self,
        attention: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query_slice: Span | None,
        negative_attention: Attend | None = None,
    ) -> Tensor:
        """Attention over normed and rotated heads; `query_slice` as in `Backend.attend`.

        negative_attention: to NAG's negative text, the image and references; None is `attention`.
        """
        for first, weights, shares in self._weights:
            value = _apply_weights(value, first, weights, shares)
        if self._settings is None:
            return attention(query, key, value, mask)
        front, text = self.front, self._text_tokens
        positive = slice(front, None)

        def without_text(heads: Tensor) -> Tensor:
            """All tokens (the last axis but one) except the positive text."""
            return torch.cat((heads[..., :front, :], heads[..., front + text :, :]), dim=-2)

        positive_out = attention(
            query if query_slice is not None else query[:, :, positive],
            key[:, :, positive],
            value[:, :, positive],
            None if mask is None else mask[..., positive],
        )
        negative_out = (negative_attention or attention)(
            query if query_slice is not None else without_text(query),
            without_text(key),
            without_text(value),
            None if mask is None else without_text(mask.mT).mT,
        )
        if query_slice is not None:
            return normalised_guidance(positive_out, negative_out, self._settings)
        image = normalised_guidance(positive_out[:, text:], negative_out[:, front:], self._settings)
        return torch.cat((negative_out[:, :front], positive_out[:, :text], image), dim=1)


def _shares(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Shares (B, L) of tokens in the mean: of real unweighted tokens, or of all without any."""
    plain = weights == 1
    if mask is not None:
        plain = plain & mask
    counts = plain.sum(dim=1, keepdim=True)
    return torch.where(counts > 0, plain / counts.clamp(min=1), 1 / weights.shape[1])


def _apply_weights(value: Tensor, first: int, weights: Tensor, shares: Tensor) -> Tensor:
    """Values (B, KV, L, D) with the weights of the tokens from `first` on applied."""
    last = first + weights.shape[1]
    values = value[:, :, first:last]
    weights, shares = (t[:, None, :, None].to(value.dtype) for t in (weights, shares))
    mean = (values * shares).sum(dim=2, keepdim=True)
    moved = torch.where(weights == 1, values, torch.lerp(mean, values, weights))
    return torch.cat((value[:, :, :first], moved, value[:, :, last:]), dim=2)
