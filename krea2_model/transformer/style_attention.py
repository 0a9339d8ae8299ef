"""Attention to a style picture: its keys and values beside the image's own.

The style picture passes through the blocks in a call of its own, at the step's sigma, in which
`StyleRecorder` records the keys and values of its image tokens. In the image's call `StyleKeys`
appends them: image tokens see them, text does not, so the prompt's meaning stays as it is. The
keys are those after rotation, turned on to other positions, see `StyleKeys`.

Statistics of the image's values are moved towards the style's (adaptive instance normalisation,
Huang and Belongie, arXiv:1703.06868), which carries colours even where attention finds no match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.attention import Attend
from ..nn.kernels import apply_rope
from .token_groups import QueryBias, TokenGroups


@dataclass(frozen=True)
class BlockStyle:
    """A style picture in a block: keys and values (B or 1, KV, L, D) of its image tokens."""

    key: Tensor
    value: Tensor
    # Mean and standard deviation (B or 1, KV, 1, D) of the values.
    mean: Tensor
    deviation: Tensor


class StyleRecorder:
    """Plain attention that records the image tokens' keys and values of a style picture's pass.

    text, image: numbers of its tokens. blocks: first and end of the blocks to record.
    """

    def __init__(self, text: int, image: int, blocks: tuple[int, int]):
        self._tokens = slice(text, text + image)
        self._first, self._end = blocks
        self.blocks: dict[int, BlockStyle] = {}

    def attend(self, attention, block, query, key, value, mask):
        if self._first <= block < self._end:
            own = value[:, :, self._tokens].clone()
            self.blocks[block] = BlockStyle(key[:, :, self._tokens].clone(), own, *_statistics(own))
        return attention(query, key, value, mask)


class StyleKeys:
    """Keys and values of all style pictures at one step, for the image's calls.

    styles: of each, its blocks from `StyleRecorder`.
    shifts: of each, the rotation (1, 1, 1, D/2, 2, 2) from the positions of its pass to those that
        the image sees. At the image's own positions its layout would be copied.
    key_scale: factor on the keys.
    factors: of each, the factor (I,) of each image token on attention to it, from 0 up.
    shares: of each, its share in the statistics of values; sum 1.
    amount: how far the values of each image token (I,) move to the styles' statistics, 0 to 1.

    factors and amount are on the CPU, so that a device need not be waited for.
    """

    def __init__(
        self,
        styles: Sequence[dict[int, BlockStyle]],
        shifts: Sequence[Tensor],
        key_scale: float,
        factors: Sequence[Tensor],
        shares: Sequence[float],
        amount: Tensor,
    ):
        keys = [next(iter(style.values())).key for style in styles]
        self._styles, self._shifts, self._shares = styles, shifts, shares
        self._key_scale, self._amount = key_scale, amount.to(keys[0].device)
        self._moves_values = bool((amount > 0).any())
        self._keys: list[tuple[int, QueryBias | None]] = []
        for key, factor in zip(keys, factors, strict=True):
            bias = QueryBias.of(factor)
            self._keys.append((key.shape[2], None if bias is None else bias.to(key.device)))

    @property
    def image(self) -> int:
        """Number of the image's tokens."""
        return len(self._amount)

    def acts_in(self, block: int) -> bool:
        """True in blocks that were recorded."""
        return block in self._styles[0]

    def groups(self, groups: TokenGroups | None) -> TokenGroups:
        """The groups of a call with the style's keys at the end, for the image alone."""
        groups = TokenGroups(self.image) if groups is None else groups
        return groups.with_image_keys(self._keys)

    def attend(
        self,
        attention: Attend,
        block: int,
        text: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention with the style's keys and values appended. text: tokens before the image."""
        batch, styles = key.shape[0], [blocks[block] for blocks in self._styles]
        if self._moves_values:
            value = self._with_statistics(value, text, styles)
        keys, values = [key], [value]
        for style, shift in zip(styles, self._shifts, strict=True):
            shifted = apply_rope(style.key, shift) * self._key_scale
            keys.append(shifted.expand(batch, -1, -1, -1))
            values.append(style.value.expand(batch, -1, -1, -1))
        if mask is not None:
            added = sum(count for count, _ in self._keys)
            mask = F.pad(mask, (0, added), value=True if mask.dtype is torch.bool else 0.0)
        return attention(query, torch.cat(keys, dim=2), torch.cat(values, dim=2), mask)

    def _with_statistics(self, value: Tensor, text: int, styles: Sequence[BlockStyle]) -> Tensor:
        """Values (B, KV, L, D) with the image's statistics moved towards the styles'."""
        own = value[:, :, text : text + self.image]
        mean, deviation = _statistics(own)
        pairs = list(zip(self._shares, styles, strict=True))
        style_mean = torch.stack([share * style.mean for share, style in pairs]).sum(dim=0)
        deviations = [share * style.deviation for share, style in pairs]
        style_deviation = torch.stack(deviations).sum(dim=0)
        scale = (style_deviation / deviation).to(own.dtype)
        moved = (own - mean.to(own.dtype)) * scale + style_mean.to(own.dtype)
        own = torch.lerp(own, moved, self._amount[None, None, :, None].to(own.dtype))
        end = text + self.image
        return torch.cat((value[:, :, :text], own, value[:, :, end:]), dim=2)


def _statistics(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, KV, 1, D) over tokens, in float32."""
    deviation, mean = torch.std_mean(value.float(), dim=2, keepdim=True, correction=0)
    return mean, deviation.clamp_min(1e-6)
