"""The layer namespace, and the leaf modules for weights that torch.nn has no layer for.

Every module of this package takes a `layers` namespace and builds its weights from it:
`TorchLayers` here, cast and quantised layers of a host such as ComfyUI elsewhere. The zero-centred
norm scales and the modulation tables of Krea 2 are bare parameters in the official checkpoints
(`...prenorm.scale`, `...mod.lin`). Here each is the `weight` of a leaf module of its own
(`...prenorm.scale.weight`), because hosts move, cast and patch leaf modules, not parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Result = TypeVar("Result")


class NormScale(nn.Module):
    """A zero-centred norm scale: stored around 0, applied as `1 + weight` in float32.

    `read(device, use)` gives `use(weight)` for the weight in float32 on a device; a host may hold
    it elsewhere, so nothing but the result outlives the call.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def read(self, device: torch.device, use: Callable[[Tensor], Result]) -> Result:
        return use(self.weight.to(device=device, dtype=torch.float32))

    def forward(self, device: torch.device) -> Tensor:
        """The multiplier (D,) in float32 on `device`."""
        return self.read(device, lambda weight: weight + 1.0)


class ModulationTable(nn.Module):
    """A learned offset to a shared modulation vector; `shape` is how the checkpoint stores it."""

    def __init__(self, *shape: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

    def forward(self, vector: Tensor) -> Tensor:
        """`vector + weight` in float32."""
        return vector.float() + self.weight.to(device=vector.device, dtype=torch.float32)


def read_scales(
    scales: Sequence[NormScale], device: torch.device, use: Callable[..., Result]
) -> Result:
    """`use(*weights)` with the weights of several norm scales, as `NormScale.read` gives one."""
    if not scales:
        return use()
    first, *rest = scales
    return first.read(
        device,
        lambda weight: read_scales(rest, device, lambda *others: use(weight, *others)),
    )


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        # Random numbers without a memory would make torch import its compiler.
        if not self.weight.is_meta:
            super().reset_parameters()


def share_input(
    hidden: Tensor, *layers: Callable[[Tensor], Tensor]
) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Layers that all read `hidden`, as what to call with it in their place: here themselves.

    A host whose layers make something of their input first may do that once for all.
    """
    return layers


class TorchLayers:
    """The default layer namespace: plain torch.nn."""

    Linear = nn.Linear
    Conv2d = nn.Conv2d
    Embedding = Embedding
    LayerNorm = nn.LayerNorm
    RMSNorm = nn.RMSNorm
    NormScale = NormScale
    ModulationTable = ModulationTable


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm whose multiplier is `1 + scale`, computed in float32 (krea-ai/krea-2, mmdit.py)."""

    def __init__(self, dim: int, eps: float, layers, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.scale = layers.NormScale(dim, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        multiplier = self.scale(hidden.device)
        normed = F.rms_norm(hidden.float(), multiplier.shape, multiplier, self.eps)
        return normed.to(hidden.dtype)
