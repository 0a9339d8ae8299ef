"""Checkpoint files read the way ComfyUI is set up to, quantised ones included."""

from pathlib import Path

import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS, get_layout_class

from ...krea2_model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...krea2_model.checkpoints.identify import CheckpointError
from ...krea2_model.checkpoints.loading import check_tensors
from ...krea2_model.checkpoints.quantised import (
    FLOAT8,
    SMOOTHING,
    SUFFIXES,
    check_quantised,
    layer_settings,
)

# Formats that pack several values into a byte, and those that pad sides to whole tiles.
_VALUES_A_BYTE = {"nvfp4": 2, "convrot_w4a4": 2}
_PADDED_TO = {"nvfp4": 16, "mxfp8": 32}


def open_part(path: str | Path | Checkpoint, component: str) -> Checkpoint:
    """Open a file or a part of a diffusers folder, with ComfyUI's own reader."""
    return open_checkpoint(path, component, _read_file)


def check_weights(module, tensors: dict, path: Path, what: str):
    """Check that `tensors` are the weights of `module`, which may be on meta.

    Returns ComfyUI's description of their quantisation, or None where they are not quantised.
    Raises CheckpointError that names what is missing, surplus, misshapen or not finite, or what
    this ComfyUI has no layers for.
    """
    settings_of = layer_settings(tensors)
    check_quantised(tensors, settings_of, path.name)
    quantisation = comfy.utils.detect_layer_quantization(tensors, "")
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    weights = tensors
    if quantisation is not None:
        weights = {n: t for n, t in tensors.items() if not n.endswith(SUFFIXES)}
        _check_formats(module, settings_of, tensors, path)
        for layer, settings in settings_of.items():
            name = f"{layer}.weight"
            if name in expected and name in weights:
                form = str(settings.get("format"))
                expected[name] = _stored_shape(expected[name], weights[name], form)
    quantised = {f"{layer}.weight" for layer in settings_of}
    check_tensors(expected, weights, path, what, quantised)
    return quantisation


def check_format(form: str, what: str) -> None:
    """Refuse a quantised format that this ComfyUI has no layers for."""
    if form not in QUANT_ALGOS:
        raise ValueError(
            f"{what} makes layers in {form}, which this ComfyUI cannot calculate with. Update "
            "ComfyUI, or choose another dtype."
        )


def _check_formats(module, settings_of: dict[str, dict], tensors: dict, path: Path) -> None:
    """Refuse what this ComfyUI has no layers for: older ones have fewer (0.26 none for int8).

    For embeddings and smoothing ComfyUI would not complain: the layer would give other numbers.
    """
    embeddings = {n for n, part in module.named_modules() if isinstance(part, torch.nn.Embedding)}
    for layer, settings in settings_of.items():
        form = str(settings.get("format"))
        if form not in QUANT_ALGOS:
            lacking = f"a layer in {form} ({layer})"
        elif layer in embeddings and not _is_read_by_rows(form):
            lacking = f"an embedding in {form} ({layer})"
        elif (
            f"{layer}{SMOOTHING}" in tensors
            and SMOOTHING[1:] not in QUANT_ALGOS[form]["parameters"]
        ):
            lacking = f"a {SMOOTHING[1:]} beside a layer in {form} ({layer})"
        else:
            continue
        raise CheckpointError(
            f"{path.name} has {lacking}, which this ComfyUI cannot read. Update ComfyUI, or use a "
            "bf16, fp8_scaled or GGUF file of the same model."
        )


def _is_read_by_rows(form: str) -> bool:
    layout = get_layout_class(QUANT_ALGOS[form]["comfy_tensor_layout"])
    return form in FLOAT8 or hasattr(layout, "dequantize_embedding")


def _stored_shape(shape: tuple[int, int], stored, form: str) -> tuple[int, int]:
    """The stored shape of a matrix in a format; padding is optional."""
    packed, tile = _VALUES_A_BYTE.get(form, 1), _PADDED_TO.get(form, 1)
    padded = tuple(-(-side // tile) * tile for side in shape)
    choices = [(rows, columns // packed) for rows, columns in (shape, padded)]
    return tuple(stored.shape) if tuple(stored.shape) in choices else choices[0]


def _read_file(path: Path):
    # ComfyUI's reader goes by the name, and takes what it does not know for a pickle.
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise CheckpointError(
            f"{path.name} holds safetensors under another name. Rename it to end in .safetensors."
        )
    return comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
