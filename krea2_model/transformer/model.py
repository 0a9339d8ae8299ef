"""The Krea 2 transformer: text fusion and a single-stream MMDiT over `[text, image]` tokens.

What is odd about this model: the text arrives as twelve tapped encoder layers a token, which a
small transformer fuses; one time vector modulates every block, and each block only adds a learned
table to it; norms are zero-centred; attention output is gated by a sigmoid of the input; text
tokens all sit at rotary position zero.

Module names equal the keys of the official checkpoint (krea-ai/krea-2, mmdit.py), apart from the
`.scale.weight` and `.lin.weight` leaves (see layers.py). Architecture checked against diffusers'
Krea2Transformer2DModel and ComfyUI's own Krea 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import Preset, TransformerConfig
from ..nn.attention import rope_table
from ..nn.compiler import outside_graphs
from ..nn.kernels import HeadNorm, gated_residual, may_overwrite, sigmoid_gated, silu_gated
from ..nn.layers import TorchLayers, ZeroCentredRMSNorm, read_scales, share_input
from .backend import TORCH_BACKEND, Backend, ExtendedBackend
from .modulation import BlockModulation, FinalModulation, Modulation, RunModulation, fold_norms
from .references import (
    REFERENCE_METHODS,
    TIME_ZERO,
    KVRecorder,
    Reference,
    ReferenceKVCache,
    add_strength_bias,
    with_indices,
)


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
        del gate, up  # and with them what a host made of the input
        return self.down(gated)


class QKNorm(nn.Module):
    """The norms of queries and keys, one scale each over the head dimension."""

    def __init__(self, head_dim: int, eps: float, layers, **factory):
        super().__init__()
        self.eps = eps
        self.qnorm = ZeroCentredRMSNorm(head_dim, eps, layers, **factory)
        self.knorm = ZeroCentredRMSNorm(head_dim, eps, layers, **factory)

    def multipliers(self, device: torch.device) -> HeadNorm:
        """Both multipliers in one pass, for a kernel that norms and rotates together."""
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
        query_slice: slice | None = None,
        norm: HeadNorm | None = None,
    ) -> Tensor:
        """Attention of tokens (B, L, D).

        query_slice: the tokens that have a query, None for all; every token has a key.
        norm: of queries and keys, or None to read it here.
        """
        asking = hidden
        wq, wk, wv, gate = self.share_input(hidden, self.wq, self.wk, self.wv, self.gate)
        if query_slice is not None:
            asking = hidden[:, query_slice]
            wq, gate = self.share_input(asking, self.wq, self.gate)
        query = self._split_heads(wq(asking))
        key = self._split_heads(wk(hidden))
        value = self._split_heads(wv(hidden))
        norm = norm or self.qknorm.multipliers(hidden.device)
        out = backend.attend(query, key, value, norm, rope, mask, query_slice)
        return self.wo(sigmoid_gated(out, gate(asking)))

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
    """Twelve tapped states a token to one: attend over the taps, project, attend over tokens."""

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
    """One of the transformer's blocks: modulated attention, then a modulated MLP.

    `split` is None, or the index of the first token that follows the second of two time vectors
    (reference images held at time zero); the time vector then is (B, 2, 6 D) instead of
    (B, 1, 6 D).
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
        query_slice: slice | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """The next hidden state, where gradients are off in the place of `hidden`.

        query_slice: the tokens whose state is wanted, before `split`; None for all.
        modulation: the block's own of a `StepModulation`, or None to make it here.
        """
        backend = backend or TORCH_BACKEND
        rows, norm = modulation or (self._modulation(vector).to(hidden.dtype).unbind(-2), None)
        prescale, preshift, pregate, postscale, postshift, postgate = rows
        normed = self._norm(hidden, prescale, preshift, split, backend)
        update = self.attn(normed, rope, mask, backend, query_slice, norm)
        del normed  # nothing of attention is held while the MLP, the widest part, runs
        if query_slice is not None:
            hidden, split = hidden[:, query_slice], None
            pregate, postgate = pregate[:, :1], postgate[:, :1]
            postscale, postshift = postscale[:, :1], postshift[:, :1]
        hidden = _residual(hidden, pregate, update, split)
        del update
        update = self.mlp(self._norm(hidden, postscale, postshift, split, backend))
        return _residual(hidden, postgate, update, split)

    def _modulation(self, vector: Tensor) -> Tensor:
        """Scale, shift and gate of both halves, (B, S, 6, D), the norms' weights in the scales."""
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


