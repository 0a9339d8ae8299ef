"""Quantised safetensors files: which layers are quantised how, and their values.

ComfyUI's files keep a layer's format and settings as JSON, in a tensor `<layer>.comfy_quant` or in
the header (`_quantization_metadata`); older ones only have a marker `scaled_fp8` and a
`scale_weight` a layer. `normalise_metadata` brings all of them to the first form. `dequantise`
gives plain tensors where no layers that calculate with quantised weights are at hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import by_count
from .gguf import GGUFTensor
from .identify import CheckpointError
from .quantised_weight import (
    FLOAT8,
    INT8,
    QuantisedWeight,
    check_group,
    layer_weight,
    tensor_weight,
)

SETTINGS = ".comfy_quant"
HEADER = "_quantization_metadata"
# Multipliers of a layer's input, by column of its weight.
SMOOTHING = ".pre_quant_scale"
# Tensors that belong to a quantised weight.
SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale", SMOOTHING, SETTINGS)
# A low-rank branch beside a quantised layer: its up and down matrices.
BRANCH = (".svdq_l1", ".svdq_l2")
BESIDE = (*SUFFIXES, *BRANCH)

# Multipliers of a weight or its input; of the first some formats have one per block.
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", SMOOTHING)
# Settings are a line of JSON.
_LONGEST_SETTINGS = 65_536


def normalise_metadata(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str
) -> dict[str, Tensor]:
    """Tensors with the settings of each quantised layer beside it, under the file's prefix or none.

    Raises CheckpointError where settings are not JSON or name a layer that is not there.
    """
    result = _rename_old_tensors(tensors)
    if HEADER not in metadata:
        return result
    try:
        layers = json.loads(metadata[HEADER])["layers"]
        settings = {layer: json.dumps(value) for layer, value in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{name} has an unreadable list of quantised layers in its header ({error!r}). "
            "Download it again."
        ) from error
    names = _LayerNames(result)
    for layer, text in settings.items():
        full_name = names.find(layer)
        if full_name is None:
            raise CheckpointError(
                f"{name} lists {layer!r} among its quantised layers, and has no such layer. "
                "Download it again."
            )
        result.setdefault(f"{full_name}{SETTINGS}", _as_tensor(text))
    return result


def layer_settings(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Settings by layer, the format as "format", from the result of `normalise_metadata`."""
    settings = {}
    for name, tensor in tensors.items():
        if name.endswith(SETTINGS):
            layer = name.removesuffix(SETTINGS)
            try:
                if tensor.dtype != torch.uint8 or tensor.numel() > _LONGEST_SETTINGS:
                    raise ValueError(f"{tensor.numel():,} numbers of {tensor.dtype}")
                value = json.loads(bytes(tensor.flatten().tolist()))
                settings[layer] = {**value.get("params", {}), **value}
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{name} holds no readable settings ({str(error)[:200]}); expected a JSON "
                    "object. Download the file again."
                ) from error
    return settings


def check_quantised(
    tensors: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], name: str
) -> None:
    """Refuse settings and scales of quantised layers that no quantiser writes.

    settings: of `layer_settings`. Raises CheckpointError that names the layer: a scale of 0 or NaN
    loads all the same, and paints black.
    """
    for layer, values in settings.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is None or isinstance(weight, GGUFTensor) or weight.ndim != 2:
            raise CheckpointError(
                f"{name} lists {layer} as quantised and has no matrix there. Download it again."
            )
        form = values.get("format")
        if not isinstance(form, str):
            raise CheckpointError(f"{name}: {layer} has the format {form!r:.80}; expected a name.")
        if values.get("convrot"):
            check_group(values.get("convrot_groupsize", 256), weight.shape[1], f"{name}: {layer}")
        one_value_a_byte = form in FLOAT8 or form == INT8
        if one_value_a_byte and weight.element_size() != 1:
            raise CheckpointError(
                f"{name}: {layer} is stored as {weight.dtype}, and its settings say {form}. "
                "Download it again."
            )
        for suffix in SCALES:
            scale = tensors.get(layer + suffix)
            if scale is None:
                continue
            sizes: tuple[int, ...] = (1,)
            if suffix == SMOOTHING:
                sizes = (weight.shape[1], 2 * weight.shape[1])
            elif suffix == SCALES[0]:
                if not one_value_a_byte:
                    continue  # a scale per block, in a format of its own
                sizes = (1, weight.shape[0])
            _check_scale(scale, sizes, weight, f"{name}: {layer}{suffix}")


