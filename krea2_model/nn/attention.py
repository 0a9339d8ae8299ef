"""Rotary positions and the one attention function.

Every attention of this package passes through `attend`; a host passes its own where it chooses the
backend or lets others patch queries and keys (`Backend` in transformer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as cuda_backend

from . import attention_backends, switches

# (query, key, value, mask) -> (B, L, H * D); see `attend`.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads.

    query: (B, H, L, D); key and value: (B, KV, L, D) where KV divides H.
    mask: None, a boolean mask (True takes part) or an additive float mask, broadcastable to
        (B, H, L, L): (B, 1, 1, L) hides padding keys.
    Returns (B, L, H * D).
    """
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype)
    grouped = mask is None and takes_grouped_heads(query)
    if not grouped:
        key, value = repeat_heads(query, key, value)
    options = {"enable_gqa": True} if grouped else {}
    by_table = "cudnn" in switches.active
    attention = attention_backends.attention if by_table else F.scaled_dot_product_attention
    out = attention(query, key, value, mask, **options)
    return out.transpose(1, 2).flatten(2)


def takes_grouped_heads(query: Tensor) -> bool:
    """True if torch has a fused kernel for grouped heads without a mask.

    Elsewhere the score matrix of the image would be held in memory.
    """
    available = getattr(cuda_backend, "is_flash_attention_available", None)
    if available is None:
        return False  # torch learned of grouped heads in the release that brought this
    if query.device.type != "cuda" or not torch.version.cuda:
        return query.device.type == "cpu"
    return (
        available()
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, KV, L, D) repeated to the heads of the query: (B, H, L, D)."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def rope_table(
    positions: Tensor,
    axes_dims: tuple[int, ...],
    theta: float,
    frequencies: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Rotation matrices for positions along several axes.

    positions: (B or 1, L, axes). Each axis owns `axes_dims[i]` channels of a head, in interleaved
        pairs.
    frequencies: of each axis, (axes_dims[i] / 2,) in float64, None for powers of theta.
    Angles are computed in float64 on the CPU, since not every device has float64.
    Returns (B or 1, 1, L, D/2, 2, 2) in float32 on the CPU: `[[cos, -sin], [sin, cos]]` a pair,
    the layout that Flux-style code (and ComfyUI's kernels) expect.
    """
    positions = positions.to(device="cpu", dtype=torch.float64)
    angles = []
    for axis, dim in enumerate(axes_dims):
        own = None if frequencies is None else frequencies[axis]
        if own is None:
            own = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[..., axis, None] * own)
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    return table.float()[:, None]
