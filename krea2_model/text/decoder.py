"""Decoder layers of Qwen3: attention that looks back, rotary positions, a gated MLP.

Of a prompt with 24,000 tokens a mask (L, L) would take 2 GB and more. So queries attend a block at
a time, each with the rows of the mask that are its own and the keys up to its last: the mask stays
below a constant size, and half of the scores are never computed. Shorter prompts are one block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import TextEncoderConfig
from ..nn.attention import Attend, repeat_heads
from ..nn.kernels import silu_gated

# Elements of a mask that are made at a time; prompts of up to 2,048 tokens are one block.
# Some attention functions hold the scores of all heads: 1 GB of the released encoder.
MASK_ELEMENTS = 2**22

# New keys and values (B, KV, L, D) of a layer to those of all tokens so far.
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SelfAttention(nn.Module):
    """Causal attention with grouped key/value heads and a norm per head on queries and keys."""

    def __init__(self, config: TextEncoderConfig, layers, attend: Attend, **factory):
        super().__init__()
        dim, head_dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        query_dim = config.num_attention_heads * head_dim
        key_dim = config.num_key_value_heads * head_dim
        self.head_dim = head_dim
        self.attend = attend
        self.q_proj = layers.Linear(dim, query_dim, bias=False, **factory)
        self.k_proj = layers.Linear(dim, key_dim, bias=False, **factory)
        self.v_proj = layers.Linear(dim, key_dim, bias=False, **factory)
        self.o_proj = layers.Linear(query_dim, dim, bias=False, **factory)
        self.q_norm = layers.RMSNorm(head_dim, eps=eps, **factory)
        self.k_norm = layers.RMSNorm(head_dim, eps=eps, **factory)

    def forward(
        self,
        hidden: Tensor,
        rotation: Tensor,
        mask: CausalMask | None,
        remember: Remember | None = None,
    ) -> Tensor:
        query = self.q_norm(self._heads(self.q_proj(hidden))).transpose(1, 2)
        key = self.k_norm(self._heads(self.k_proj(hidden))).transpose(1, 2)
        value = self._heads(self.v_proj(hidden)).transpose(1, 2)
        query, key = rotate_halves(query, rotation), rotate_halves(key, rotation)
        if remember is not None:
            key, value = remember(key, value)
        return self.o_proj(causal_attention(self.attend, query, key, value, mask))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))  # (B, L, H, D)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextEncoderConfig, layers, **factory):
        super().__init__()
        dim, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = layers.Linear(dim, inner, bias=False, **factory)
        self.up_proj = layers.Linear(dim, inner, bias=False, **factory)
        self.down_proj = layers.Linear(inner, dim, bias=False, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(silu_gated(self.gate_proj(hidden), self.up_proj(hidden)))


class DecoderLayer(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the stream."""

    def __init__(self, config: TextEncoderConfig, layers, attend: Attend, **factory):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = layers.RMSNorm(dim, eps=eps, **factory)
        self.self_attn = SelfAttention(config, layers, attend, **factory)
        self.post_attention_layernorm = layers.RMSNorm(dim, eps=eps, **factory)
        self.mlp = GatedMLP(config, layers, **factory)

    def forward(
        self,
        hidden: Tensor,
        rotation: Tensor,
        mask: CausalMask | None,
        remember: Remember | None = None,
    ) -> Tensor:
        """hidden: (B, L, D); rotation from `rotation_table`; mask None where queries see all keys.

        remember: keeps keys and values where text is written a token at a time.
        """
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, mask, remember)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class CausalMask:
    """A causal mask that hides padding keys, made a block of queries at a time.

    A query attends to itself even if it is padding: one without keys becomes NaN, and NaN reaches
    the others through masked values too.

    length: of the keys. start: the place of the first query among them, 0 unless some are
        remembered. real: (B, length), True for real tokens, or None if all are.
    """

    def __init__(
        self, length: int, device: torch.device, *, start: int = 0, real: Tensor | None = None
    ):
        self.length, self.start = length, start
        self._places = torch.arange(length, device=device)
        self._real = None if real is None else real.bool()[:, None, None]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of the queries `first` to `last` - 1, (B or 1, 1, rows, last), boolean.

        first, last: places among the keys.
        """
        query, key = self._places[first:last, None], self._places[None, :last]
        mask = (key <= query)[None, None]
        if self._real is None:
            return mask
        return (mask & self._real[..., :last]) | (key == query)


def mask_rows(length: int) -> int:
    """Number of queries that attend at a time to a number of keys."""
    return max(64, MASK_ELEMENTS // max(1, length))


def mask_size(length: int) -> int:
    """Elements of the largest mask that is made for a prompt of so many tokens."""
    return min(length, mask_rows(length)) * length


def causal_attention(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: CausalMask | None
) -> Tensor:
    """Attention (B, L, H * D) of queries (B, H, L, D) under a causal mask, in blocks.

    mask: None where each query sees all keys.
    """
    if mask is None:
        return attend(query, key, value, None)
    rows = mask_rows(mask.length)
    if query.shape[2] <= rows:
        return attend(query, key, value, mask.rows(mask.start, mask.length))
    key, value = repeat_heads(query, key, value)  # once, and not for every block
    parts = []
    for first in range(mask.start, mask.length, rows):
        last = min(first + rows, mask.length)
        block = query[:, :, first - mask.start : last - mask.start]
        block_mask = mask.rows(first, last)
        parts.append(attend(block, key[:, :, :last], value[:, :, :last], block_mask))
    return torch.cat(parts, dim=1)


def rotation_table(
    length: int, config: TextEncoderConfig, device: torch.device, start: int = 0
) -> Tensor:
    """Cosines and sines of the positions start to length - 1, (2, L, D/2) in float32."""
    return rotation_of(torch.arange(start, length).expand(3, -1), config, device)


def rotation_of(positions: Tensor, config: TextEncoderConfig, device: torch.device) -> Tensor:
    """Cosines and sines of positions (3, L) in time, row and column, (2, L, D/2) in float32.

    Of the frequencies, the second and fifth and so on count rows, the third and sixth and so on
    columns, as many as `rotary_sections` says, and the others time. Angles are rounded to float32
    at each step as in transformers (`Qwen3VLTextRotaryEmbedding`), where the model was trained,
    and on the CPU, so that devices agree.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    axes = torch.zeros(len(frequencies), dtype=torch.long)
    for axis in (1, 2):
        axes[axis : 3 * config.rotary_sections[axis] : 3] = axis
    angles = positions.to("cpu", torch.float32)[axes].T * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(device)


def rotate_halves(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotate channel i together with channel i + D/2, in the float32 of the table.

    heads: (B, H, L, D); rotation: (2, B or 1, 1, L, D/2).
    """
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(heads.dtype)
