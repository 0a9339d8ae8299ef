"""Rotary positions and the one attention function.

`attend` is the seam through which every attention of this package passes. A host hands in its own
callable with the same signature to choose a backend or to let others patch queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (query, key, value, rope, mask) -> (B, L, H * D); see `attend`.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, then scaled dot-product attention with grouped key/value heads.

    query: (B, H, L, D); key and value: (B, KV, L, D) where KV divides H.
    rope: rotations from `rope_table`, or None for no positions.
    mask: None, a boolean mask (True takes part) or an additive float mask, broadcastable to
        (B, H, L, L): (B, 1, 1, L) hides padding keys.
    Returns (B, L, H * D).
    """
    if rope is not None:
        query, key = rotate(query, rope), rotate(key, rope)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype)
    key, value = repeat_heads(query, key, value)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, KV, L, D) repeated to the heads of the query: (B, H, L, D).

    Not every GPU has a fused kernel for grouped heads, and without one the scores of the whole
    image are held in memory.
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def rope_table(positions: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Rotation matrices for positions along several axes.

    positions: (B or 1, L, axes). Each axis owns `axes_dims[i]` channels of a head, in interleaved
        pairs.
    Angles are computed in float64 on the CPU, since not every device has float64.
    Returns (B or 1, 1, L, D/2, 2, 2) in float32 on the CPU: `[[cos, -sin], [sin, cos]]` a pair,
    the layout that Flux-style code (and ComfyUI's kernels) expect.
    """
    positions = positions.to(device="cpu", dtype=torch.float64)
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles.append(positions[..., axis, None] * theta**-exponents)
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    return table.float()[:, None]


def rotate(heads: Tensor, rope: Tensor) -> Tensor:
    """Rotate interleaved channel pairs: (B, H, L, D) by a `rope_table`, in float32."""
    pairs = heads.float().unflatten(-1, (-1, 1, 2))
    rotated = rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]
    return rotated.flatten(-2).to(heads.dtype)
