"""Checkpoint files read the way ComfyUI is set up to, quantised ones included."""

from pathlib import Path

import comfy.utils

from ...krea2_model.checkpoint import Checkpoint, check_tensors, open_checkpoint
from ...krea2_model.quantised import SUFFIXES, layer_settings

# Formats that pack several values into a byte, and those that pad sides to whole tiles.
_VALUES_A_BYTE = {"nvfp4": 2, "convrot_w4a4": 2}
_PADDED_TO = {"nvfp4": 16, "mxfp8": 32}


def open_part(path: str | Path, component: str) -> Checkpoint:
    """Open a file or a part of a diffusers folder, with ComfyUI's own reader."""
    return open_checkpoint(path, component, _read_file)


def check_weights(module, tensors: dict, path: Path, what: str):
    """Check that `tensors` are the weights of `module`, which may be on meta.

    Returns ComfyUI's description of their quantisation, or None where they are not quantised.
    Raises CheckpointError that names what is missing, surplus, misshapen or not finite.
    """
    quantisation = comfy.utils.detect_layer_quantization(tensors, "")
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    weights = tensors
    if quantisation is not None:
        weights = {n: t for n, t in tensors.items() if not n.endswith(SUFFIXES)}
        for layer, settings in layer_settings(tensors).items():
            name = f"{layer}.weight"
            if name in wanted and name in weights:
                wanted[name] = _stored_shape(wanted[name], weights[name], settings.get("format"))
    check_tensors(wanted, weights, path, what)
    return quantisation


def _stored_shape(shape: tuple[int, int], stored, form: str) -> tuple[int, int]:
    """How a matrix of a shape is stored in a format; padding is optional."""
    packed, tile = _VALUES_A_BYTE.get(form, 1), _PADDED_TO.get(form, 1)
    padded = tuple(-(-side // tile) * tile for side in shape)
    choices = [(rows, columns // packed) for rows, columns in (shape, padded)]
    return tuple(stored.shape) if tuple(stored.shape) in choices else choices[0]


def _read_file(path: Path):
    return comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
