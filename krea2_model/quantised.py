"""Quantised safetensors files: which layers are quantised how, and their values.

ComfyUI's files keep a layer's format and settings as JSON, in a tensor `<layer>.comfy_quant` or in
the header (`_quantization_metadata`); older ones only have a marker `scaled_fp8` and a
`scale_weight` a layer. `spell_out` brings all of them to the first form. `dequantise` gives plain
tensors where no layers that calculate with quantised weights are at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .gguf import GGUFTensor
from .identify import CheckpointError

SETTINGS = ".comfy_quant"
HEADER = "_quantization_metadata"
# Multipliers of a layer's input, by column of its weight.
SMOOTHING = ".pre_quant_scale"
# What stands beside a quantised weight.
SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale", SMOOTHING, SETTINGS)
# A low-rank branch beside a quantised layer: its up and down matrices.
BRANCH = (".svdq_l1", ".svdq_l2")

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def spell_out(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str
) -> dict[str, Tensor]:
    """Tensors with the settings of each quantised layer beside it, under the file's prefix or none.

    Raises CheckpointError where settings are not JSON or name a layer that is not there.
    """
    result = _modern_names(tensors)
    if HEADER not in metadata:
        return result
    try:
        layers = json.loads(metadata[HEADER])["layers"]
        settings = {layer: json.dumps(value) for layer, value in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name} has an unreadable list of quantised layers in its header ({error!r}). "
            "Download it again."
        ) from error
    # A file that was prefixed after quantising keeps bare names in its list.
    endings = {weight.removesuffix(".weight"): weight for weight in result}
    for layer, text in settings.items():
        found = layer if layer in endings else _with_prefix(layer, endings)
        if found is None:
            raise CheckpointError(
                f"{name} lists {layer!r} among its quantised layers, and has no such layer. "
                "Download it again."
            )
        result.setdefault(f"{found}{SETTINGS}", _as_tensor(text))
    return result


def layer_settings(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Settings by layer, with the format under "format", of tensors that `spell_out` gave."""
    settings = {}
    for name, tensor in tensors.items():
        if name.endswith(SETTINGS):
            layer = name.removesuffix(SETTINGS)
            try:
                value = json.loads(bytes(tensor.flatten().tolist()))
                settings[layer] = {**value.get("params", {}), **value}
            except (ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{name} holds no readable settings ({error!r}). Download the file again."
                ) from error
    return settings


def is_quantised(tensor) -> bool:
    """Whether a weight needs more than a cast to be read: 8 bits or fewer."""
    return isinstance(tensor, GGUFTensor) or tensor.element_size() < 2


def dequantise(
    tensors: Mapping[str, Any], name: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Plain tensors from quantised ones, a layer at a time; what stood beside weights is dropped.

    dtype: of what was quantised; others are as they were. Raises CheckpointError for formats that
    only ComfyUI's layers read.
    """
    settings = layer_settings(tensors)
    result = {}
    for key, tensor in tensors.items():
        if key.endswith((*SUFFIXES, *BRANCH)):
            continue
        if isinstance(tensor, GGUFTensor):
            result[key] = tensor.dequantise(dtype)
        elif key.endswith(".weight") and (layer := key.removesuffix(".weight")) in settings:
            scale = tensors.get(f"{layer}.weight_scale")
            result[key] = _values(tensor, scale, settings[layer], f"{name}: {key}").to(dtype)
            if f"{layer}{SMOOTHING}" in tensors:
                result[key] = result[key] * tensors[f"{layer}{SMOOTHING}"].to(dtype)
            up, down = (tensors.get(layer + end) for end in BRANCH)
            if up is not None and down is not None:
                result[key] = (result[key].float() + up.float() @ down.float()).to(dtype)
        elif tensor.dtype in FLOAT8.values():
            result[key] = tensor.to(dtype)
        else:
            result[key] = tensor
    return result


def _values(weight: Tensor, scale: Tensor | None, settings: Mapping, what: str) -> Tensor:
    form = settings.get("format")
    if form in FLOAT8:
        values = weight.view(FLOAT8[form]) if weight.dtype == torch.uint8 else weight
        return values.float() if scale is None else values.float() * _columns(scale)
    if form == "int8_tensorwise":
        if scale is None:
            raise CheckpointError(f"{what} has no scale (weight_scale). Download the file again.")
        values = weight.float() * _columns(scale)
        if settings.get("convrot"):
            values = rotate(values, int(settings.get("convrot_groupsize", 256)))
        return values
    raise CheckpointError(
        f"{what} is stored as {form}, which only ComfyUI's layers read. Without ComfyUI use a "
        "bf16, fp8, int8 or GGUF file of the same model."
    )


def rotate(weight: Tensor, group: int) -> Tensor:
    """Multiply each run of `group` columns by a Hadamard matrix, which is its own inverse.

    ConvRot's is regular (all rows sum to the same): the Kronecker power of a symmetric 4 x 4 one.
    """
    rows, columns = weight.shape
    size, matrix = 1, torch.ones(1, 1, device=weight.device)
    base = torch.tensor(
        [[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], device=weight.device
    )
    while size < group:
        matrix, size = torch.kron(matrix, base), size * 4
    if size != group or columns % group:
        raise CheckpointError(
            f"A rotation in groups of {group} does not fit {columns} columns; expected a power of "
            "4 that divides them. The file was quantised for another layer."
        )
    groups = weight.reshape(rows, columns // group, group)
    return (groups @ (matrix / group**0.5)).reshape(rows, columns)


def _columns(scale: Tensor) -> Tensor:
    """One scale, or one a row, as it multiplies a matrix."""
    scale = scale.float()
    return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())


def _modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the marker `scaled_fp8`, and with the names that ComfyUI gives scales today."""
    marker = next((n for n in tensors if n.rpartition(".")[2] == "scaled_fp8"), None)
    if marker is None:
        return dict(tensors)
    prefix = marker.removesuffix("scaled_fp8")
    # Two numbers in the marker: activations are not to be quantised.
    settings: dict[str, Any] = {"format": "float8_e4m3fn"}
    if tensors[marker].numel() == 2:
        settings["full_precision_matrix_mult"] = True
    result = {}
    for name, tensor in tensors.items():
        if name == marker:
            continue
        layer, _, ending = name.rpartition(".")
        if name.startswith(prefix) and ending == "scale_weight":
            result[f"{layer}.weight_scale"] = tensor
            weight = tensors.get(f"{layer}.weight")
            if weight is not None and weight.dtype == torch.float8_e5m2:
                settings["format"] = "float8_e5m2"
            result[f"{layer}{SETTINGS}"] = _as_tensor(json.dumps(settings))
        elif name.startswith(prefix) and ending == "scale_input":
            if tensor.numel() == 1 and float(tensor) != 1.0:
                result[f"{layer}.input_scale"] = tensor
        else:
            result[name] = tensor
    return result


def _with_prefix(layer: str, known: Mapping[str, str]) -> str | None:
    return next((name for name in known if name.endswith(f".{layer}")), None)


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
