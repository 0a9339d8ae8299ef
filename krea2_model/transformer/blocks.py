"""The layers of the transformer: gated attention and MLP, text fusion, single-stream block.

Module names equal the keys of the official checkpoint (krea-ai/krea-2, mmdit.py), apart from the
`.scale.weight` and `.lin.weight` leaves, see nn/layers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..nn.kernels import HeadNorm, Span, gated_residual, may_overwrite, sigmoid_gated, silu_gated
from ..nn.layers import ZeroCentredRMSNorm, read_scales, share_input
from .backend import TORCH_BACKEND, Backend
from .modulation import BlockModulation, FinalModulation, Modulation, fold_norms


class SwiGLU(nn.Module):
    """Gated feed-forward: `down(silu(gate x) * up x)`, without biases."""

    share_input = staticmethod(share_input)

    def __init__(self, dim: int, hidden_dim: int, layers, **factory):
        super().__init__()
        self.gate = layers.Linear(dim, hidden_dim, bias=False, **factory)
        self.up = layers.Linear(dim, hidden_dim, bias=False, **factory)
        self.down = layers.Linear(hidden_dim, dim, bias=False, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.share_input(hidden, self.gate, self.up)
        gated = silu_gated(gate(hidden), up(hidden))
        del gate, up  # and with them the quantised input of a host's layers
        return self.down(gated)


class QKNorm(nn.Module):
    """RMS norms of queries and keys, one scale each over the head dimension."""

    def __init__(self, head_dim: int, eps: float, layers, **factory):
        super().__init__()
        self.eps = eps
        self.qnorm = ZeroCentredRMSNorm(head_dim, eps, layers, **factory)
        self.knorm = ZeroCentredRMSNorm(head_dim, eps, layers, **factory)

    def multipliers(self, device: torch.device) -> HeadNorm:
        """Both multipliers in one pass, for a kernel that fuses norm and rotation."""
        query, key = read_scales(
            (self.qnorm.scale, self.knorm.scale),
            device,
            lambda *weights: torch._foreach_add(weights, 1.0),
        )
        return HeadNorm(query, key, self.eps)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normed queries (B, H, L, D) and keys (B, KV, L, D), new tensors."""
        return self.qnorm(query), self.knorm(key)


class GatedAttention(nn.Module):
    """Grouped-query self-attention with q/k norm and a sigmoid gate on its output."""

    share_input = staticmethod(share_input)

    def __init__(self, dim: int, heads: int, kv_heads: int, eps: float, layers, **factory):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        kv_dim = kv_heads * self.head_dim
        self.wq = layers.Linear(dim, dim, bias=False, **factory)
        self.wk = layers.Linear(dim, kv_dim, bias=False, **factory)
        self.wv = layers.Linear(dim, kv_dim, bias=False, **factory)
        self.gate = layers.Linear(dim, dim, bias=False, **factory)
        self.qknorm = QKNorm(self.head_dim, eps, layers, **factory)
        self.wo = layers.Linear(dim, dim, bias=False, **factory)

    def forward(
        self,
        hidden: Tensor,
        rope: Tensor | None,
        mask: Tensor | None,
        backend: Backend,
        query_slice: Span | None = None,
        norm: HeadNorm | None = None,
    ) -> Tensor:
        """Attention of tokens (B, L, D).

        query_slice: compute queries for these tokens only, None for all. Keys and values cover all.
        norm: multipliers of queries and keys, or None to read them here.
        """
        queries = hidden
        wq, wk, wv, gate = self.share_input(hidden, self.wq, self.wk, self.wv, self.gate)
        if query_slice is not None:
            queries = hidden[:, slice(*query_slice)]
            wq, gate = self.share_input(queries, self.wq, self.gate)
        query = self._split_heads(wq(queries))
        key = self._split_heads(wk(hidden))
        value = self._split_heads(wv(hidden))
        norm = norm or self.qknorm.multipliers(hidden.device)
        out = backend.attend(query, key, value, norm, rope, mask, query_slice)
        return self.wo(sigmoid_gated(out, gate(queries)))

    def _split_heads(self, hidden: Tensor) -> Tensor:
        """(B, L, H * D) -> (B, H, L, D)."""
        return hidden.view(*hidden.shape[:2], -1, self.head_dim).transpose(1, 2)