class Krea2Transformer(nn.Module):
    """Predicts the flow-matching velocity `noise - image` of image latents from text.

    Call `fuse_text` once a prompt and the model itself once a step: the text does not depend on
    the time.

    A host that has to offer other calling conventions on the parts names classes of its own for
    them, here and in the parts' own `..._class`.
    """

    block_class: type[SingleStreamBlock] = SingleStreamBlock
    text_fusion_class: type[TextFusion] = TextFusion

    def __init__(self, config: TransformerConfig, layers=TorchLayers, device=None, dtype=None):
        super().__init__()
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {config.axes_dims_rope} sums to {sum(config.axes_dims_rope)}; "
                f"it has to equal attention_head_dim {config.attention_head_dim}."
            )
        factory = {"device": device, "dtype": dtype}
        dim = config.hidden_size
        self.config = config
        self.variant: str | None = None
        self.preset: Preset | None = None
        self.first = layers.Linear(config.in_channels, dim, bias=True, **factory)
        self.tmlp = nn.Sequential(
            layers.Linear(config.timestep_embed_dim, dim, bias=True, **factory),
            nn.GELU(approximate="tanh"),
            layers.Linear(dim, dim, bias=True, **factory),
        )
        self.tproj = nn.Sequential(
            nn.GELU(approximate="tanh"), layers.Linear(dim, 6 * dim, bias=True, **factory)
        )
        self.txtfusion = self.text_fusion_class(config, layers, **factory)
        self.txtmlp = nn.Sequential(
            ZeroCentredRMSNorm(config.text_hidden_dim, config.norm_eps, layers, **factory),
            layers.Linear(config.text_hidden_dim, dim, bias=True, **factory),
            nn.GELU(approximate="tanh"),
            layers.Linear(dim, dim, bias=True, **factory),
        )
        self.blocks = nn.ModuleList(
            self.block_class(config, layers, **factory) for _ in range(config.num_layers)
        )
        self.last = FinalLayer(config, layers, **factory)
        self._rope: list[tuple[tuple[Tensor, ...], Tensor]] = []

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype activations run in: that of the weight matrices."""
        return self.first.weight.dtype

    def fuse_text(
        self, taps: Tensor, mask: Tensor | None = None, backend: Backend = TORCH_BACKEND
    ) -> Tensor:
        """Fuse tapped text-encoder states into text tokens of the transformer's width.

        taps: (B, L, T, text width) with T tapped layers, without the template's prefix.
        mask: (B, L) bool, True for real tokens, or None where every token is real.
        Returns (B, L, width). Rows of masked tokens hold no meaning.
        Raises ValueError where the taps are not those of this model's text encoder.
        """
        expected = (self.config.num_text_layers, self.config.text_hidden_dim)
        if taps.ndim != 4 or tuple(taps.shape[2:]) != expected:
            raise ValueError(
                f"Text taps have shape {tuple(taps.shape)}; this transformer needs "
                f"(batch, tokens, {expected[0]}, {expected[1]}): {expected[0]} tapped layers of a "
                f"text encoder of width {expected[1]}. Use the text encoder that belongs to it "
                "(Qwen3-VL-4B for the released Krea 2)."
            )
        return self._fuse(taps.to(self.compute_dtype), mask, backend)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        *,
        references: Sequence[Tensor | Reference] | None = None,
        reference_method: str = TIME_ZERO,
        backend: Backend = TORCH_BACKEND,
        modulation: RunModulation | None = None,
    ) -> Tensor:
        """Velocity at a time of the flow.

        latents: (B, C, h, w), normalised. Odd h or w is padded by repeating the last row or
            column and cropped again.
        timestep: (B,) in [0, 1]; 1 is pure noise, 0 the image.
        text: (B, L, width) from `fuse_text`; text_mask: (B, L) bool or None.
        references: latents (B, C, h_i, w_i) of reference images, at rotary time index 1, 2, ...;
            or `Reference`, which may have a strength and an index of its own.
        reference_method: "index_timestep_zero" modulates reference tokens as finished images
            (time 0), "index" with the step's own time.
        backend: lets a host patch tokens, blocks and attention.
        modulation: the blocks' weights beside their matrices, read once for many steps in which
            they stay as they are; None reads them here.
        Returns (B, C, h, w) in the dtype of `text`.
        """
        if reference_method not in REFERENCE_METHODS:
            raise ValueError(
                f"reference_method is {reference_method!r}; expected one of {REFERENCE_METHODS}."
            )
        beside = with_indices(references)
        images = [(0, latents), *((r.index, r.latents) for r in beside)]
        patches = [self._patches(image, text.dtype) for _, image in images]
        image_tokens, *counts = (part.shape[1] for part in patches)
        tokens = self.first(torch.cat(patches, dim=1))
        del patches
        grids = tuple((at, *grid_size(image, self.config.patch_size)) for at, image in images)
        positions = _positions(text.shape[1], grids)
        text, image, *patched = backend.prepare_tokens(text, tokens, *positions)
        text_tokens = text.shape[1]
        rope = self._rope_for(tuple(patched), text.device)

        embed = functools.partial(self._embed_time, dtype=text.dtype)
        time, vector = backend.embed_time(embed, timestep)
        split = None
        if beside and reference_method == TIME_ZERO:
            _, vector_at_zero = backend.embed_time(embed, torch.zeros_like(timestep))
            vector = torch.cat((vector, vector_at_zero), dim=1)
            split = text_tokens + image_tokens

        hidden = torch.cat((text, image), dim=1)
        del text, image, tokens  # a hidden state less while the blocks run
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask, (0, hidden.shape[1] - text_mask.shape[1]), value=True)
            mask = mask[:, None, None, :]
        query_slice = slice(text_tokens, text_tokens + image_tokens)
        strengths, length = [r.strength for r in beside], hidden.shape[1]
        mask = add_strength_bias(mask, query_slice.stop, counts, strengths, length, hidden.device)
        own = None if modulation is None else modulation.at(vector, hidden.dtype)
        hidden = backend.run_blocks(
            self.blocks, hidden, query_slice, vector, rope, mask, split, own
        )
        patch = self.config.patch_size
        velocity = unpatchify(self.last(hidden, time), *grid_size(latents, patch), patch)
        return velocity[..., : latents.shape[-2], : latents.shape[-1]]

    def record(
        self,
        references: Sequence[Tensor | Reference],
        dtype: torch.dtype,
        backend_for: Callable[[KVRecorder], Backend] = lambda recorder: ExtendedBackend(
            None, recorder
        ),
    ) -> ReferenceKVCache:
        """What attention reads of references at time 0 that see themselves alone, for many steps.

        Pass the result to `ExtendedBackend` of each step instead of `references` to the call. It
        holds 2 x layers x key/value width values a token. dtype: that of the text.
        """
        result = ReferenceKVCache()
        for reference in with_indices(references):
            latents = reference.latents
            image = self.first(self._patches(latents, dtype))
            grid = (reference.index, *grid_size(latents, self.config.patch_size))
            backend = backend_for(result.recorder(reference.strength))
            embed = functools.partial(self._embed_time, dtype=dtype)
            none, positions = image[:, :0], _positions(0, (grid,))
            text, image, *patched = backend.prepare_tokens(none, image, *positions)
            _, vector = backend.embed_time(embed, torch.zeros(len(latents), device=latents.device))
            rope = self._rope_for(tuple(patched), image.device)
            query_slice = slice(0, image.shape[1])
            backend.run_blocks(self.blocks, image, query_slice, vector, rope, None, None)
        return result

    def _patches(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents (B, C, h, w) to patches (B, L, C * p * p)."""
        self._check_latents(latents)
        return patchify(self._pad(latents).to(dtype), self.config.patch_size)

    def _fuse(self, taps: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
        return self.txtmlp(self.txtfusion(taps, mask, backend))

    def _embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The time embedding (B, 1, D) and the blocks' shared vector (B, 1, 6 D), float32."""
        embedding = timestep_embedding(timestep, self.config.timestep_embed_dim)
        time = self.tmlp(embedding.to(dtype)[:, None])
        return time, self.tproj(time).float()

    @outside_graphs
    def _rope_for(self, positions: tuple[Tensor, ...], device: torch.device) -> Tensor:
        """The rotary table of text and image positions, (1, L, 3) each; the last four are cached.

        The next step needs the same ones: for the positive, the negative and regional texts.
        """
        for index, (known, table) in enumerate(self._rope):
            if table.device == device and all(map(_same, known, positions)):
                self._rope.append(self._rope.pop(index))
                return table
        # A table outlives this call, and one made in inference mode could not be trained with.
        with torch.inference_mode(False):
            whole = torch.cat([part.to("cpu", torch.float32) for part in positions], dim=1)
            table = rope_table(whole, self.config.axes_dims_rope, self.config.rope_theta)
            table = table.to(device)
        # Positions that come from the cache are recognised without a look at their numbers.
        self._rope = [*self._rope[-3:], (positions, table)]
        return table

    def forget_tables(self) -> None:
        """Let go of rotary tables, which lie on the device of the last call."""
        self._rope = []

    def _pad(self, latents: Tensor) -> Tensor:
        patch = self.config.patch_size
        bottom, right = -latents.shape[-2] % patch, -latents.shape[-1] % patch
        if not (bottom or right):
            return latents
        return F.pad(latents, (0, right, 0, bottom), mode="replicate")

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.in_channels // self.config.patch_size**2
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"Latents have shape {tuple(latents.shape)}; Krea 2 needs (batch, {channels}, "
                "height / 8, width / 8), as the Qwen-Image VAE makes them."
            )


