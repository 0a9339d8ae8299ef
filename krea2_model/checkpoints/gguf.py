"""GGUF files: tensors as they are stored, and their values.

Blocks are dequantised in torch, on the device of the blocks, or there by a Triton kernel (switch
`gguf`). A block packs 32 values (256 in the K formats) with their scales; the layouts are those of
ggml's `ggml-common.h`. Formats beyond `FORMATS` go through the `gguf` package of llama.cpp, on the
CPU, which is slower.

A new format needs a decoder from blocks (N, bytes) to values (N, values) and its entry in `FORMATS`
under ggml's name, whose id the `gguf` package has to know; and a kernel in
`nn/triton_kernels/gguf.py`: its branch in `_dequantise` and its name in `KERNELS`. Its blocks are
tested by the lists of tests/unit/test_gguf.py; docs/models.md names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..nn import switches, triton_kernels
from .gguf_header import MAGIC, read_gguf_header
from .identify import CheckpointError

INSTALL = "pip install gguf"

Shape = tuple[int, ...]

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Format:
    """A block format: values and bytes per block, and its decoder of blocks (N, bytes)."""

    block_values: int
    block_bytes: int
    dequantise: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: raw bytes (rows, n), the name of their format, and the shape of their values."""

    data: Tensor
    format: str
    shape: Shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantise(self.data, self.format, self.shape, dtype)