class TextFusionBlock(nn.Module):
    """A pre-norm transformer block without positions and without modulation."""

    attention_class: type[GatedAttention] = GatedAttention
    mlp_class: type[SwiGLU] = SwiGLU

    def __init__(self, config: TransformerConfig, layers, **factory):
        super().__init__()
        dim, eps = config.text_hidden_dim, config.norm_eps
        heads = config.text_num_attention_heads
        kv_heads = config.text_num_key_value_heads
        self.prenorm = ZeroCentredRMSNorm(dim, eps, layers, **factory)
        self.postnorm = ZeroCentredRMSNorm(dim, eps, layers, **factory)
        self.attn = self.attention_class(dim, heads, kv_heads, eps, layers, **factory)
        self.mlp = self.mlp_class(dim, config.text_intermediate_size, layers, **factory)

    def forward(self, hidden: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
        hidden = hidden + self.attn(self.prenorm(hidden), None, mask, backend)
        return hidden + self.mlp(self.postnorm(hidden))


class TextFusion(nn.Module):
    """Fuse each token's tapped states into one: attend over taps, project, attend over tokens."""

    block_class: type[TextFusionBlock] = TextFusionBlock

    def __init__(self, config: TransformerConfig, layers, **factory):
        super().__init__()
        self.layerwise_blocks = nn.ModuleList(
            self.block_class(config, layers, **factory)
            for _ in range(config.num_layerwise_text_blocks)
        )
        self.projector = layers.Linear(config.num_text_layers, 1, bias=False, **factory)
        self.refiner_blocks = nn.ModuleList(
            self.block_class(config, layers, **factory)
            for _ in range(config.num_refiner_text_blocks)
        )

    def forward(self, taps: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
        """taps (B, L, T, D), mask (B, L) bool or None -> (B, L, D)."""
        batch = taps.shape[0]
        hidden = taps.flatten(0, 1)
        for block in self.layerwise_blocks:
            hidden = block(hidden, None, backend)
        hidden = self.projector(hidden.transpose(1, 2)).squeeze(-1)
        hidden = hidden.unflatten(0, (batch, -1))
        keys = None if mask is None else mask[:, None, None, :]
        for block in self.refiner_blocks:
            hidden = block(hidden, keys, backend)
        return hidden


class SingleStreamBlock(nn.Module):
    """Modulated attention, then a modulated MLP.

    `split` is None, or the first token of references at time zero: tokens before it are modulated
    by vector[:, 0] (the step's time), the others by vector[:, 1] (time zero). The vector then is
    (B, 2, 6 D) instead of (B, 1, 6 D).
    """

    attention_class: type[GatedAttention] = GatedAttention
    mlp_class: type[SwiGLU] = SwiGLU

    def __init__(self, config: TransformerConfig, layers, **factory):
        super().__init__()
        dim, eps = config.hidden_size, config.norm_eps
        self.mod = BlockModulation(dim, layers, **factory)
        self.prenorm = ZeroCentredRMSNorm(dim, eps, layers, **factory)
        self.postnorm = ZeroCentredRMSNorm(dim, eps, layers, **factory)
        self.attn = self.attention_class(
            dim, config.num_attention_heads, config.num_key_value_heads, eps, layers, **factory
        )
        self.mlp = self.mlp_class(dim, config.intermediate_size, layers, **factory)

    def forward(
        self,
        hidden: Tensor,
        vector: Tensor,
        rope: Tensor,
        mask: Tensor | None = None,
        split: int | None = None,
        backend: Backend | None = None,
        query_slice: Span | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """The next hidden state; overwrites `hidden` where gradients are off.

        query_slice: return only these tokens, which lie before `split`; None for all.
        modulation: of this block and step, or None to compute it here.
        """
        backend = backend or TORCH_BACKEND
        rows, norm = modulation or (self._modulation(vector).to(hidden.dtype).unbind(-2), None)
        attn_scale, attn_shift, attn_gate, mlp_scale, mlp_shift, mlp_gate = rows
        normed = self._norm(hidden, attn_scale, attn_shift, split, backend)
        update = self.attn(normed, rope, mask, backend, query_slice, norm)
        del normed  # attention's tensors are freed before the MLP, the widest part, runs
        if query_slice is not None:
            hidden, split = hidden[:, slice(*query_slice)], None
            attn_gate, mlp_gate = attn_gate[:, :1], mlp_gate[:, :1]
            mlp_scale, mlp_shift = mlp_scale[:, :1], mlp_shift[:, :1]
        hidden = _residual(hidden, attn_gate, update, split)
        del update
        update = self.mlp(self._norm(hidden, mlp_scale, mlp_shift, split, backend))
        return _residual(hidden, mlp_gate, update, split)

    def _modulation(self, vector: Tensor) -> Tensor:
        """Scale, shift and gate for attention, then for the MLP, (B, S, 6, D), S time vectors.

        Norm weights are folded into the scales.
        """
        rows = self.mod.rows(vector)

        def fold(*weights: Tensor) -> None:
            fold_norms(rows, torch.stack(weights))

        read_scales((self.prenorm.scale, self.postnorm.scale), vector.device, fold)
        return rows

    def _norm(self, hidden, scale, shift, split, backend: Backend) -> Tensor:
        if split is None:
            return backend.modulated_norm(hidden, scale, shift, self.prenorm.eps)
        sides = zip(_sides(hidden, split), scale.split(1, 1), shift.split(1, 1), strict=True)
        normed = [backend.modulated_norm(*side, self.prenorm.eps) for side in sides]
        return torch.cat(normed, dim=1)


class FinalLayer(nn.Module):
    """Modulated norm and projection of image tokens to patches of velocity."""

    def __init__(self, config: TransformerConfig, layers, **factory):
        super().__init__()
        self.norm = ZeroCentredRMSNorm(config.hidden_size, config.norm_eps, layers, **factory)
        self.linear = layers.Linear(config.hidden_size, config.out_channels, bias=True, **factory)
        self.modulation = FinalModulation(config.hidden_size, layers, **factory)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(time)
        normed = torch.addcmul(shift, self.norm(hidden), 1 + scale)
        return self.linear(normed.to(hidden.dtype))


def _sides(hidden: Tensor, split: int) -> tuple[Tensor, ...]:
    """The tokens before and after `split`."""
    return hidden.tensor_split([split], dim=1)


def _residual(hidden: Tensor, gate: Tensor, update: Tensor, split: int | None) -> Tensor:
    if split is None:
        return gated_residual(hidden, gate, update)
    sides = zip(_sides(hidden, split), gate.split(1, 1), _sides(update, split), strict=True)
    results = [gated_residual(*side) for side in sides]
    # In place, `gated_residual` wrote into views of `hidden`.
    return hidden if may_overwrite() else torch.cat(results, dim=1)
