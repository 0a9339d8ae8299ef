"""One quantised input for all of ComfyUI's quantised layers that read it (switch `quantise_once`).

An fp8 layer quantises its input before the product, so the input of queries, keys, values and gate
would be quantised four times. ComfyUI's layers accept a quantised input of two dimensions. Its int8
layers do not: they quantise inside the product.
"""

from functools import partial

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ...krea2_model.nn import switches
from .low_rank import WithBranches


def share_input(hidden, *layers):
    """Functions to call with `hidden` (B, L, D) in place of the layers, see `nn.layers`.

    Layers with the same quantisation share its result, computed when the first is called.
    """
    if (
        "quantise_once" not in switches.active
        or torch.compiler.is_compiling()  # which joins equal operations by itself
        or torch.is_grad_enabled()
        or hidden.ndim != 3
    ):
        return layers
    formats = [_input_format(layer) for layer in layers]
    cache: dict = {}
    return [
        layer if key is None or formats.count(key) == 1 else partial(_call, layer, key, cache)
        for layer, key in zip(layers, formats, strict=True)
    ]


def _call(layer, key, cache, hidden):
    """A layer's output for its quantised input, from the cache if another layer computed it."""
    if key not in cache:
        layout, scale = key
        scale = None if scale is None else layer.input_scale.to(hidden.device)
        cache[key] = QuantizedTensor.from_float(hidden.flatten(0, 1), layout, scale=scale)
    return layer(cache[key]).unflatten(0, hidden.shape[:2])


def _input_format(layer) -> tuple | None:
    """Layout and scale of a layer's quantised input; None where it reads the input as it is.

    A layer in full precision, or with a weight that is patched on use, does not quantise. Hooks and
    replaced layers get the plain input.
    """
    layout = getattr(layer, "layout_type", None)
    if layout is None or not _is_comfyuis(layer) or not _quantises(layer):
        return None
    scale = getattr(layer, "input_scale", None)
    return layout, None if scale is None else _number(layer, scale)


def _is_comfyuis(layer) -> bool:
    forward = type(layer).forward
    own = super(WithBranches, layer).forward if forward is WithBranches.forward else forward
    return (
        own.__module__ == "comfy.ops"
        and getattr(layer.forward, "__func__", None) is forward
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _quantises(layer) -> bool:
    """The conditions of ComfyUI's own forward."""
    return (
        isinstance(layer.weight, QuantizedTensor)
        and QUANT_ALGOS.get(layer.quant_format, {}).get("quantize_input", True)
        and not layer._full_precision_mm
        and not getattr(layer, "comfy_force_cast_weights", False)
        and getattr(layer, "pre_quant_scale", None) is None
        and not layer.weight_function
        and not layer.bias_function
    )


def _number(layer, scale) -> float:
    """The value of a layer's input scale, read from the device once."""
    known = vars(layer).get("_input_scale_number")
    if known is None or known[0] is not scale:
        known = layer._input_scale_number = (scale, scale.item())
    return known[1]
