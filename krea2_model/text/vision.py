"""The vision tower of Qwen3-VL: an image to tokens of the language tower's width.

A still image is a film of two equal frames to it, so patches hold every pixel twice. Patches are
ordered by blocks of 2 x 2, which the merger makes one token of. Three blocks inside the tower give
features of their own (DeepStack), which are added to the outputs of the first language layers.
Checked against transformers' Qwen3VLVisionModel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import VisionConfig
from ..nn.attention import Attend, attend
from ..nn.layers import TorchLayers
from .decoder import rotate_halves

PATCHES = "patch_embed.proj.weight"
_ROPE_THETA = 10_000.0
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image, as the language tower reads them.

    tokens: (N, width), in rows of `grid`. deepstack: the same shape for each of the first layers.
    grid: rows and columns of tokens, N together.
    """

    tokens: Tensor
    deepstack: tuple[Tensor, ...]
    grid: tuple[int, int]


class VisionAttention(nn.Module):
    """Full attention among the patches of one image."""

    def __init__(self, config: VisionConfig, layers, attend: Attend, **factory):
        super().__init__()
        dim = config.hidden_size
        self.heads, self.attend = config.num_heads, attend
        self.qkv = layers.Linear(dim, 3 * dim, bias=True, **factory)
        self.proj = layers.Linear(dim, dim, bias=True, **factory)

    def forward(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        heads = rearrange(
            self.qkv(hidden), "b l (three h d) -> three b h l d", three=3, h=self.heads
        )
        query, key, value = heads.unbind()
        query, key = rotate_halves(query, rotation), rotate_halves(key, rotation)
        return self.proj(self.attend(query, key, value, None))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig, layers, **factory):
        super().__init__()
        dim, inner = config.hidden_size, config.intermediate_size
        self.linear_fc1 = layers.Linear(dim, inner, bias=True, **factory)
        self.linear_fc2 = layers.Linear(inner, dim, bias=True, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, layers, attend: Attend, **factory):
        super().__init__()
        dim = config.hidden_size
        self.norm1 = layers.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.norm2 = layers.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.attn = VisionAttention(config, layers, attend, **factory)
        self.mlp = VisionMLP(config, layers, **factory)

    def forward(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), rotation)
        return hidden + self.mlp(self.norm2(hidden))


class Merger(nn.Module):
    """Four neighbouring patches to one token of the language tower's width.

    The norm is over each patch, or (`merged_norm`, for DeepStack) over the four together.
    """

    def __init__(self, config: VisionConfig, layers, merged_norm: bool = False, **factory):
        super().__init__()
        patches = config.spatial_merge_size**2
        self.width, self.merged_norm = config.hidden_size * patches, merged_norm
        norm_width = self.width if merged_norm else config.hidden_size
        self.norm = layers.LayerNorm(norm_width, eps=_NORM_EPS, **factory)
        self.linear_fc1 = layers.Linear(self.width, self.width, bias=True, **factory)
        self.linear_fc2 = layers.Linear(self.width, config.out_hidden_size, bias=True, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L / 4, width)."""
        if self.merged_norm:
            hidden = self.norm(hidden.unflatten(1, (-1, self.width // hidden.shape[2])).flatten(2))
        else:
            hidden = self.norm(hidden).reshape(len(hidden), -1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden)))


class PatchEmbedding(nn.Module):
    """A patch (channels, frames, rows, columns), flat, to a state; 5-D in checkpoints."""

    def __init__(self, config: VisionConfig, layers, **factory):
        super().__init__()
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.proj = layers.Linear(values, config.hidden_size, bias=True, **factory)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class Qwen3VLVisionTower(nn.Module):
    """Pixels to the tokens, and DeepStack features, that the language tower reads."""

    def __init__(
        self,
        config: VisionConfig,
        layers=TorchLayers,
        device=None,
        dtype: torch.dtype | None = None,
        attend: Attend = attend,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.patch_embed = PatchEmbedding(config, layers, **factory)
        self.pos_embed = layers.Embedding(
            config.num_position_embeddings, config.hidden_size, **factory
        )
        self.blocks = nn.ModuleList(
            VisionBlock(config, layers, attend, **factory) for _ in range(config.depth)
        )
        self.merger = Merger(config, layers, **factory)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, layers, merged_norm=True, **factory)
            for _ in config.deepstack_visual_indexes
        )

    def forward(self, pixels: Tensor) -> ImageTokens:
        """The tokens of one image.

        pixels: (3, H, W) in [0, 1], both sides multiples of `config.token_side`, as
            `resize_for_tower` makes them.
        Raises ValueError for another shape.
        """
        side = self.config.token_side
        if pixels.ndim != 3 or pixels.shape[0] != 3 or any(n % side for n in pixels.shape[1:]):
            raise ValueError(
                f"The image has shape {tuple(pixels.shape)}; expected (3, height, width), both "
                f"sides multiples of {side}, as resize_for_tower makes them."
            )
        rows, columns = (n // self.config.patch_size for n in pixels.shape[1:])
        return self.see(self._patches(pixels), rows, columns)

    def see(self, patches: Tensor, rows: int, columns: int) -> ImageTokens:
        """The tokens of one image from its patches (1, rows * columns, values), in -1 to 1.

        Patches are ordered by blocks that become one token, and each is (channels, frames, rows,
        columns), flat.
        """
        hidden = self.patch_embed(patches)
        hidden = hidden + self._positions(rows, columns, patches.device).to(hidden.dtype)
        rotation = self._rotation(rows, columns).to(patches.device)
        deepstack = []
        mergers = iter(self.deepstack_merger_list)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, rotation)
            if index in self.config.deepstack_visual_indexes:
                deepstack.append(next(mergers)(hidden)[0])
        merge = self.config.spatial_merge_size
        grid = (rows // merge, columns // merge)
        return ImageTokens(self.merger(hidden)[0], tuple(deepstack), grid)

    def _patches(self, pixels: Tensor) -> Tensor:
        """(1, L, values) from -1 to 1, every pixel as often as a film would have frames."""
        config = self.config
        patches = rearrange(
            pixels * 2 - 1,
            "c (h i p) (w j q) -> (h w i j) c p q",
            i=config.spatial_merge_size,
            j=config.spatial_merge_size,
            p=config.patch_size,
            q=config.patch_size,
        )
        frames = patches[:, :, None].expand(-1, -1, config.temporal_patch_size, -1, -1)
        return frames.reshape(1, len(patches), -1)

    def _positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The learned grid of positions stretched over the image's, (1, L, D) in float32."""
        side = math.isqrt(self.config.num_position_embeddings)
        table = self.pos_embed(torch.arange(side * side, device=device)).float()
        grid = F.interpolate(
            table.T.reshape(1, -1, side, side), (rows, columns), mode="bilinear", align_corners=True
        )
        return self._by_blocks(grid[0]).T[None]

    def _rotation(self, rows: int, columns: int) -> Tensor:
        """Cosines and sines (2, 1, 1, L, head / 2): half of the angles by row, half by column."""
        count = self.config.hidden_size // self.config.num_heads // 4
        frequencies = 1.0 / _ROPE_THETA ** (torch.arange(count, dtype=torch.float32) / count)
        places = torch.stack(
            torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        )
        angles = self._by_blocks(places.float()).T[..., None] * frequencies
        angles = angles.flatten(1)
        return torch.stack((angles.cos(), angles.sin()))[:, None, None]

    def _by_blocks(self, grid: Tensor) -> Tensor:
        """(C, rows, columns) -> (C, L) in the order of patches."""
        merge = self.config.spatial_merge_size
        return rearrange(grid, "c (h i) (w j) -> c (h w i j)", i=merge, j=merge)


