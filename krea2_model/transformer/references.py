"""Reference images: latents beside the image that is made, for it to look at.

The base model was not trained to look at them; LoRAs teach it, in two families that their weights
do not tell apart. Edit and style LoRAs (ai-toolkit) modulate the tokens of a reference as those of
a finished image, at time 0; identity LoRAs with the step's own time. Every reference has a place of
its own on the first rotary axis, where the image is at 0.

A strength s adds log(s) to what attention scores a reference's tokens by, which multiplies their
share before shares are made to sum to 1: at 1 nothing is added, at 0 the reference is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..guidance import in_window
from ..nn.attention import Attend

TIME_ZERO, SHARED_TIME = "index_timestep_zero", "index"
REFERENCE_METHODS = (TIME_ZERO, SHARED_TIME)


@dataclass(frozen=True)
class Reference:
    """A reference image and how it is looked at.

    latents: (B or 1, C, h, w), normalised; of any size.
    index: place on the first rotary axis, 1 or more; None is its place in the list.
    strength: 1 leaves attention as it is, 0 leaves the reference out.
    start, end: the parts of the schedule's time between which it is there, see `guidance`.

    Raises ValueError for values out of range.
    """

    latents: Tensor
    index: int | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if self.index is not None and not 1 <= self.index <= 255:
            raise ValueError(
                f"A reference's index is {self.index!r}; expected 1 to 255 (the image is at 0)."
            )
        if not 0 <= self.strength <= 100:
            raise ValueError(
                f"A reference's strength is {self.strength!r}; expected 0 (left out) to 100."
            )
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"A reference is there from {self.start!r} to {self.end!r} of the schedule; "
                "expected 0 <= start <= end <= 1."
            )

    def to(self, like: Tensor) -> Reference:
        """With latents on the device and in the dtype of a tensor."""
        return replace(self, latents=self.latents.to(like))

    def is_there(self, sigma: float, first: float | None = None, last: float | None = None) -> bool:
        """Whether a step that begins at a sigma looks at it.

        first, last: the schedule's sigmas at `start` and `end`; None for one without a shift.
        """
        first = 1 - self.start if first is None else first
        last = 1 - self.end if last is None else last
        return self.strength > 0 and in_window(sigma, first, last)


def with_indices(references: Sequence[Tensor | Reference] | None) -> list[Reference]:
    """References with their indices, without those of strength 0."""
    result = []
    for place, reference in enumerate(references or (), 1):
        if isinstance(reference, Tensor):
            reference = Reference(reference)
        if reference.strength > 0:
            result.append(replace(reference, index=reference.index or place))
    return result


def add_strength_bias(
    mask: Tensor | None,
    before: int,
    counts: Sequence[int],
    strengths: Sequence[float],
    length: int,
    device: torch.device,
) -> Tensor | None:
    """A mask in which reference tokens count by their strengths.

    mask: (B or 1, 1, 1, L) bool, or None where every token is seen.
    before: tokens in front of the first reference; counts: tokens of each.
    length: of the result, on `device`.
    Returns `mask` itself where all strengths are 1, else (B or 1, 1, 1, L) in float32, to be added.
    """
    if all(strength == 1 for strength in strengths):
        return mask
    pieces = [torch.full((count,), math.log(s)) for count, s in zip(counts, strengths, strict=True)]
    bias = torch.cat([torch.zeros(before), *pieces])
    bias = F.pad(bias, (0, length - len(bias))).to(device)[None, None, None]
    return bias if mask is None else additive_mask(mask) + bias


def additive_mask(mask: Tensor) -> Tensor:
    """A boolean mask as what is added to scores; one that is added already stays."""
    if mask.dtype is not torch.bool:
        return mask
    # Half of the largest: a bias on top must not make it infinite.
    hidden = torch.finfo(torch.bfloat16).min / 2
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, hidden)


class ReferenceKVCache:
    """Keys and values, a pair a block, of references that see themselves alone.

    In time-zero references nothing then depends on the step, so they are made once a run. That is
    not what LoRAs were trained with, where references see the image too.
    """

    def __init__(self):
        # Of each reference: its strength, and (key, value) (B or 1, KV, L, D) by block.
        self._references: list[tuple[float, list[tuple[Tensor, Tensor]]]] = []
        # The mask of a call's last block with ours behind it: all blocks have the same one.
        self._mask: tuple[tuple, Tensor | None] | None = None

    def recorder(self, strength: float) -> KVRecorder:
        """Something to attend with while one more reference goes through the blocks."""
        pairs: list[tuple[Tensor, Tensor]] = []
        self._references.append((strength, pairs))
        return KVRecorder(pairs)

    def attend(
        self,
        attention: Attend,
        block: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention in which the references' tokens stand behind the others."""
        pairs = [pairs[block] for _, pairs in self._references]
        batch = key.shape[0]
        keys, values = (
            [t.expand(batch, -1, -1, -1) for t in side] for side in zip(*pairs, strict=True)
        )
        mask = self._with_references(mask, key, [k.shape[2] for k in keys])
        key, value = torch.cat((key, *keys), dim=2), torch.cat((value, *values), dim=2)
        return attention(query, key, value, mask)

    def _with_references(self, mask: Tensor | None, key: Tensor, counts: list[int]):
        """A mask of the keys (B, KV, L, D) with that of the references behind it."""
        asked = (mask, key.shape[2], key.device)
        if self._mask is None or not all(
            now is then or (not isinstance(now, Tensor) and now == then)
            for now, then in zip(asked, self._mask[0], strict=True)
        ):
            tokens, behind = key.shape[2], sum(counts)
            if mask is not None:
                mask = F.pad(mask, (0, behind), value=True if mask.dtype is torch.bool else 0.0)
            strengths = [strength for strength, _ in self._references]
            length, device = tokens + behind, key.device
            self._mask = asked, add_strength_bias(mask, tokens, counts, strengths, length, device)
        return self._mask[1]


class KVRecorder:
    """Attends as usual and keeps the keys and values."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]):
        self._pairs = pairs

    def attend(self, attention, block, query, key, value, mask):
        assert block == len(self._pairs), "blocks run once and in order"
        self._pairs.append((key.clone(), value.clone()))
        return attention(query, key, value, mask)
