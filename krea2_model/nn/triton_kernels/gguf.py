"""GGUF blocks to values in one pass: each byte is read once and each value written once.

The layouts are those of `krea2_model.checkpoints.gguf`, and so are the numbers, bit for bit. A
scale has 11 significant bits and is multiplied by at most 8 and 5 more, so every product is exact
in float32 and it makes no difference where the compiler fuses it with the addition that follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import current

# Values of one program.
TILE = 2048

# Formats with a kernel below.
KERNELS = frozenset(
    ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)


def dequantise(data: Tensor, name: str, values: int, size: int, dtype: torch.dtype) -> Tensor:
    """Values (N, values) in `dtype` of blocks in the format `name`: contiguous bytes, N x `size`.

    Computed in float32 and rounded once.
    """
    count = data.numel() // size
    out = torch.empty(count, values, dtype=dtype, device=data.device)
    rows = TILE // values
    if count:
        with current(data):
            grid = (triton.cdiv(count, rows),)
            _dequantise[grid](data, out, count, name, size, values, rows)
    return out


@triton.jit
def _dequantise(
    data,
    out,
    count,
    FORMAT: tl.constexpr,
    SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Past the end the last block is read again, so that no format needs a mask.
    block = (data + tl.minimum(row, count - 1) * SIZE)[:, None]
    if FORMAT == "Q8_0":
        values = _q8_0(block)
    elif FORMAT == "Q4_0":
        values = _q4_0(block)
    elif FORMAT == "Q4_1":
        values = _q4_1(block)
    elif FORMAT == "Q5_0":
        values = _q5_0(block)
    elif FORMAT == "Q5_1":
        values = _q5_1(block)
    elif FORMAT == "Q2_K":
        values = _q2_k(block)
    elif FORMAT == "Q3_K":
        values = _q3_k(block)
    elif FORMAT == "Q4_K":
        values = _q4_k(block)
    elif FORMAT == "Q5_K":
        values = _q5_k(block)
    else:
        tl.static_assert(FORMAT == "Q6_K")
        values = _q6_k(block)
    values = tl.reshape(values, (ROWS, VALUES)).to(out.dtype.element_ty)
    at = row[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    tl.store(out + at, values, mask=(row < count)[:, None])


# The functions below take pointers (ROWS, 1) to blocks. Formats of 32 values return (ROWS, 32),
# the K formats (ROWS, groups, values of a group), each group with a scale of its own.


@triton.jit
def _half(pointer):
    """A float16 in float32."""
    return tl.load(pointer.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _nibble(packed, at):
    """Of 16 bytes the halves (ROWS, 32): the low ones, then the high ones."""
    return (tl.load(packed + (at & 15)).to(tl.int32) >> ((at >> 4) * 4)) & 15


@triton.jit
def _fifth_bit(high, at):
    """Of 4 bytes one bit a value, where a fifth bit belongs."""
    return ((tl.load(high + (at >> 3)).to(tl.int32) >> (at & 7)) & 1) << 4


@triton.jit
def _q8_0(block):
    at = tl.arange(0, 32)[None, :]
    values = tl.load(block + 2 + at).to(tl.int8, bitcast=True)
    return _half(block) * values.to(tl.float32)


@triton.jit
def _q4_0(block):
    at = tl.arange(0, 32)[None, :]
    return _half(block) * (_nibble(block + 2, at) - 8).to(tl.float32)


@triton.jit
def _q4_1(block):
    at = tl.arange(0, 32)[None, :]
    return _half(block) * _nibble(block + 4, at).to(tl.float32) + _half(block + 2)


@triton.jit
def _q5_0(block):
    at = tl.arange(0, 32)[None, :]
    values = _nibble(block + 6, at) | _fifth_bit(block + 2, at)
    return _half(block) * (values - 16).to(tl.float32)


@triton.jit
def _q5_1(block):
    at = tl.arange(0, 32)[None, :]
    values = _nibble(block + 8, at) | _fifth_bit(block + 4, at)
    return _half(block) * values.to(tl.float32) + _half(block + 2)


@triton.jit
def _bits(data, at, shift):
    """The bits of each byte from a shift on: (ROWS, groups, values), a byte a value.

    data: the first byte of each group, (ROWS, groups); shift: (1, groups).
    """
    return tl.load(data[:, :, None] + at[None, None, :]).to(tl.int32) >> shift[:, :, None]


@triton.jit
def _pair_of_bits(packed, group, at):
    """Two bits per value in groups of 16: two halves of 128, in each four runs share 32 bytes."""
    first = packed + (group >> 3) * 32 + (group & 1) * 16
    return _bits(first, at, ((group & 7) >> 1) * 2) & 3


@triton.jit
def _q2_k(block):
    group, at = tl.arange(0, 16)[None, :], tl.arange(0, 16)
    scales = tl.load(block + group).to(tl.int32)
    steps = _half(block + 80) * (scales & 15).to(tl.float32)
    offsets = _half(block + 82) * (scales >> 4).to(tl.float32)
    values = _pair_of_bits(block + 16, group, at).to(tl.float32)
    return steps[:, :, None] * values - offsets[:, :, None]


@triton.jit
def _q3_k(block):
    group, at = tl.arange(0, 16)[None, :], tl.arange(0, 16)
    # Where the high bit is missing, 4 is taken away.
    high = _bits(block + (group & 1) * 16, at, group >> 1) & 1
    values = _pair_of_bits(block + 32, group, at) + (high << 2) - 4
    low = (tl.load(block + 96 + (group & 7)).to(tl.int32) >> ((group >> 3) * 4)) & 15
    top = (tl.load(block + 104 + (group & 3)).to(tl.int32) >> ((group >> 2) * 2)) & 3
    steps = _half(block + 108) * ((low | (top << 4)) - 32).to(tl.float32)
    return steps[:, :, None] * values.to(tl.float32)


@triton.jit
def _steps_and_offsets(block, group):
    """The scales and offsets (ROWS, 8) of Q4_K and Q5_K, of six bits each."""
    first = tl.load(block + 4 + (group & 3)).to(tl.int32)
    second = tl.load(block + 8 + (group & 3)).to(tl.int32)
    rest = tl.load(block + 12 + (group & 3)).to(tl.int32)
    scales = tl.where(group < 4, first & 63, (rest & 15) | ((first >> 2) & 48))
    offsets = tl.where(group < 4, second & 63, (rest >> 4) | ((second >> 2) & 48))
    return _half(block) * scales.to(tl.float32), _half(block + 2) * offsets.to(tl.float32)


@triton.jit
def _q4_k(block):
    group, at = tl.arange(0, 8)[None, :], tl.arange(0, 32)
    steps, offsets = _steps_and_offsets(block, group)
    values = _bits(block + 16 + (group >> 1) * 32, at, (group & 1) * 4) & 15
    return steps[:, :, None] * values.to(tl.float32) - offsets[:, :, None]


@triton.jit
def _q5_k(block):
    group, at = tl.arange(0, 8)[None, :], tl.arange(0, 32)
    steps, offsets = _steps_and_offsets(block, group)
    values = _bits(block + 48 + (group >> 1) * 32, at, (group & 1) * 4) & 15
    fifth = _bits(block + 16 + group * 0, at, group) & 1
    values = (values | (fifth << 4)).to(tl.float32)
    return steps[:, :, None] * values - offsets[:, :, None]


@triton.jit
def _q6_k(block):
    group, at = tl.arange(0, 16)[None, :], tl.arange(0, 16)
    first = block + (group >> 3) * 64 + (group & 3) * 16
    low = _bits(first, at, ((group & 7) >> 2) * 4) & 15
    values = (low | (_pair_of_bits(block + 128, group, at) << 4)) - 32
    scales = tl.load(block + 192 + group).to(tl.int8, bitcast=True)
    steps = _half(block + 208) * scales.to(tl.float32)
    return steps[:, :, None] * values.to(tl.float32)
