"""Reference images: latents beside the image that the transformer attends to.

The base model was not trained on references; LoRAs teach it, in two families that their weights do
not tell apart. Edit and style LoRAs (ai-toolkit) modulate the tokens of a reference as those of a
finished image, at time 0; identity LoRAs with the step's own time. Every reference has its own
index on the first rotary axis, where the image is at 0.

A strength s adds log(s) to the attention scores of a reference's tokens, so exp(score) is
multiplied by s before the softmax normalises: 1 adds nothing, 0 leaves the reference out. All
queries have this bias; with cached references, which attend to themselves alone, all but theirs.
A boost b is the same for queries of the image alone, or of a part of it, see `token_groups`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_type, is_number, is_whole
from ..guidance import NEVER, SigmaAt, StepWindow, check_window, unshifted
from ..nn.attention import Attend
from .patches import token_count

TIME_ZERO, SHARED_TIME = "index_timestep_zero", "index"
REFERENCE_METHODS = (TIME_ZERO, SHARED_TIME)


class BoostMask:
    """The part of the image whose attention to a reference is boosted.

    mask: (H, W) in [0, 1], of the image's aspect and any size; 1 has the boost, 0 has none.
    Raises ValueError for another shape.
    """

    def __init__(self, mask: Tensor):
        check_type("A boost's mask", mask, Tensor, "a tensor (height, width) in [0, 1]")
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(
                f"A boost's mask has shape {tuple(mask.shape)}; expected (height, width)."
            )
        self._mask = mask.detach().float().cpu().clamp(0, 1)
        self._shares: dict[tuple[int, int], Tensor] = {}

    def shares(self, rows: int, columns: int) -> Tensor:
        """The mean of the mask in each image token, (rows * columns,)."""
        if (rows, columns) not in self._shares:
            cells = F.interpolate(self._mask[None, None], (rows, columns), mode="area")
            self._shares[rows, columns] = cells.flatten()
        return self._shares[rows, columns]


@dataclass(frozen=True)
class ReferenceSettings:
    """Use of one reference image.

    index: on the first rotary axis, 1 to 255; None is its place in the list.
    strength: 1 leaves attention as it is, 0 leaves the reference out.
    start, end: fractions of the schedule's time between which it is attended to, see `guidance`.
    offset: rows and columns that are added to its rotary positions, which begin at 0 as the
        image's do; in tokens, fractions included.
    boost: factor on the attention of image tokens to it, 0 to 1000.
    boost_mask: the image tokens that have the boost; None is all of them.

    Raises ValueError for values out of range.
    """

    index: int | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    offset: tuple[float, float] = (0.0, 0.0)
    boost: float = 1.0
    boost_mask: BoostMask | None = None

    def __post_init__(self):
        if self.index is not None and not (is_whole(self.index) and 1 <= self.index <= 255):
            raise ValueError(
                f"A reference's index is {self.index!r}; expected 1 to 255 (the image is at 0)."
            )
        if not (is_number(self.strength) and 0 <= self.strength <= 100):
            raise ValueError(
                f"A reference's strength is {self.strength!r}; expected 0 (left out) to 100."
            )
        check_window("A reference", self.start, self.end)
        is_pair = isinstance(self.offset, tuple) and len(self.offset) == 2
        if not is_pair or not all(is_number(o) and abs(o) <= 1024 for o in self.offset):
            raise ValueError(
                f"A reference's offset is {self.offset!r}; expected a pair of numbers from -1024 "
                "to 1024, rows and columns of tokens."
            )
        if not (is_number(self.boost) and 0 <= self.boost <= 1000):
            raise ValueError(
                f"A reference's boost is {self.boost!r}; expected 0 to 1000 (1 changes nothing)."
            )
        if self.boost_mask is not None:
            check_type("A reference's boost_mask", self.boost_mask, BoostMask, "a BoostMask")

    def window(self, sigma_at: SigmaAt = unshifted) -> StepWindow:
        """The steps of a schedule that attend to it."""
        return StepWindow.between(self.start, self.end, sigma_at) if self.strength > 0 else NEVER


@dataclass(frozen=True)
class Reference:
    """A reference image: latents (B or 1, C, h, w), normalised, of any size, and its settings."""

    latents: Tensor
    settings: ReferenceSettings = field(default_factory=ReferenceSettings)

    def __post_init__(self):
        check_type("A reference", self.latents, Tensor, "latents (B, 16, h, w)")

    def to(self, like: Tensor) -> Reference:
        """The reference with latents on the device and in the dtype of a tensor."""
        return replace(self, latents=self.latents.to(like))

    def repeated(self, times: int) -> Reference:
        """The reference for a batch that repeats so many times; one of a batch of one stays."""
        if times == 1 or len(self.latents) == 1:
            return self
        return replace(self, latents=self.latents.repeat(times, 1, 1, 1))


def with_indices(references: Sequence[Tensor | Reference] | None) -> list[Reference]:
    """References with their indices filled in, without those of strength 0."""
    result = []
    for place, reference in enumerate(references or (), 1):
        if isinstance(reference, Tensor):
            reference = Reference(reference)
        settings = reference.settings
        if settings.strength > 0:
            settings = replace(settings, index=settings.index or place)
            result.append(replace(reference, settings=settings))
    return result


@dataclass(frozen=True)
class ReferencePlan:
    """The references of a run: settings and step window of each, and how they are computed.

    method: one of `REFERENCE_METHODS`.
    caches: compute keys and values of each reference once a run, from itself alone; None computes
        them at each step from all tokens, as LoRAs were trained.

    Raises ValueError for caches with a method whose tokens change with the step.
    """

    settings: tuple[ReferenceSettings, ...] = ()
    windows: tuple[StepWindow, ...] = ()
    method: str = TIME_ZERO
    caches: ReferenceCaches | None = None

    def __post_init__(self):
        if self.caches is not None and self.method != TIME_ZERO:
            raise ValueError(
                f"Cached references need the method {TIME_ZERO!r} and have {self.method!r}, with "
                "which they change at every step. Use that method, or set cache_references=False "
                "(input apart of Krea 2 Reference)."
            )

    @classmethod
    def of(
        cls,
        settings: Sequence[ReferenceSettings],
        sigma_at: SigmaAt,
        method: str = TIME_ZERO,
        caches: ReferenceCaches | None = None,
    ) -> ReferencePlan:
        """The plan for a schedule; references without an index take their place in the list."""
        indexed = tuple(replace(s, index=s.index or place) for place, s in enumerate(settings, 1))
        return cls(indexed, tuple(s.window(sigma_at) for s in indexed), method, caches)

    @property
    def has_boosts(self) -> bool:
        """True if image tokens attend to a reference with a bias of their own."""
        return any(settings.boost != 1 for settings in self.settings)

    def active(self, sigma: float, latents: Sequence[Tensor]) -> list[Reference]:
        """The references that a step which begins at a sigma attends to.

        latents: (B or 1, C, h, w) of each reference of the plan.
        """
        return [
            Reference(own, settings)
            for own, settings, window in zip(latents, self.settings, self.windows, strict=True)
            if window.contains(sigma)
        ]


class ReferenceCaches:
    """The KV caches of a run, one for each set of active references.

    latents: of all references, kept alive with the caches where a host keys them by id(latents).
    """

    def __init__(self, latents: Sequence[Tensor] = ()):
        self._latents = latents
        self._caches: dict[tuple[tuple[int | None, int], ...], ReferenceKVCache] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all references."""
        return sum(map(token_count, self._latents))

    def get(
        self, references: Sequence[Reference], compute: Callable[[], ReferenceKVCache]
    ) -> ReferenceKVCache:
        """The cache of these references, computed on first use."""
        key = tuple((r.settings.index, len(r.latents)) for r in references)
        if key not in self._caches:
            self._caches[key] = compute()
        return self._caches[key]


