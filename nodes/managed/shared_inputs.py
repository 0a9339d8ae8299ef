"""One quantised input for all of ComfyUI's quantised layers that read it (switch `quantise_once`).

A layer in fp8 quantises its input before it multiplies, so that of queries, keys, values and gate
would be quantised four times. ComfyUI's layers take an input that is quantised already, two
dimensions of it, and do from there on what they do with their own. Those in int8 do not: their
input is quantised inside of the product.
"""

from functools import partial

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ...krea2_model.nn import switches
from .low_rank import WithBranches


def share_input(hidden, *layers):
    """What to call with `hidden` (B, L, D) in the layers' place, as `krea2_model.nn.layers` has it.

    Layers that would quantise it in the same way share the result, made when the first is called.
    """
    if (
        "quantise_once" not in switches.active
        or torch.compiler.is_compiling()  # which joins equal operations by itself
        or torch.is_grad_enabled()
        or hidden.ndim != 3
    ):
        return layers
    ways = [_way(layer) for layer in layers]
    made: dict = {}
    return [
        layer if way is None or ways.count(way) == 1 else partial(_read, layer, way, made)
        for layer, way in zip(layers, ways, strict=True)
    ]


def _read(layer, way, made, hidden):
    """A layer's output for an input that is quantised in its way, in `made` if one was there."""
    if way not in made:
        layout, scale = way
        scale = None if scale is None else layer.input_scale.to(hidden.device)
        made[way] = QuantizedTensor.from_float(hidden.flatten(0, 1), layout, scale=scale)
    return layer(made[way]).unflatten(0, hidden.shape[:2])


def _way(layer) -> tuple | None:
    """How a layer quantises its input, layout and scale; None where it is to read it as it is.

    A layer that calculates in full precision, or whose weight is patched on use, does not quantise.
    Hooks, and what others put in a layer's place, are shown the input itself.
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
    """As ComfyUI's own forward decides it."""
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
    """The value of a layer's input scale, for which a device is waited for once."""
    known = vars(layer).get("_input_scale_number")
    if known is None or known[0] is not scale:
        known = layer._input_scale_number = (scale, scale.item())
    return known[1]
