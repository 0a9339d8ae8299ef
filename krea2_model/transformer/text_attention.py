"""How the blocks attend to text: weights of single tokens, and a negative beside the positive.

Both act inside attention and nowhere else. Scaled text states would do little good: every block
normalises them, and what is left of the scale is distortion.

- A weight w moves the value of a token along the line through the mean of the tokens without a
  weight: `v <- mean + w (v - mean)`. At 0 a token says nothing of its own, below 0 the opposite.
  Keys stay as they are, so no attention needs a mask for it.
- Normalised attention guidance (Chen and others, 2025, arXiv:2505.21179) gives a model without
  guidance a negative: the image attends to the positive and to the negative text, and what it gets
  is led away from the second, token by token and within a limit. The negative passes through the
  blocks beside the positive; the image does so once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance import in_window
from ..nn.attention import Attend
from .references import additive_mask


@dataclass(frozen=True)
class NegativeGuidance:
    """Settings of normalised attention guidance: scale, limit and blend are its authors'.

    scale (phi): how far to lead away from the negative, 0 not at all.
    limit (tau): how many times as large as without it the result may become.
    blend (alpha): the share of the result in what the image gets, 0 not at all.
    start, end: the parts of the schedule's time between which it works, see `guidance`.

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
            if not (math.isfinite(value) and low <= value <= high):
                allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
                raise ValueError(f"{name} is {value!r}; expected {allowed}.")

    @property
    def is_off(self) -> bool:
        return self.scale == 0 or self.blend == 0 or self.start >= self.end

    def works_at(self, sigma: float, first: float | None = None, last: float | None = None) -> bool:
        """Whether a step that begins at a sigma is among those of `start` to `end`.

        first, last: the schedule's sigmas at `start` and `end`; None for one without a shift.
        """
        first = 1 - self.start if first is None else first
        last = 1 - self.end if last is None else last
        return not self.is_off and in_window(sigma, first, last)


@dataclass(frozen=True)
class TextStates:
    """Fused text (B, L, width), its mask (B, L) bool and weights (B, L), each or None."""

    states: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None


def normalised_guidance(positive: Tensor, negative: Tensor, settings: NegativeGuidance) -> Tensor:
    """What the image gets (B, L, D) from the positive text, led away from what the negative gives.

    `z + scale (z - z-)`, shrunk where its L1 norm is over `limit` times that of z, blended with z.
    """
    led = torch.lerp(negative, positive, 1 + settings.scale)
    norm, led_norm = (t.abs().sum(dim=-1, keepdim=True, dtype=torch.float32)
                      for t in (positive, led))  # fmt: skip
    shrink = (settings.limit * norm / led_norm.clamp(min=1e-12)).clamp(max=1.0)
    return torch.lerp(positive, led * shrink.to(led.dtype), settings.blend)


class TextAttention:
    """What one call of the model does with text beyond attending to it.

    text: weights (B, L) of the call's text tokens and their mask, each or None.
    negative: text to lead away from, and how; None for none. Its tokens stand in front of all.

    `prepare` is called once, before the blocks, and `attend` in each of them.
    """

    def __init__(
        self,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        negative: TextStates | None = None,
        settings: NegativeGuidance | None = None,
    ):
        self._negative, self._settings = negative, settings
        self._text_tokens = 0
        # How many tokens `prepare` puts in front.
        self.front = 0 if negative is None else negative.states.shape[1]
        marked = [(0, weights, mask)]
        if negative is not None:
            marked = [(self.front, weights, mask), (0, negative.weights, negative.mask)]
        # Where tokens with weights begin, those weights, and what makes the mean of the others.
        self._weights = [
            (first, weights, _shares(weights, mask))
            for first, weights, mask in marked
            if weights is not None
        ]

    def prepare(self, hidden: Tensor, query_slice: slice, rope: Tensor, mask: Tensor | None, split):
        """The blocks' arguments with the negative's tokens in front, see `Backend.run_blocks`."""
        self._text_tokens, front = query_slice.start, self.front
        if self._negative is None:
            return hidden, query_slice, rope, mask, split
        hidden = torch.cat((self._negative.states.to(hidden.dtype), hidden), dim=1)
        # All text stands at position zero: any row of text will do.
        rope = torch.cat((rope[:, :, :1].expand(-1, -1, front, -1, -1, -1), rope), dim=2)
        own = self._negative.mask
        if own is not None or mask is not None:
            rows = max(1 if part is None else len(part) for part in (own, mask))
            plain = hidden.new_ones(rows, 1, 1, 1, dtype=torch.bool)
            before = plain.expand(-1, -1, -1, front) if own is None else own[:, None, None, :]
            after = plain.expand(-1, -1, -1, hidden.shape[1] - front) if mask is None else mask
            if after.dtype is not torch.bool:
                before = additive_mask(before)
            mask = torch.cat([part.expand(rows, -1, -1, -1) for part in (before, after)], dim=3)
        query_slice = slice(query_slice.start + front, query_slice.stop + front)
        return hidden, query_slice, rope, mask, None if split is None else split + front

    def attend(
        self,
        attention: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query_slice: slice | None,
    ) -> Tensor:
        """Attention over normed and rotated heads; `kept` as in `Backend.attend`."""
        for first, weights, shares in self._weights:
            value = _weighed(value, first, weights, shares)
        if self._settings is None:
            return attention(query, key, value, mask)
        front, text = self.front, self._text_tokens
        positive = slice(front, None)

        def past_text(heads: Tensor) -> Tensor:
            """Without the positive text: tokens are the last axis but one."""
            return torch.cat((heads[..., :front, :], heads[..., front + text :, :]), dim=-2)

        plain = attention(
            query if query_slice is not None else query[:, :, positive],
            key[:, :, positive],
            value[:, :, positive],
            None if mask is None else mask[..., positive],
        )
        against = attention(
            query if query_slice is not None else past_text(query),
            past_text(key),
            past_text(value),
            None if mask is None else past_text(mask.mT).mT,
        )
        if query_slice is not None:
            return normalised_guidance(plain, against, self._settings)
        image = normalised_guidance(plain[:, text:], against[:, front:], self._settings)
        return torch.cat((against[:, :front], plain[:, :text], image), dim=1)


def _shares(weights: Tensor, mask: Tensor | None) -> Tensor:
    """The shares (B, L) of tokens in the mean: of real ones without a weight, else of all."""
    plain = weights == 1
    if mask is not None:
        plain = plain & mask
    counts = plain.sum(dim=1, keepdim=True)
    return torch.where(counts > 0, plain / counts.clamp(min=1), 1 / weights.shape[1])


def _weighed(value: Tensor, first: int, weights: Tensor, shares: Tensor) -> Tensor:
    """Values (B, KV, L, D) in which the tokens from `first` on have their weights."""
    last = first + weights.shape[1]
    values = value[:, :, first:last]
    weights, shares = (t[:, None, :, None].to(value.dtype) for t in (weights, shares))
    mean = (values * shares).sum(dim=2, keepdim=True)
    moved = torch.where(weights == 1, values, torch.lerp(mean, values, weights))
    return torch.cat((value[:, :, :first], moved, value[:, :, last:]), dim=2)