def _check_scale(scale: Tensor, sizes: tuple[int, ...], weight: Tensor, what: str) -> None:
    if scale.numel() not in sizes or not scale.is_floating_point():
        raise CheckpointError(
            f"{what} holds {scale.numel():,} {by_count(scale.numel(), 'number', 'numbers')} of "
            f"{scale.dtype}; expected {' or '.join(map(str, sizes))}, floating. The file was "
            "quantised for another layer."
        )
    values = scale.float().flatten()
    wrong = ~(torch.isfinite(values) & (values > 0))
    if wrong.any() and values.numel() == weight.shape[0] > 1:
        # Some quantisers give a row of zeros the scale 0.
        empty = (weight.view(torch.uint8) == 0).all(dim=1)
        wrong &= ~(empty & (values == 0))
    if wrong.any():
        raise CheckpointError(
            f"{what} is {float(values[wrong][0]):g}; expected a finite number above 0. The file is "
            "damaged or was quantised wrongly: use another."
        )


def refuse_integers(tensors: Mapping[str, Any], name: str) -> None:
    """Refuse weights that are whole numbers without the settings of a quantised format."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, GGUFTensor) and not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} stores {key} as {str(tensor.dtype).removeprefix('torch.')}; expected "
                "floating numbers, or a quantised layer with its settings (comfy_quant). Save it "
                "again in bf16, or use another file."
            )


def is_quantised(tensor) -> bool:
    """True if a weight has 8 bits or fewer, so that reading it takes more than a cast."""
    return isinstance(tensor, GGUFTensor) or tensor.element_size() < 2


def quantised_weights(tensors: Mapping[str, Any], name: str) -> dict[str, QuantisedWeight]:
    """The quantised weights of a part, by the names of their tensors.

    Raises CheckpointError for formats that only ComfyUI's layers read, and settings or scales that
    no quantiser writes.
    """
    settings = layer_settings(tensors)
    check_quantised(tensors, settings, name)
    weights = {}
    for key, tensor in tensors.items():
        if key.endswith(BESIDE):
            continue
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and layer in settings:
            weights[key] = layer_weight(layer, tensors, settings[layer], name)
        elif (weight := tensor_weight(tensor)) is not None:
            weights[key] = weight
    return weights


def dequantise(
    tensors: Mapping[str, Any], name: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Plain tensors from quantised ones, a layer at a time, without scales and settings.

    dtype: of the dequantised tensors; others keep theirs. Raises CheckpointError as
    `quantised_weights` does.
    """
    quantised = quantised_weights(tensors, name)
    result = {
        key: quantised[key].dequantise(dtype) if key in quantised else tensor
        for key, tensor in tensors.items()
        if not key.endswith(BESIDE)
    }
    refuse_integers(result, name)
    return result


def _rename_old_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the marker `scaled_fp8`, and rename its scales as ComfyUI does today."""
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


class _LayerNames:
    """Finds a layer by its name in a list: as it is, under a prefix, or without one.

    A file that was prefixed after quantising keeps bare names in its list, and one whose prefix
    was taken off keeps prefixed ones.
    """

    def __init__(self, names: Iterable[str]):
        layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        self._layers = set(layers)
        self._prefixed: dict[str, str] = {}
        for layer in layers:
            pieces = layer.split(".")
            # No prefix has more parts; without a limit one name of a million dots would cost much.
            for start in range(1, min(len(pieces), 8)):
                self._prefixed.setdefault(".".join(pieces[start:]), layer)

    def find(self, layer: str) -> str | None:
        if layer in self._layers:
            return layer
        if layer in self._prefixed:
            return self._prefixed[layer]
        pieces = layer.split(".")
        bare = (".".join(pieces[start:]) for start in range(1, min(len(pieces), 8)))
        return next((name for name in bare if name in self._layers), None)


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
