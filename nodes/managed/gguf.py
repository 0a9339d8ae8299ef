"""GGUF weights under ComfyUI's management: quantised in memory, dequantised on use.

A weight is one of ComfyUI's quantised tensors with a layout of our own, so offloading, pinning and
moving treat it like any other. Changed weights cannot be quantised again, so patches (LoRA, merges)
are never baked in: they are added each time a layer is used.
"""

from dataclasses import dataclass, fields

import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class

from ...krea2_model.checkpoints.gguf import GGUFTensor, dequantise

LAYOUT = "Krea2GGUFLayout"

# Bytes that dequantising takes for each value, the result included, in the largest format.
BYTES_A_VALUE = 10


class GGUFLayout(QuantizedLayout):
    @dataclass(frozen=True)
    class Params:
        """The format of a weight; what `QuantizedTensor` asks of every layout's parameters."""

        orig_dtype: torch.dtype
        orig_shape: tuple[int, ...]
        format: str

        def to_device(self, device):
            return self

        def clone(self):
            return self

        def copy_from(self, src, non_blocking=False):
            for field in fields(self):
                object.__setattr__(self, field.name, getattr(src, field.name))

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise NotImplementedError("Blocks of a GGUF file are read, never written.")

    @classmethod
    def dequantize(cls, qdata, params):
        return dequantise(qdata, params.format, params.orig_shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        # Saved dequantised, as other programs expect.
        return {"": cls.dequantize(qdata, params)}


register_layout_class(LAYOUT, GGUFLayout)


def wrap(tensor, dtype: torch.dtype):
    """A GGUFTensor as ComfyUI's quantised tensor, dequantised to `dtype`; others unchanged."""
    if not isinstance(tensor, GGUFTensor):
        return tensor
    params = GGUFLayout.Params(dtype, tensor.shape, tensor.format)
    return QuantizedTensor(tensor.data, LAYOUT, params)


def is_gguf(weight) -> bool:
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT


class GGUFOperations(comfy.ops.manual_cast):
    """Layers whose weights may be in GGUF formats; other weights behave as usual."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input):
            weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
            if isinstance(weight, QuantizedTensor):
                weight = weight.dequantize()
            result = torch.nn.functional.linear(input, weight, bias)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return result

        def convert_weight(self, weight, inplace=False, **kwargs):
            return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    class Embedding(comfy.ops.manual_cast.Embedding):
        def forward(self, tokens, out_dtype=None):
            if not is_gguf(self.weight):
                return super().forward(tokens, out_dtype=out_dtype)
            params = self.weight._params
            if len(self.weight._qdata) != params.orig_shape[0]:
                # Stored in rows of another length, which do not match tokens.
                values = self.weight.dequantize()[tokens.to(self.weight.device)]
                return values.to(tokens.device, out_dtype or params.orig_dtype)
            # Dequantise only the rows that are looked up.
            rows = self.weight._qdata[tokens.to(self.weight.device).flatten()]
            shape = (*tokens.shape, params.orig_shape[1])
            dtype = out_dtype or params.orig_dtype
            return dequantise(rows, params.format, shape, dtype).to(tokens.device)


class GGUFPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that adds patches to a GGUF weight on use, even where the model is fully loaded."""

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        # Afterwards, since loading removes the patches of layers that were loaded already.
        for key in self.patches:
            layer = self._gguf_layer(key)
            if layer is not None and not any(is_patch(f) for f in layer.weight_function):
                layer.weight_function = [LowVramPatch(key, self.patches), *layer.weight_function]

    def patch_weight_to_device(self, key, device_to=None, *args, return_weight=False, **kwargs):
        if return_weight or key not in self.patches or self._gguf_layer(key) is None:
            return super().patch_weight_to_device(
                key, device_to, *args, return_weight=return_weight, **kwargs
            )
        return None

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for layer in self.model.modules():
                if is_gguf(getattr(layer, "weight", None)):
                    layer.weight_function = []

    def _gguf_layer(self, key):
        name, _, parameter = key.rpartition(".")
        layer = comfy.utils.get_attr(self.model, name)
        return layer if parameter == "weight" and is_gguf(layer.weight) else None


def is_patch(function) -> bool:
    return isinstance(function, LowVramPatch)


def plain(tensor):
    """A GGUF weight dequantised, for saving; others unchanged."""
    return tensor.dequantize() if is_gguf(tensor) else tensor