def add_strength_bias(
    mask: Tensor | None,
    first: int,
    counts: Sequence[int],
    strengths: Sequence[float],
    length: int,
    device: torch.device,
) -> Tensor | None:
    """A mask with the bias of reference strengths.

    mask: (B or 1, 1, 1, L) bool, or None where every token is attended to.
    first: tokens before the first reference; counts: tokens of each.
    length: of the result, on `device`.
    Returns `mask` itself where all strengths are 1, else an additive mask (B or 1, 1, 1, L) in
    float32.
    """
    if all(strength == 1 for strength in strengths):
        return mask
    pieces = [torch.full((count,), math.log(s)) for count, s in zip(counts, strengths, strict=True)]
    bias = torch.cat([torch.zeros(first), *pieces])
    bias = F.pad(bias, (0, length - len(bias))).to(device)[None, None, None]
    return bias if mask is None else additive_mask(mask) + bias


def boost_factors(
    references: Sequence[Reference], rows: int, columns: int
) -> list[tuple[int, int, Tensor]]:
    """Boosts of active references, for an image of so many rows and columns of tokens.

    Of each reference with a boost: its first token, counted from the end of the image, its number
    of tokens, and the factors (rows * columns,) on the attention of image tokens to it.
    """
    found, first = [], 0
    for reference in references:
        count, settings = token_count(reference.latents), reference.settings
        if settings.boost != 1:
            factors = torch.full((rows * columns,), float(settings.boost))
            if settings.boost_mask is not None:
                shares = settings.boost_mask.shares(rows, columns)
                factors = 1 + shares * (settings.boost - 1)
            found.append((first, count, factors))
        first += count
    return found


