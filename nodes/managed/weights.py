"""Checkpoint files read the way ComfyUI is set up to, quantised ones included."""

from pathlib import Path

import comfy.utils

from ...krea2_model.checkpoint import Checkpoint, check_tensors, open_checkpoint

# What quantised files carry beside the weights themselves.
_QUANT_SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale", ".comfy_quant")


def open_part(path: str | Path, component: str) -> Checkpoint:
    """Open a file or a part of a diffusers folder, with quantisation marked layer by layer."""
    checkpoint = open_checkpoint(path, component, _read_file)
    # Before any name changes, since a header's list of layers uses the file's own names.
    checkpoint.tensors, metadata = comfy.utils.convert_old_quants(
        checkpoint.tensors, "", metadata=checkpoint.metadata
    )
    checkpoint.metadata = metadata or {}
    return checkpoint


def check_weights(module, tensors: dict, path: Path, what: str):
    """Check that `tensors` are the weights of `module`, which may be on meta.

    Returns ComfyUI's description of their quantisation, or None where they are not quantised.
    Raises CheckpointError that names what is missing, surplus, misshapen or not finite.
    """
    quantisation = comfy.utils.detect_layer_quantization(tensors, "")
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    weights = tensors
    if quantisation is not None:
        weights = {n: t for n, t in tensors.items() if not n.endswith(_QUANT_SUFFIXES)}
        # Packed formats hold several values a byte: their layers check their own shapes.
        wanted |= {n: tuple(t.shape) for n, t in weights.items() if n in wanted and t.ndim == 2}
    check_tensors(wanted, weights, path, what)
    return quantisation


def _read_file(path: Path):
    return comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