def dequantise(data: Tensor, name: str, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of raw bytes in the format `name`, on their device, computed in float32."""
    if "gguf" in switches.active and name in FORMATS:
        if not _is_traced(data):
            return _dequantise_blocks(data, name, dtype).reshape(shape)
        if data.device.type == "cuda" or triton_kernels.INTERPRETED:
            return _dequantise_operator(data, name, dtype).reshape(shape)
    return _dequantise_torch(data, name).reshape(shape).to(dtype)


def _is_traced(data: Tensor) -> bool:
    """True while a compiler traces this, with tensors that may have no data."""
    return torch.compiler.is_compiling() or type(data) not in (Tensor, torch.nn.Parameter)


def _dequantise_torch(data: Tensor, name: str) -> Tensor:
    """Values in float32, (blocks, values) or in rows; without a decoder here by the package."""
    form = FORMATS.get(name)
    if form is None:
        import gguf

        kind = gguf.GGMLQuantizationType[name]
        size = gguf.GGML_QUANT_SIZES[kind][1]
        values = gguf.quants.dequantize(data.cpu().reshape(-1, size).numpy(), kind)
        return torch.from_numpy(values).to(data.device)
    return form.dequantise(data.reshape(-1, form.block_bytes))


def _dequantise_blocks(data: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Values (N, values of a block) of one of `FORMATS`, by its Triton kernel where that runs.

    The kernel reads scales as float16, which have to lie at even addresses.
    """
    is_even = data.is_contiguous() and data.data_ptr() % 2 == 0
    if not (is_even and dtype in _PLAIN.values() and triton_kernels.takes(data)):
        return _dequantise_torch(data, name).to(dtype)
    from ..nn.triton_kernels.gguf import KERNELS, dequantise

    if name not in KERNELS:
        return _dequantise_torch(data, name).to(dtype)
    return dequantise(data, name, FORMATS[name].block_values, FORMATS[name].block_bytes, dtype)


# By the module's name, which in ComfyUI is a path: another copy of this package has its own.
@torch.library.custom_op("krea2_" + re.sub(r"\W", "_", __name__) + "::values", mutates_args=())
def _dequantise_operator(data: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """`_dequantise_blocks` as one operator, into which a compiler does not look."""
    return _dequantise_blocks(data, name, dtype)


@_dequantise_operator.register_fake
def _(data: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    form = FORMATS[name]
    return data.new_empty((data.numel() // form.block_bytes, form.block_values), dtype=dtype)


def is_gguf(path: Path) -> bool:
    """True if a file begins as GGUF files do, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def require_package(path: Path):
    """The `gguf` package. Raises CheckpointError, with how to install it, where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path.name} is a GGUF file, which the gguf package reads, and it is not installed. "
            f"Install it into ComfyUI's Python with `{INSTALL}`, and restart."
        ) from error
    return gguf


def read_gguf(path: str | Path) -> tuple[dict[str, Tensor | GGUFTensor], dict[str, str]]:
    """Tensors by name, mapped from the file, and the metadata that is text.

    Matrices in blocks are GGUFTensors; what is stored as numbers, and vectors, are plain tensors.
    Raises CheckpointError for a broken file, an unknown format, and where the `gguf` package is
    missing.
    """
    path = Path(path)
    header, package = read_gguf_header(path), require_package(path)
    # Copy on write: torch wants memory that it may write to.
    content = np.memmap(path, mode="c")
    tensors: dict[str, Tensor | GGUFTensor] = {}
    for name, entry in header.tensors.items():
        form, values, size = _format(package, entry.type_id, f"{path.name} stores {name}")
        count = math.prod(entry.shape)
        end = entry.offset + count // values * size
        if count % values or end > len(content):
            raise CheckpointError(
                f"{path.name} is a broken GGUF file: {name} is {entry.shape} in {form} and does "
                f"not fit into {len(content):,} bytes. Download it again."
            )
        data = torch.from_numpy(content[entry.offset : end])
        if form in _PLAIN:
            tensors[name] = _aligned(data, _PLAIN[form]).reshape(entry.shape)
        elif len(entry.shape) < 2:
            tensors[name] = dequantise(data, form, entry.shape)
        else:
            rows = entry.shape[0] if entry.shape[-1] % values == 0 else 1
            tensors[name] = GGUFTensor(data.reshape(rows, -1), form, entry.shape)
    return tensors, header.metadata


def _aligned(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers, copied where they do not begin where such numbers may."""
    return (data if data.data_ptr() % dtype.itemsize == 0 else data.clone()).view(dtype)


def _format(package, type_id: int, what: str) -> tuple[str, int, int]:
    """A format's name, and the values and bytes of its blocks.

    Raises CheckpointError where nothing here or in the package turns it into numbers.
    """
    names = {kind.value: kind.name for kind in package.GGMLQuantizationType}
    name = names.get(type_id, f"format {type_id}")
    known = ", ".join((*_PLAIN, *FORMATS))
    if type_id in names:
        values, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(type_id)]
        if name in _PLAIN or name in FORMATS or _package_reads(package, name, size):
            return name, values, size
    raise CheckpointError(
        f"{what} as {name}; expected one of {known}, or what the installed gguf package turns into "
        "numbers. Update that package, or use another quantisation of the model."
    )


def _package_reads(package, name: str, size: int) -> bool:
    try:
        blocks = np.zeros((1, size), dtype=np.uint8)
        package.quants.dequantize(blocks, package.GGMLQuantizationType[name])
    except NotImplementedError:
        return False
    # Integers come back as they are; a model's weights are never stored so.
    return not name.startswith(("I8", "I16", "I32", "I64", "F64"))


def _half(data: Tensor) -> Tensor:
    """Bytes (N, 2) as float16 -> (N, 1) float32."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """Bytes (N, B) -> (N, 2, B): the low halves, then the high halves."""
    return torch.stack((data & 0x0F, data >> 4), dim=1)


def _shifted(data: Tensor, shifts: range, mask: int) -> Tensor:
    """Bytes (N, B) -> (N, len(shifts), B): the bits from each shift on."""
    by = torch.tensor(list(shifts), dtype=torch.uint8, device=data.device)
    return (data[:, None] >> by[:, None]) & mask


def _q8_0(blocks: Tensor) -> Tensor:
    scale, values = blocks.split((2, 32), dim=1)
    return _half(scale) * values.contiguous().view(torch.int8)


def _q4_0(blocks: Tensor) -> Tensor:
    scale, packed = blocks.split((2, 16), dim=1)
    return _half(scale) * (_nibbles(packed).flatten(1).to(torch.int8) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, least, packed = blocks.split((2, 2, 16), dim=1)
    return _half(scale) * _nibbles(packed).flatten(1) + _half(least)


def _fifth_bits(data: Tensor) -> Tensor:
    """Bytes (N, 4) -> (N, 32): one bit a value, where a fifth bit belongs."""
    return _shifted(data, range(8), 1).transpose(1, 2).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    scale, high, packed = blocks.split((2, 4, 16), dim=1)
    values = _nibbles(packed).flatten(1) | _fifth_bits(high)
    return _half(scale) * (values.to(torch.int8) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    scale, least, high, packed = blocks.split((2, 2, 4, 16), dim=1)
    values = _nibbles(packed).flatten(1) | _fifth_bits(high)
    return _half(scale) * values + _half(least)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, packed, scale, least = blocks.split((16, 64, 2, 2), dim=1)
    # Two halves of 128 values; in each, four runs of 32 share the same bytes.
    values = _shifted(packed.reshape(-1, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    steps = _half(scale) * (scales & 0x0F)
    offsets = _half(least) * (scales >> 4)
    return (steps[..., None] * values - offsets[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    high, packed, scales, scale = blocks.split((32, 64, 12, 2), dim=1)
    values = _shifted(packed.reshape(-1, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    # Values whose high bit is 0 are 4 less.
    missing = 1 - _shifted(high, range(8), 1).reshape(-1, 16, 16)
    values = values.to(torch.int8) - (missing << 2).to(torch.int8)
    low, top = scales.split((8, 4), dim=1)
    six = _nibbles(low).flatten(1) | (_shifted(top, range(0, 8, 2), 3).flatten(1) << 4)
    steps = _half(scale) * (six.to(torch.int8) - 32)
    return (steps[..., None] * values).flatten(1)


def _scales_and_offsets(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (N, 12) -> eight scales and eight offsets of six bits each."""
    first, second, rest = packed.split((4, 4, 4), dim=1)
    scales = torch.cat((first & 0x3F, (rest & 0x0F) | ((first >> 2) & 0x30)), dim=1)
    offsets = torch.cat((second & 0x3F, (rest >> 4) | ((second >> 2) & 0x30)), dim=1)
    return scales, offsets


def _q4_k(blocks: Tensor) -> Tensor:
    scale, least, packed_scales, packed = blocks.split((2, 2, 12, 128), dim=1)
    scales, offsets = _scales_and_offsets(packed_scales)
    values = _nibbles(packed.reshape(-1, 32)).reshape(-1, 8, 32)
    steps, offsets = _half(scale) * scales, _half(least) * offsets
    return (steps[..., None] * values - offsets[..., None]).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, least, packed_scales, high, packed = blocks.split((2, 2, 12, 32, 128), dim=1)
    scales, offsets = _scales_and_offsets(packed_scales)
    values = _nibbles(packed.reshape(-1, 32)).reshape(-1, 8, 32)
    values = values | (_shifted(high, range(8), 1) << 4)
    steps, offsets = _half(scale) * scales, _half(least) * offsets
    return (steps[..., None] * values - offsets[..., None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, scale = blocks.split((128, 64, 16, 2), dim=1)
    low = _nibbles(low.reshape(-1, 64)).reshape(-1, 8, 32)
    high = _shifted(high.reshape(-1, 32), range(0, 8, 2), 3).reshape(-1, 8, 32)
    values = ((low | (high << 4)).to(torch.int8) - 32).reshape(-1, 16, 16)
    steps = _half(scale) * scales.contiguous().view(torch.int8)
    return (steps[..., None] * values).flatten(1)


FORMATS = {
    "Q8_0": Format(32, 34, _q8_0),
    "Q4_0": Format(32, 18, _q4_0),
    "Q4_1": Format(32, 20, _q4_1),
    "Q5_0": Format(32, 22, _q5_0),
    "Q5_1": Format(32, 24, _q5_1),
    "Q2_K": Format(256, 84, _q2_k),
    "Q3_K": Format(256, 110, _q3_k),
    "Q4_K": Format(256, 144, _q4_k),
    "Q5_K": Format(256, 176, _q5_k),
    "Q6_K": Format(256, 210, _q6_k),
}
