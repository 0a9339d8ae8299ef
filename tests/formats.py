"""Writers for the quantised layouts in circulation, by the formats' definitions.

Each takes a transformer's (or encoder's) tensors by their file names and returns, beside what goes
into the file, the numbers that stand in it: what a correct reader gets out.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch

FLOAT8_MOST = torch.finfo(torch.float8_e4m3fn).max


def is_block_matrix(name, tensor, part="blocks."):
    return part in name and name.endswith(".weight") and tensor.ndim == 2


def settings_tensor(settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def hadamard(size):
    """ConvRot's regular Hadamard matrix, by its definition."""
    base = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    return matrix / size**0.5


def float8(tensors, style="tensors", part="blocks."):
    """style: "tensors", "header", "marker" (old names), "marker, full" or "plain" (no scales)."""
    stored, values, layers = {}, dict(tensors), {}
    for name, tensor in tensors.items():
        if not is_block_matrix(name, tensor, part):
            stored[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().max() / FLOAT8_MOST
        if style == "plain":
            scale = torch.ones(())
        stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        values[name] = stored[name].float() * scale
        if style.startswith("marker"):
            stored[f"{layer}.scale_weight"] = scale
            stored[f"{layer}.scale_input"] = torch.ones(())
        elif style != "plain":
            stored[f"{layer}.weight_scale"] = scale
            layers[layer] = {"format": "float8_e4m3fn"}
    metadata = {}
    if style == "header":
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    elif style == "tensors":
        stored |= {f"{layer}.comfy_quant": settings_tensor(s) for layer, s in layers.items()}
    elif style.startswith("marker"):
        numbers = 2 if style == "marker, full" else 0
        stored["scaled_fp8"] = torch.empty(numbers, dtype=torch.float8_e4m3fn)
    return stored, values, metadata


def int8(tensors, rows=True, group=None):
    """rows: a scale a row, else one a matrix. group: the largest of the rotation, or None."""
    stored, values = {}, dict(tensors)
    for name, tensor in tensors.items():
        if not is_block_matrix(name, tensor):
            stored[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        weight = tensor.float()
        settings = {"format": "int8_tensorwise"}
        size = group
        if group:
            while weight.shape[1] % size:
                size //= 4
            weight = (weight.unflatten(1, (-1, size)) @ hadamard(size).T).flatten(1)
            settings |= {"convrot": True, "convrot_groupsize": size}
        scale = weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().max()
        scale = scale / 127
        stored[name] = (weight / scale).round().to(torch.int8)
        stored[f"{layer}.weight_scale"] = scale
        stored[f"{layer}.comfy_quant"] = settings_tensor(settings)
        back = stored[name].float() * scale
        if group:
            back = (back.unflatten(1, (-1, size)) @ hadamard(size)).flatten(1)
        values[name] = back
    return stored, values, {}


def gguf_file(tensors, path: Path, form: str, part="blocks.", architecture="krea2", strays=()):
    """Write a GGUF file with `form` in its matrices; returns the numbers that stand in it.

    The gguf package cannot make K blocks: those are random, with scales that suit a weight.
    """
    kind = gguf.GGMLQuantizationType[form]
    writer = gguf.GGUFWriter(path, architecture)
    values = {}
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if not is_block_matrix(name, tensor, part) or array.shape[1] % block:
            writer.add_tensor(name, array)
            values[name] = tensor
            continue
        data = random_blocks(array, kind) if form.endswith("_K") else gguf.quantize(array, kind)
        values[name] = torch.from_numpy(gguf.dequantize(data, kind).reshape(array.shape).copy())
        writer.add_tensor(name, data, raw_dtype=kind)
    for name in strays:
        writer.add_tensor(name, np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


# Where the halves (float16) of a K block lie: the scale, then the offset's where there is one.
_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(array, kind):
    values, size = gguf.GGML_QUANT_SIZES[kind]
    count = array.size // values
    random = np.random.default_rng(array.size)
    blocks = random.integers(0, 256, size=(count, size), dtype=np.uint8)
    # Six-bit scales times values of up to six bits, about as wide as the weights.
    half = np.float16(array.std() / (32 * 16)).tobytes()
    for place in _HALVES[kind.name]:
        blocks[:, place : place + 2] = np.frombuffer(half, dtype=np.uint8)
    return blocks.reshape(array.shape[0], -1)
