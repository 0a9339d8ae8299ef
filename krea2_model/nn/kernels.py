"""The element-wise work of a block, in as few passes over memory as torch allows.

Nine tenths of a step are matrix products; what is left is bound by memory. So sums stay in float32
and are rounded once, and where gradients are off results take the place of inputs that nobody else
holds: on a GPU that is less traffic and a lower peak, on a CPU it also spares fresh pages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import switches, triton_kernels

# First token and the one after the last. A tuple: torch's compiler takes the ends of a slice for
# constants, and would compile anew for every size.
Span = tuple[int, int]


class HeadNorm(NamedTuple):
    """The RMS norms of queries and keys: multipliers (D,) in float32, and the epsilon."""

    query: Tensor
    key: Tensor
    eps: float


def modulated_norm(hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`rms_norm(hidden) * (1 + scale) + shift`: hidden (B, L, D), the others (B, 1, D)."""
    normed = hidden * inverse_rms(hidden, eps)
    out = normed if may_overwrite() else None
    return torch.addcmul(shift.float(), normed, 1 + scale.float(), out=out).to(hidden.dtype)


def norm_and_rotate(
    query: Tensor,
    key: Tensor,
    norm: HeadNorm,
    rope: Tensor | None = None,
    query_slice: Span | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS norm over each head, then rotary positions: query (B, H, L, D), key (B, KV, L, D).

    rope: a `rope_table` of the keys, or None for no positions.
    query_slice: the tokens that the queries are of, None for all.
    """
    of_keys = None if rope is None else _rotations(rope)
    of_queries = of_keys
    if of_keys is not None and query_slice is not None:
        of_queries = of_keys[:, :, slice(*query_slice)]
    return (
        _norm_and_rotate(query, norm.query, norm.eps, of_queries),
        _norm_and_rotate(key, norm.key, norm.eps, of_keys),
    )


def apply_rope(heads: Tensor, rope: Tensor) -> Tensor:
    """Rotate interleaved channel pairs: (B, H, L, D) by a `rope_table`, in float32."""
    return _rotate(heads.float(), _rotations(rope)).to(heads.dtype)


def gated_residual(hidden: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`hidden + gate * update`, in the place of `hidden`: (B, L, D), gate (B, 1, D)."""
    if may_overwrite():
        return hidden.addcmul_(gate, update)
    return torch.addcmul(hidden, gate, update)


def sigmoid_gated(values: Tensor, gate: Tensor) -> Tensor:
    """`values * sigmoid(gate)`, in the place of both."""
    if "gate" in switches.active and _has_gated_kernel(gate, values):
        return _gated(gate, values, values, silu=False)
    if may_overwrite():
        return values.mul_(gate.sigmoid_())
    return values * torch.sigmoid(gate)


def silu_gated(gate: Tensor, values: Tensor) -> Tensor:
    """`silu(gate) * values`, in the place of `gate`."""
    if "swiglu" in switches.active and _has_gated_kernel(gate, values):
        return _gated(gate, values, gate, silu=True)
    if may_overwrite():
        return F.silu(gate, inplace=True).mul_(values)
    return F.silu(gate) * values


def _has_gated_kernel(gate: Tensor, values: Tensor) -> bool:
    """True if a Triton kernel computes a gated product; it has no gradients.

    A compiler fuses the plain formula by itself.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and gate.shape == values.shape
        and gate.dtype == values.dtype
        and gate.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and triton_kernels.takes(gate, values)
    )


def _gated(gate: Tensor, values: Tensor, place: Tensor, silu: bool) -> Tensor:
    from .triton_kernels.gates import gated

    return gated(gate, values, place if may_overwrite() else None, silu=silu)


_inputs = threading.local()


@contextmanager
def keeping_inputs() -> Iterator[None]:
    """Within it no input is overwritten, since a host may still hold it."""
    before, _inputs.stay = getattr(_inputs, "stay", False), True
    try:
        yield
    finally:
        _inputs.stay = before


def may_overwrite() -> bool:
    """True if results may be written over inputs; a compiler decides that for itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not getattr(_inputs, "stay", False)


def _has_complex_numbers(device: torch.device) -> bool:
    """True if a device multiplies complex numbers; no compiler does."""
    return device.type in ("cpu", "cuda", "xpu", "meta") and not torch.compiler.is_compiling()


def _rotations(rope: Tensor) -> Tensor:
    """A `rope_table` as complex numbers (B, 1, L, D/2), or as it is where there are none."""
    if not _has_complex_numbers(rope.device):
        return rope
    return torch.complex(rope[..., 0, 0], rope[..., 1, 0])


def _rotate(values: Tensor, rotations: Tensor) -> Tensor:
    """Rotate pairs of channels of float32 values into a new tensor."""
    pairs = values.unflatten(-1, (-1, 2))
    if rotations.is_complex():
        rotated = torch.view_as_complex(pairs.contiguous()) * rotations
        return torch.view_as_real(rotated).flatten(-2)
    rotated = rotations[..., 0] * pairs[..., :1] + rotations[..., 1] * pairs[..., 1:]
    return rotated.flatten(-2)


def _norm_and_rotate(heads: Tensor, multiplier: Tensor, eps: float, rotations) -> Tensor:
    inverse = inverse_rms(heads, eps)
    if not may_overwrite():
        scaled = heads * multiplier * inverse
        return (scaled if rotations is None else _rotate(scaled, rotations)).to(heads.dtype)
    # In 16 bits a float32 copy, in float32 the projection's own result.
    scaled = heads.float().mul_(multiplier)
    if rotations is not None and rotations.is_complex():
        pairs = torch.view_as_complex(scaled.unflatten(-1, (-1, 2)))
        pairs.mul_(rotations).mul_(inverse)
    else:
        scaled.mul_(inverse)
        if rotations is not None:
            scaled = _rotate(scaled, rotations)
    return scaled.to(heads.dtype)


def inverse_rms(values: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(values ** 2) + eps)` over the last axis, (..., 1) in float32."""
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square() / values.shape[-1] + eps)