def resize_for_tower(
    pixels: Tensor, max_side: int = 384, side: int = 32, *, enlarge: bool = False
) -> Tensor:
    """An image (3, H, W) in [0, 1] at the size the tower sees it, of about its own proportions.

    max_side: no more pixels than a square of this side has, which is what style and edit LoRAs
        were trained with. side: what both sides become a multiple of. enlarge: smaller ones too.
    Raises ValueError for no image and for one too narrow to have proportions.
    """
    height, width = _check_image(pixels)
    if max_side < side:
        raise ValueError(f"max_side is {max_side}; expected at least {side}, the side of a token.")
    scale = max_side / math.sqrt(height * width)
    scale = scale if enlarge else min(1.0, scale)
    target = [max(side, round(length * scale / side) * side) for length in (height, width)]
    while target[0] * target[1] > max_side**2 and max(target) > side:
        longer = int(target[1] > target[0])
        target[longer] -= side
    return _resized(pixels, *target)


def resize_to_longest(pixels: Tensor, longest: int, side: int = 32) -> Tensor:
    """An image (3, H, W) in [0, 1] for the tower, its longest side at most so many pixels.

    Identity-edit LoRAs were trained with 384 to 768. Raises ValueError as `resize_for_tower`.
    """
    height, width = _check_image(pixels)
    scale = min(1.0, longest / max(height, width))
    return _resized(
        pixels, *(max(side, round(length * scale / side) * side) for length in (height, width))
    )


def _check_image(pixels: Tensor) -> tuple[int, int]:
    """Height and width of an image. Raises ValueError for no image and for one too narrow."""
    if pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ValueError(f"The image has shape {tuple(pixels.shape)}; expected (3, height, width).")
    height, width = pixels.shape[1:]
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"The image is {width} x {height} px; expected one side at most 200 times the other. "
            "Crop it."
        )
    return height, width


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels
    resized = F.interpolate(pixels[None].float(), (height, width), mode="bicubic", antialias=True)
    return resized[0].clamp(0, 1).to(pixels.dtype)


def vision_keys(names: Iterable[str]) -> dict[str, str]:
    """The tensors of a checkpoint that the tower needs: their names there to its own.

    The prefix (`model.visual.`, `visual.`, ...) is what precedes the patch embedding. Empty where
    the file has no vision tower.
    """
    names = list(names)
    prefixes = [name.removesuffix(PATCHES) for name in names if name.endswith("visual." + PATCHES)]
    if len(prefixes) != 1:
        return {}
    return {n: n.removeprefix(prefixes[0]) for n in names if n.startswith(prefixes[0])}


def infer_vision_config(shapes: Mapping[str, tuple[int, ...]]) -> VisionConfig:
    """Read the sizes off the tower's tensors, given by its own names; the rest is as released."""
    width, channels, frames, patch, _ = shapes[PATCHES]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    mergers = len({n.split(".")[1] for n in shapes if n.startswith("deepstack_merger_list.")})
    step = depth // (mergers + 1)
    return VisionConfig(
        depth=depth,
        hidden_size=width,
        intermediate_size=shapes["blocks.0.mlp.linear_fc1.weight"][0],
        num_heads=max(1, width // 64),
        in_channels=channels,
        patch_size=patch,
        temporal_patch_size=frames,
        out_hidden_size=shapes["merger.linear_fc2.weight"][0],
        num_position_embeddings=shapes["pos_embed.weight"][0],
        # At 24 blocks the released 5, 11, 17.
        deepstack_visual_indexes=tuple(step * (index + 1) - 1 for index in range(mergers)),
    )
