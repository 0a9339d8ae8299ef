"""The Krea 2 transformer: text fusion and a single-stream MMDiT over `[text, image]` tokens.

Unusual in this model: each token of text arrives as twelve tapped encoder layers, which a small
transformer fuses; one time vector modulates every block, and each block only adds a learned table
to it; norms are zero-centred; attention output is gated by a sigmoid of the input; all text tokens
have rotary position zero.

Architecture checked against krea-ai/krea-2 (mmdit.py), diffusers' Krea2Transformer2DModel and
ComfyUI's own Krea 2. The layers are in blocks.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Preset, TransformerConfig
from ..nn.attention import rope_table
from ..nn.compiler import outside_graphs
from ..nn.layers import TorchLayers, ZeroCentredRMSNorm
from .backend import TORCH_BACKEND, Backend, ExtendedBackend
from .blocks import FinalLayer, SingleStreamBlock, TextFusion
from .modulation import RunModulation
from .patches import grid_size, patchify, unpatchify
from .references import (
    REFERENCE_METHODS,
    TIME_ZERO,
    KVRecorder,
    Reference,
    ReferenceKVCache,
    add_strength_bias,
    with_indices,
)
from .rotary_scaling import Stretch


class Krea2Transformer(nn.Module):
    """Predicts the flow-matching velocity `noise - image` of image latents from text.

    Call `fuse_text` once a prompt and the model itself once a step: the text does not depend on
    the time.

    A host that needs other calling conventions of the layers overrides `block_class`,
    `text_fusion_class` and the `..._class` attributes of the layers.
    """

    block_class: type[SingleStreamBlock] = SingleStreamBlock
    text_fusion_class: type[TextFusion] = TextFusion

    def __init__(
        self,
        config: TransformerConfig,
        layers=TorchLayers,
        device=None,
        dtype=None,
        *,
        variant: str | None = None,
        preset: Preset | None = None,
    ):
        super().__init__()
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {config.axes_dims_rope} sums to {sum(config.axes_dims_rope)}; "
                f"it has to equal attention_head_dim {config.attention_head_dim}."
            )
        factory = {"device": device, "dtype": dtype}
        dim = config.hidden_size
        self.config = config
        self.variant, self.preset = variant, preset
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
        self._rope: list[tuple[tuple[Tensor, ...], Stretch | None, Tensor]] = []

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
        Returns (B, L, width). Rows of masked tokens are undefined.
        Raises ValueError for taps of another text encoder.
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
        origin: tuple[int, int] = (0, 0),
        stretch: Stretch | None = None,
    ) -> Tensor:
        """Velocity at a time of the flow.

        latents: (B, C, h, w), normalised. Odd h or w is padded by repeating the last row or
            column and cropped again.
        timestep: (B,) in [0, 1]; 1 is pure noise, 0 the image.
        text: (B, L, width) from `fuse_text`; text_mask: (B, L) bool or None.
        references: latents (B, C, h_i, w_i) of reference images, at rotary index 1, 2, ...; or
            `Reference`, with strength and index.
        reference_method: "index_timestep_zero" modulates reference tokens as finished images
            (time 0), "index" with the step's own time.
        backend: attention, norms and the loop over blocks.
        modulation: tables and norm weights of all blocks, read once for many steps; None reads
            them here.
        origin: row and column of the first token, for a tile of a larger image.
        stretch: of rotary positions, see `rotary_scaling`.
        Returns (B, C, h, w) in the dtype of `text`.
        """
        if reference_method not in REFERENCE_METHODS:
            raise ValueError(
                f"reference_method is {reference_method!r}; expected one of {REFERENCE_METHODS}."
            )
        indexed = with_indices(references)
        patches = [
            self._patches(image, text.dtype) for image in (latents, *(r.latents for r in indexed))
        ]
        # One reference for all images of a batch.
        patches = [part.expand(max(len(latents), len(part)), -1, -1) for part in patches]
        image_tokens, *counts = (part.shape[1] for part in patches)
        tokens = self.first(torch.cat(patches, dim=1))
        del patches
        patch = self.config.patch_size
        grids = ((0, *grid_size(latents, patch), *origin), *(_grid_of(r, patch) for r in indexed))
        positions = _positions(text.shape[1], grids)
        text, image, *patched = backend.prepare_tokens(text, tokens, *positions)
        text_tokens = text.shape[1]
        rope = self._rope_for(tuple(patched), text.device, stretch)

        embed = functools.partial(self._embed_time, dtype=text.dtype)
        time, vector = backend.embed_time(embed, timestep)
        split = None
        if indexed and reference_method == TIME_ZERO:
            _, vector_at_zero = backend.embed_time(embed, torch.zeros_like(timestep))
            vector = torch.cat((vector, vector_at_zero), dim=1)
            split = text_tokens + image_tokens

        hidden = torch.cat((text, image), dim=1)
        del text, image, tokens  # a hidden state less while the blocks run
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask, (0, hidden.shape[1] - text_mask.shape[1]), value=True)
            mask = mask[:, None, None, :]
        query_slice = (text_tokens, text_tokens + image_tokens)
        strengths, length = [r.settings.strength for r in indexed], hidden.shape[1]
        mask = add_strength_bias(mask, query_slice[1], counts, strengths, length, hidden.device)
        step = None if modulation is None else modulation.at(vector, hidden.dtype)
        hidden = backend.run_blocks(
            self.blocks, hidden, query_slice, vector, rope, mask, split, step
        )
        velocity = unpatchify(self.last(hidden, time), *grid_size(latents, patch), patch)
        return velocity[..., : latents.shape[-2], : latents.shape[-1]]

    def cache_references(
        self,
        references: Sequence[Tensor | Reference],
        dtype: torch.dtype,
        backend_for: Callable[[KVRecorder], Backend] = lambda recorder: ExtendedBackend(
            None, recorder
        ),
    ) -> ReferenceKVCache:
        """Keys and values of references at time zero that attend only to themselves.

        Pass the result to the `ExtendedBackend` of each step instead of `references` to the call.
        It holds 2 x layers x key/value width values per token. dtype: that of the text.
        """
        cache = ReferenceKVCache()
        for reference in with_indices(references):
            latents = reference.latents
            image = self.first(self._patches(latents, dtype))
            grid = _grid_of(reference, self.config.patch_size)
            backend = backend_for(cache.recorder(reference.settings.strength))
            embed = functools.partial(self._embed_time, dtype=dtype)
            no_text, positions = image[:, :0], _positions(0, (grid,))
            _, image, *patched = backend.prepare_tokens(no_text, image, *positions)
            _, vector = backend.embed_time(embed, torch.zeros(len(latents), device=latents.device))
            rope = self._rope_for(tuple(patched), image.device)
            query_slice = (0, image.shape[1])
            backend.run_blocks(self.blocks, image, query_slice, vector, rope, None, None)
        return cache

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

    def rotation(self, position: tuple[float, float, float], device: torch.device) -> Tensor:
        """The rotary table (1, 1, 1, D/2, 2, 2) of one position: index, row, column.

        It turns rotated queries and keys on by that distance.
        """
        with torch.inference_mode(False):
            place = torch.tensor([[position]], dtype=torch.float32)
            return rope_table(place, self.config.axes_dims_rope, self.config.rope_theta).to(device)

    @outside_graphs
    def _rope_for(
        self, positions: tuple[Tensor, ...], device: torch.device, stretch: Stretch | None = None
    ) -> Tensor:
        """The rotary table of text and image positions, (1, L, 3) each; the last four are cached.

        A run uses a few at every step: for the positive, the negative and regional texts.
        """
        for index, (known, of_stretch, table) in enumerate(self._rope):
            if (
                table.device == device
                and of_stretch == stretch
                and all(map(_same, known, positions))
            ):
                self._rope.append(self._rope.pop(index))
                return table
        # A table outlives this call, and one made in inference mode could not be trained with.
        with torch.inference_mode(False):
            joined = torch.cat([part.to("cpu", torch.float32) for part in positions], dim=1)
            dims, theta = self.config.axes_dims_rope, self.config.rope_theta
            frequencies = None if stretch is None else stretch.frequencies(dims, theta)
            table = rope_table(joined, dims, theta, frequencies)
            table = table.to(device)
        # Positions from `_positions`' own cache are the same objects, compared without a read.
        self._rope = [*self._rope[-3:], (positions, stretch, table)]
        return table

    def forget_tables(self) -> None:
        """Free the cached rotary tables, which are on the device of the last call."""
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


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) in float32 of times (B,) in [0, 1], cosines first."""
    half = dim // 2
    frequencies = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(1e4) * frequencies / half)
    angle = 1000.0 * timestep.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def _grid_of(reference: Reference, patch: int) -> tuple[float, ...]:
    """Index, rows, columns and offset of a reference, for `grid_positions`."""
    settings = reference.settings
    assert settings.index is not None  # `with_indices` fills it in
    return settings.index, *grid_size(reference.latents, patch), *settings.offset


@outside_graphs
@functools.lru_cache(maxsize=16)
def _positions(text_tokens: int, grids: tuple[tuple[float, ...], ...]) -> tuple[Tensor, Tensor]:
    """Rotary positions (1, L, 3) of text, all zero, and of images, see `grid_positions`."""
    with torch.inference_mode(False):
        return torch.zeros(1, text_tokens, 3), grid_positions(grids)[None]


def grid_positions(grids: Sequence[tuple[float, ...]]) -> Tensor:
    """Rotary positions (L, 3) of images: (index, row, column).

    grids: (index, rows, columns) of each, and perhaps an offset of its rows and of its columns.
    """
    positions = []
    for index, rows, columns, *offset in grids:
        grid = torch.cartesian_prod(torch.arange(int(rows)), torch.arange(int(columns))).float()
        if any(offset):
            grid = grid + torch.tensor(offset)
        positions.append(F.pad(grid, (1, 0), value=index))
    return torch.cat(positions)
