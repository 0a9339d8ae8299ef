"""ComfyUI's cast and quantised layers as a layer namespace for krea2_model.

Norm scales and modulation tables become leaf modules with ComfyUI's cast interface, so offload,
LoRA and merges reach them like any other weight.
"""

import comfy.ops
import torch

from ...krea2_model.nn.layers import ModulationTable, NormScale
from .low_rank import WithBranches


class _NotUntilLoaded:
    """An attribute that only instances have, from their first load or use."""

    def __get__(self, instance, owner):
        raise AttributeError("weight_function")


class CastLeaf(comfy.ops.CastWeightBiasOp):
    """A leaf whose weight ComfyUI may hold elsewhere, in another dtype, or patched."""

    # ComfyUI's trainer takes each module with this attribute for a layer, on a copy that was never
    # loaded, and cannot train a leaf without input. Core's own scales and tables lack it too.
    weight_function = _NotUntilLoaded()

    def add_weight_function(self) -> None:
        """Add the list that ComfyUI's loading and casting work with."""
        if "weight_function" not in vars(self):
            self.weight_function = []

    def _read(self, device: torch.device, use):
        """`use(weight)` with the weight in float32 on `device`; its result outlives the cast."""
        self.add_weight_function()
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, dtype=torch.float32, device=device, bias_dtype=torch.float32, offloadable=True
        )
        result = use(weight)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result


class CastNormScale(CastLeaf, NormScale):
    def __init__(self, dim, device=None, dtype=None):
        # Small, and rounding it shows: float32 whatever the matrices are.
        super().__init__(dim, device=device, dtype=torch.float32)
        self.register_parameter("bias", None)

    def read(self, device, use):
        return self._read(device, use)


class CastModulationTable(CastLeaf, ModulationTable):
    def __init__(self, *shape, device=None, dtype=None):
        super().__init__(*shape, device=device, dtype=torch.float32)
        self.register_parameter("bias", None)

    def forward(self, vector):
        return self._read(vector.device, lambda weight: vector.float() + weight)


def comfy_layers(operations):
    """The layer namespace for one of ComfyUI's operation sets (comfy.ops.pick_operations)."""

    class ComfyLayers:
        class Linear(WithBranches, operations.Linear):  # type: ignore[name-defined]
            pass

        Conv2d = operations.Conv2d
        Embedding = operations.Embedding
        LayerNorm = operations.LayerNorm
        RMSNorm = operations.RMSNorm
        NormScale = CastNormScale
        ModulationTable = CastModulationTable

    return ComfyLayers
