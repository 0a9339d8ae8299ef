"""Tokens of a call in groups that see different keys: regional prompts, biases on references.

A sequence is `[region texts | text | image | references]`. Every query sees every key, except that

- a region's text sees itself, the image tokens of its region, and references;
- image tokens and references do not see the text of regions, but for image tokens in the region;
- an image token may see a group with a bias of its own: the region's share in it, say;
- image tokens may see a part of the image alone: their region's, or what `sparse_attention` gives;
- keys of style pictures, which stand at the end, are seen by image tokens alone.

Attention is computed a group at a time and merged by log-sum-exp (`nn.partial_attention`), so no
mask of all pairs is held, and most of the work goes through the kernel of a plain call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.attention import Attend
from ..nn.partial_attention import AttendPartially, Partial, merge, merge_rows
from .references import additive_mask
from .sparse_attention import ImageGroup

# Bytes of the mask for a number of image queries, where attention has to be called with one.
_MASK_BYTES = 2**26


@dataclass(frozen=True)
class QueryBias:
    """A bias of each image query (I,) on the keys of a group; -inf leaves the group out.

    rows: the queries that see it, (R,), or None for all. is_zero: for these the bias is 0.
    """

    values: Tensor
    rows: Tensor | None
    is_zero: bool

    @classmethod
    def of(cls, factors: Tensor) -> QueryBias | None:
        """The bias that multiplies attention by factors (I,) from 0 up; None where all are 1."""
        if bool((factors == 1).all()):
            return None
        seen = factors > 0
        rows = None if bool(seen.all()) else seen.nonzero()[:, 0]
        return cls(factors.log(), rows, bool((factors[seen] == 1).all()))

    def to(self, device: torch.device) -> QueryBias:
        rows = None if self.rows is None else self.rows.to(device)
        return QueryBias(self.values.to(device), rows, self.is_zero)


@dataclass(frozen=True)
class RegionTokens:
    """The text of a region in a call.

    length: of its text. share: of the region in each image token, (I,) in [0, 1].
    strength: factor on attention to its text, above 0.
    """

    length: int
    share: Tensor
    strength: float = 1.0


class TokenGroups:
    """The groups of a call, and attention among them.

    image: number of image tokens.
    regions: in the order of their texts, which stand in front of the text.
    text_factor: on attention of image tokens to the text, where regions cover them wholly.
    separate: image tokens see only image tokens of their own region, the one with the largest
        share, or of the rest of the image.

    Made once a run for each set of active regions: it holds what depends on shares alone.
    """

    def __init__(
        self,
        image: int,
        regions: Sequence[RegionTokens] = (),
        *,
        text_factor: float = 1.0,
        separate: bool = False,
    ):
        self.image = image
        # Tokens of all regions' texts, which are first.
        self.front = sum(region.length for region in regions)
        self._lengths = [region.length for region in regions]
        self._text: QueryBias | None = None
        # Of each region: the bias of image queries, and of its text's queries on image tokens.
        self._regions: list[tuple[QueryBias | None, QueryBias | None]] = []
        # Rows of image queries, each in one group, and the image tokens that these see; none for
        # all of them.
        self._image_groups: list[ImageGroup] = []
        if regions:
            shares = torch.stack([region.share.float() for region in regions])
            covered = shares.sum(dim=0).clamp(max=1.0)
            self._text = QueryBias.of(1 - covered * (1 - text_factor))
            self._regions = [
                (QueryBias.of(share * region.strength), QueryBias.of(share))
                for share, region in zip(shares, regions, strict=True)
            ]
            if separate:
                owner = torch.cat(((1 - covered)[None], shares)).argmax(dim=0)
                groups = (owner == index for index in range(len(regions) + 1))
                owners = [group.nonzero()[:, 0] for group in groups if bool(group.any())]
                self._image_groups = [(own, own) for own in owners]
        # Of references to which image tokens attend with a bias: first token after the image,
        # number of tokens, bias.
        self._references: list[tuple[int, int, QueryBias]] = []
        # Keys at the end that image tokens alone see: number, and bias or None.
        self._image_keys: list[tuple[int, QueryBias | None]] = []
        # Of `with_sparse`, for the calls of a negative.
        self._sparse: list[ImageGroup] = []

    def to(self, device: torch.device | str) -> TokenGroups:
        """The same groups with biases on a device; their sizes are known on the CPU."""

        def moved(bias: QueryBias | None) -> QueryBias | None:
            return None if bias is None else bias.to(torch.device(device))

        groups = copy.copy(self)
        groups._text = moved(self._text)
        groups._regions = [(moved(image), moved(own)) for image, own in self._regions]
        groups._image_groups = [(own.to(device), k.to(device)) for own, k in self._image_groups]
        groups._references = [
            (at, n, bias.to(torch.device(device))) for at, n, bias in self._references
        ]
        groups._image_keys = [(count, moved(bias)) for count, bias in self._image_keys]
        return groups

    def with_image_keys(self, keys: Sequence[tuple[int, QueryBias | None]]) -> TokenGroups:
        """The same groups with keys at the end that image tokens alone see.

        keys: number and bias of each part, the bias on the device of the call.
        """
        groups = copy.copy(self)
        groups._image_keys = list(keys)
        return groups

    def with_references(
        self, factors: Sequence[tuple[int, int, Tensor]], device: torch.device
    ) -> TokenGroups:
        """The same groups with factors on the attention of image tokens to references.

        factors: first token after the image, number of tokens, and factor of each image query (I,)
        on the CPU. device: of the call.
        """
        groups = copy.copy(self)
        groups._references = [
            (first, count, bias.to(device))
            for first, count, values in factors
            if (bias := QueryBias.of(values)) is not None
        ]
        return groups

    def with_sparse(self, sparse: Sequence[ImageGroup]) -> TokenGroups:
        """The same groups whose image tokens see a part of the image, see `sparse_attention`.

        Of what they would see otherwise. sparse: on the device of the call.
        """
        groups = copy.copy(self)
        if not self._image_groups:
            groups._image_groups = groups._sparse = list(sparse)
            return groups
        found = [
            (_common(rows, own), _common(keys, seen))
            for rows, keys in sparse
            for own, seen in self._image_groups
        ]
        groups._image_groups = [(rows, keys) for rows, keys in found if len(rows)]
        groups._sparse = list(sparse)
        return groups

    def without_regions(self) -> TokenGroups | None:
        """The biases on references and sparse attention alone, None without any."""
        if not self._references and not self._sparse:
            return None
        groups = TokenGroups(self.image)
        groups._references = self._references
        return groups.with_sparse(self._sparse)

    def attend(
        self,
        attention: Attend,
        partial: AttendPartially | None,
        text: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        only_image: bool,
    ) -> Tensor:
        """Attention over normed and rotated heads; (B, Q, H * D).

        attention: for queries whose keys need no bias. partial: for parts of the keys; None where
            the host has one way of attention only, which is then called with masks.
        text: tokens before the image, regions' included.
        query: of all tokens, or of the image alone (only_image). mask: of keys, (B or 1, 1, 1, L).
        """
        end = text + self.image
        of_image = query if only_image else query[:, :, text:end]
        shared = slice(0, key.shape[2] - sum(count for count, _ in self._image_keys))
        if partial is None:
            image_out = self._attend_by_masks(attention, text, of_image, key, value, mask)
        else:
            out = self._attend_by_parts(partial, text, of_image, key, value, mask)
            image_out = out.transpose(1, 2).flatten(2)
        if only_image:
            return image_out
        key, value, mask = key[:, :, shared], value[:, :, shared], _of_keys(mask, shared)
        outs, first = [], 0
        for length, (_, share) in zip(self._lengths, self._regions, strict=True):
            own = slice(first, first := first + length)
            keys = self._seen_from_region(own, text, share, key, value, mask)
            outs.append(attention(query[:, :, own], *keys))
        if text > self.front:
            outs.append(attention(query[:, :, self.front : text], key, value, mask))
        outs.append(image_out)
        if query.shape[2] > end:
            others = slice(self.front, None)
            keys = key[:, :, others], value[:, :, others], _of_keys(mask, others)
            outs.append(attention(query[:, :, end:], *keys))
        return torch.cat(outs, dim=1)

    def _seen_from_region(self, own, text, share, key, value, mask):
        """Keys, values and mask for the text of a region: itself, its image tokens, references."""
        end = text + self.image
        rows = slice(text, end)
        bias = None
        if share is not None:
            bias = share.values[None, None, None]
            if share.rows is not None:
                rows, bias = text + share.rows, bias[..., share.rows]
        parts = [own, rows, slice(end, None)]
        keys, values = (torch.cat([t[:, :, part] for part in parts], dim=2) for t in (key, value))
        if mask is not None:
            mask = torch.cat([mask[..., part] for part in parts], dim=-1)
        if bias is not None and not share.is_zero:
            seen = keys.new_zeros(1, 1, 1, keys.shape[2], dtype=torch.float32)
            first = own.stop - own.start
            seen[..., first : first + bias.shape[-1]] = bias
            mask = seen if mask is None else additive_mask(mask) + seen
        return keys, values, mask

    def _attend_by_parts(self, partial, text, query, key, value, mask) -> Tensor:
        """Attention of image queries (B, H, I, D), merged from parts of the keys."""
        mask = None if mask is None else additive_mask(mask)

        def part(queries: Tensor, keys: slice | Tensor) -> Partial:
            return partial(queries, key[:, :, keys], value[:, :, keys], _of_keys(mask, keys))

        plain, biased = self._segments(text, key.shape[2])
        whole = None
        if self._image_groups:
            # With what all see alike, so that this needs no merge.
            shared = [torch.arange(k.start, k.stop, device=query.device) for k in plain]
            whole, plain = _empty(query), []
            for rows, keys in self._image_groups:
                own = part(query[:, :, rows], torch.cat((*shared, text + keys)))
                whole.out.index_copy_(2, rows, own.out)
                whole.lse.index_copy_(2, rows, own.lse)
        for keys in plain:
            found = part(query, keys)
            whole = found if whole is None else merge(whole, found)
        assert whole is not None  # image tokens see image tokens
        for keys, bias in biased:
            if bias.rows is None:
                whole = merge(whole, part(query, keys).biased(bias.values))
            elif len(bias.rows):
                found = part(query[:, :, bias.rows], keys)
                merge_rows(whole, found.biased(bias.values[bias.rows]), bias.rows)
        return whole.out

    def _segments(self, text: int, length: int):
        """Keys that all image queries see alike, as few slices; and slices with their bias.

        Without the image's own where these are separate.
        """
        end = text + self.image
        segments: list[tuple[int, int, QueryBias | None]] = []
        first = 0
        for count, (bias, _) in zip(self._lengths, self._regions, strict=True):
            # A region whose share is 1 in every token has no bias.
            segments.append((first, first + count, bias))
            first += count
        segments.append((first, text, self._text))
        if not self._image_groups:
            segments.append((text, end, None))
        first = end
        for at, count, bias in self._references:
            segments += [(first, end + at, None), (end + at, end + at + count, bias)]
            first = end + at + count
        end_of_shared = length - sum(count for count, _ in self._image_keys)
        segments.append((first, end_of_shared, None))
        first = end_of_shared
        for count, bias in self._image_keys:
            segments.append((first, first + count, bias))
            first += count
        plain: list[slice] = []
        for start, stop, bias in segments:
            if bias is not None or start == stop:
                continue
            if plain and plain[-1].stop == start:
                start = plain.pop().start
            plain.append(slice(start, stop))
        biased = [(slice(a, b), bias) for a, b, bias in segments if bias is not None and a < b]
        return plain, biased

    def _attend_by_masks(self, attention, text, query, key, value, mask) -> Tensor:
        """Attention of image queries (B, I, H * D) by a function that takes masks.

        For some queries at a time, so that the mask stays small.
        """
        length, count = key.shape[2], query.shape[2]
        rows = max(1, _MASK_BYTES // (4 * length))
        outs = []
        for first in range(0, count, rows):
            chunk = slice(first, min(first + rows, count))
            bias = self._dense(chunk, text, length, key.device)
            if mask is not None:
                bias = bias + additive_mask(mask)
            outs.append(attention(query[:, :, chunk], key, value, bias))
        return torch.cat(outs, dim=1)

    def _dense(self, rows: slice, text: int, length: int, device: torch.device) -> Tensor:
        """The bias (1, 1, R, L) of some image queries on all keys."""
        dense = torch.zeros(1, 1, rows.stop - rows.start, length, device=device)
        for keys, bias in self._segments(text, length)[1]:
            dense[..., keys] = bias.values[rows, None]
        if self._image_groups:
            # The group of each query, and what is apart from each group.
            group = torch.empty(self.image, dtype=torch.long, device=device)
            count = len(self._image_groups)
            apart = torch.ones(count, self.image, dtype=torch.bool, device=device)
            for index, (own, keys) in enumerate(self._image_groups):
                group[own] = index
                apart[index, keys] = False
            dense[..., text : text + self.image].masked_fill_(apart[group[rows]], -torch.inf)
        # Half of the largest number, as in `additive_mask`.
        return dense.clamp_(min=torch.finfo(torch.bfloat16).min / 2)


def _of_keys(mask: Tensor | None, keys: slice | Tensor) -> Tensor | None:
    return None if mask is None else mask[..., keys]


def _common(first: Tensor, second: Tensor) -> Tensor:
    return first[torch.isin(first, second)]


def _empty(query: Tensor) -> Partial:
    return Partial(torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32))
