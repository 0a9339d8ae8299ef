"""Writers for the quantised layouts in circulation, by the formats' definitions.

Each takes a transformer's (or encoder's) tensors by their file names and returns, beside what goes
into the file, the numbers that stand in it: what a correct reader gets out.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch

import k_blocks

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


def by_comfyui(form, **settings):
    """A writer that quantises with ComfyUI's own layouts, which have to be importable."""

    def write(tensors):
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

        stored, values = {}, dict(tensors)
        for name, tensor in tensors.items():
            # Four bits go in groups of 64.
            if not is_block_matrix(name, tensor) or tensor.shape[1] % 64:
                stored[name] = tensor
                continue
            layer = name.removesuffix(".weight")
            layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
            weight = QuantizedTensor.from_float(tensor.to(torch.bfloat16), layout, **settings)
            values[name] = weight.dequantize().float()
            parts = weight.state_dict(f"{layer}.weight")
            stored |= {key: part.contiguous() for key, part in parts.items()}
            stored[f"{layer}.comfy_quant"] = settings_tensor({"format": form, **settings})
        return stored, values, {}

    return write


def with_branches(write, rank=32):
    """The strongest directions of each matrix apart in 16 bits, the rest as `write` stores it."""

    def branched(tensors):
        rest, low = dict(tensors), {}
        for name, tensor in tensors.items():
            if is_block_matrix(name, tensor) and not tensor.shape[1] % 64:
                u, s, v = torch.linalg.svd(tensor.float(), full_matrices=False)
                up, down = ((u * s)[:, :rank].bfloat16(), v[:rank].bfloat16())
                low[name.removesuffix(".weight")] = (up.contiguous(), down.contiguous())
                rest[name] = tensor - up.float() @ down.float()
        stored, values, metadata = write(rest)
        for layer, (up, down) in low.items():
            stored |= {f"{layer}.svdq_l1": up, f"{layer}.svdq_l2": down}
            values[f"{layer}.weight"] = values[f"{layer}.weight"] + up.float() @ down.float()
        return stored, values, metadata | {"krea2_svdquant_rank": str(rank)}

    return branched


def gguf_file(tensors, path: Path, form: str, part="blocks.", architecture="krea2", strays=()):
    """Write a GGUF file with `form` in its matrices; returns the numbers that stand in it."""
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
        k_form = form.endswith("_K")
        data = k_blocks.quantise(array, form) if k_form else gguf.quantize(array, kind)
        values[name] = torch.from_numpy(gguf.dequantize(data, kind).reshape(array.shape).copy())
        writer.add_tensor(name, data, raw_dtype=kind)
    for name in strays:
        writer.add_tensor(name, np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


# Safetensors layouts by name, each a writer of a transformer's tensors.
WRITERS = {
    "fp8, settings as tensors": lambda tensors: float8(tensors, "tensors"),
    "fp8, settings in the header": lambda tensors: float8(tensors, "header"),
    "fp8, old marker": lambda tensors: float8(tensors, "marker"),
    "fp8, old marker, full": lambda tensors: float8(tensors, "marker, full"),
    "int8, a scale a row": int8,
    "int8, one scale": lambda tensors: int8(tensors, rows=False),
    "int8 convrot": lambda tensors: int8(tensors, group=256),
    "nvfp4": by_comfyui("nvfp4"),
    "mxfp8": by_comfyui("mxfp8"),
    "convrot_w4a4": by_comfyui("convrot_w4a4", convrot_groupsize=16),
    "convrot_w4a4, branches": with_branches(by_comfyui("convrot_w4a4", convrot_groupsize=16)),
}