def additive_mask(mask: Tensor) -> Tensor:
    """A boolean mask as values to add to attention scores; an additive mask is returned as is."""
    if mask.dtype is not torch.bool:
        return mask
    # Half of the largest: a bias on top must not make it infinite.
    hidden = torch.finfo(torch.bfloat16).min / 2
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, hidden)


class ReferenceKVCache:
    """Keys and values of references that attend only to themselves, a pair a block.

    For references at time zero nothing then depends on the step, so they are computed once a run.
    LoRAs were trained otherwise: their references attend to the image too.
    """

    def __init__(self):
        # Of each reference: its strength, and (key, value) (B or 1, KV, L, D) by block.
        self._references: list[tuple[float, list[tuple[Tensor, Tensor]]]] = []
        # The last mask and its extension by the references: all blocks of a call share it.
        self._mask: tuple[tuple, Tensor | None] | None = None

    def recorder(self, strength: float) -> KVRecorder:
        """Attention for one more reference on its pass through the blocks."""
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
        """Attention with the cached tokens appended to keys and values."""
        pairs = [pairs[block] for _, pairs in self._references]
        batch = key.shape[0]
        keys, values = (
            [t.expand(batch, -1, -1, -1) for t in side] for side in zip(*pairs, strict=True)
        )
        mask = self._extended_mask(mask, key, [k.shape[2] for k in keys])
        key, value = torch.cat((key, *keys), dim=2), torch.cat((value, *values), dim=2)
        return attention(query, key, value, mask)

    def _extended_mask(self, mask: Tensor | None, key: Tensor, counts: list[int]):
        """The mask of keys (B, KV, L, D), extended by the references' tokens."""
        inputs = (mask, key.shape[2], key.device)
        if self._mask is None or not all(
            now is then or (not isinstance(now, Tensor) and now == then)
            for now, then in zip(inputs, self._mask[0], strict=True)
        ):
            tokens, added = key.shape[2], sum(counts)
            if mask is not None:
                mask = F.pad(mask, (0, added), value=True if mask.dtype is torch.bool else 0.0)
            strengths = [strength for strength, _ in self._references]
            length, device = tokens + added, key.device
            bias = add_strength_bias(mask, tokens, counts, strengths, length, device)
            self._mask = inputs, bias
        return self._mask[1]


class KVRecorder:
    """Plain attention that records its keys and values."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]):
        self._pairs = pairs

    def attend(self, attention, block, query, key, value, mask):
        assert block == len(self._pairs), "blocks run once and in order"
        self._pairs.append((key.clone(), value.clone()))
        return attention(query, key, value, mask)
