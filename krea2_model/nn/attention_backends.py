"""The choice of torch's attention backend on a GPU, by a table of the fastest.

Torch takes the first of its backends that supports a call. ComfyUI has it try flash attention
before all others, on every card. The table (switch `cudnn`) names a better one for some cards and
lengths. A user who disables or reorders torch's backends keeps that choice.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import switches

Capability = tuple[int, int]


class Lengths(NamedTuple):
    """The fastest backend from a number of keys on, until the next entry."""

    least: int
    backend: SDPBackend


# By compute capability and dtype, lengths rising. On an H200 cuDNN's kernel, which is made for
# Hopper, takes 0.49 to 0.64 of the time of torch's flash attention (FA2, made for the card before
# it) at all lengths from 1088 to 16448 in bf16: benchmarks/gpu/GPU.md.
TABLE: dict[tuple[Capability, torch.dtype], tuple[Lengths, ...]] = {
    ((9, 0), torch.bfloat16): (Lengths(1024, SDPBackend.CUDNN_ATTENTION),),
    ((9, 0), torch.float16): (Lengths(1024, SDPBackend.CUDNN_ATTENTION),),
}

# The backends that torch tries in turn where the chosen one does not support a call.
OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

_SETS_PRIORITY = "set_priority" in inspect.signature(sdpa_kernel).parameters


def fastest_backend(capability: Capability, dtype: torch.dtype, length: int) -> SDPBackend | None:
    """The backend for a number of keys, or None for torch's own choice."""
    backend = None
    for entry in TABLE.get((capability, dtype), ()):
        if length >= entry.least:
            backend = entry.backend
    return backend


def preferred(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> SDPBackend | None:
    """The table's backend for heads (B, H, L, D), or None where torch's own choice stands.

    With fewer key/value heads than query heads the backend has to support grouped heads.
    """
    if "cudnn" not in switches.active or mask is not None or not _is_nvidia(query):
        return None
    capability = torch.cuda.get_device_capability(query.device)
    backend = fastest_backend(capability, query.dtype, key.shape[2])
    if backend is None or not _SETS_PRIORITY:
        return None
    # Not while compiling, which cannot ask torch; an unsupported call goes to the next backend.
    if not torch.compiler.is_compiling() and not (
        is_torchs_own_choice() and _supports(backend, query, key, value)
    ):
        return None
    return backend


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options) -> Tensor:
    """torch's scaled_dot_product_attention, with the table's backend first."""
    backend = preferred(query, key, value, mask)
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, mask, **options)
    order = [backend, *(other for other in OTHERS if other is not backend)]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, mask, **options)


def is_torchs_own_choice() -> bool:
    """True if torch's backends are all on, and in an order that torch itself gives them.

    On a Hopper torch puts cuDNN first when attention is called for the first time.
    """
    return _settings() in (_DEFAULTS, _CUDNN_FIRST)


def _settings() -> tuple:
    cuda = torch.backends.cuda
    flags = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    order: list[int] = getattr(torch._C, "_get_sdp_priority_order", list)()
    # Backends of other makers stand last in it.
    return *flags, *order[:4]


# Read before any user has a say, but a host may have been earlier: the flags are all on at first.
_ORDER = _settings()[4:]
_CUDNN = int(SDPBackend.CUDNN_ATTENTION.value)
_DEFAULTS = (True,) * 4 + _ORDER
_CUDNN_FIRST = (True,) * 4 + (_CUDNN, *(backend for backend in _ORDER if backend != _CUDNN))


def _is_nvidia(query: Tensor) -> bool:
    return query.device.type == "cuda" and torch.version.cuda is not None


def _supports(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if a backend supports this call without repeating heads, by torch's own check."""
    cuda = torch.backends.cuda
    grouped = query.shape[1] != key.shape[1]
    params = cuda.SDPAParams(query, key, value, None, 0.0, False, grouped)
    if backend is SDPBackend.CUDNN_ATTENTION:
        return cuda.can_use_cudnn_attention(params)
    if backend is SDPBackend.FLASH_ATTENTION:
        return cuda.can_use_flash_attention(params)
    if backend is SDPBackend.EFFICIENT_ATTENTION:
        return cuda.can_use_efficient_attention(params)
    return backend is SDPBackend.MATH