def _sides(hidden: Tensor, split: int) -> tuple[Tensor, ...]:
    """The tokens of each time vector."""
    return hidden.tensor_split([split], dim=1)


def _residual(hidden: Tensor, gate: Tensor, update: Tensor, split: int | None) -> Tensor:
    if split is None:
        return gated_residual(hidden, gate, update)
    sides = zip(_sides(hidden, split), gate.split(1, 1), _sides(update, split), strict=True)
    done = [gated_residual(*side) for side in sides]
    return hidden if may_overwrite() else torch.cat(done, dim=1)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) in float32 of times (B,) in [0, 1], cosines first."""
    half = dim // 2
    frequencies = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(1e4) * frequencies / half)
    angle = 1000.0 * timestep.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def grid_size(latents: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches that cover latents (..., h, w)."""
    return -(-latents.shape[-2] // patch), -(-latents.shape[-1] // patch)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, h/p * w/p, C * p * p)."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(patches: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(B, rows * columns, C * p * p) -> (B, C, rows * p, columns * p)."""
    return rearrange(
        patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=patch, q=patch
    )


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


@outside_graphs
@functools.lru_cache(maxsize=16)
def _positions(text_tokens: int, grids: tuple[tuple[int, int, int], ...]) -> tuple[Tensor, Tensor]:
    """Rotary positions (1, L, 3) of text, all zero, and of images, see `grid_positions`."""
    with torch.inference_mode(False):
        return torch.zeros(1, text_tokens, 3), grid_positions(grids)[None]


def grid_positions(grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Rotary positions (L, 3) of images by (index, rows, columns): (index, row, column)."""
    positions = []
    for index, rows, columns in grids:
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        positions.append(F.pad(grid, (1, 0), value=index).float())
    return torch.cat(positions)
