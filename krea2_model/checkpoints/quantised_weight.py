"""One quantised matrix: its storage format, and how it is dequantised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gguf
from .identify import CheckpointError

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
INT8 = "int8_tensorwise"

# Names of a layer's tensors, behind the layer's own.
SCALE, SMOOTHING, UP, DOWN = "weight_scale", "pre_quant_scale", "svdq_l1", "svdq_l2"

# Values dequantised at a time, since some formats need several copies of them in float32.
VALUES_AT_A_TIME = 2**24


@dataclass(frozen=True)
class QuantisedWeight:
    """A matrix as it is stored.

    form: a name of `FLOAT8`, `INT8`, or a format of GGUF.
    shape: of the dequantised matrix.
    tensors: by their name behind the layer's: "weight", and optionally a scale, multipliers of the
        columns (smoothing) and a low-rank branch that is added.
    group: number of columns that a Hadamard rotation mixes; None for no rotation.
    """

    form: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    group: int | None = None

    @property
    def is_gguf(self) -> bool:
        return self.form not in FLOAT8 and self.form != INT8

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`, on the device of the stored tensors, a run of rows at a time."""
        data, rows = self.tensors["weight"], self.shape[0]
        step = max(1, VALUES_AT_A_TIME // max(1, math.prod(self.shape[1:])))
        if step >= rows or data.shape[0] != rows:  # blocks of GGUF may go across rows
            return self._rows(slice(0, rows), dtype)
        result = torch.empty(self.shape, dtype=dtype, device=data.device)
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            result[part] = self._rows(part, dtype)
        return result

    def _rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        stored = self.tensors
        if self.is_gguf:
            data = stored["weight"]
            shape = (part.stop - part.start, *self.shape[1:])
            data = data if data.shape[0] != self.shape[0] else data[part]
            return gguf.dequantise(data, self.form, shape).to(dtype)
        values = stored["weight"][part].float()
        if SCALE in stored:
            scale = stored[SCALE].float()
            values = values * (
                scale.reshape(-1, 1)[part] if scale.numel() > 1 else scale.reshape(())
            )
        if self.group is not None:
            values = hadamard_rotate(values, self.group)
        values = values.to(dtype)
        if SMOOTHING in stored:
            values = values * stored[SMOOTHING].to(dtype)
        if UP in stored and DOWN in stored:
            branch = stored[UP][part].float() @ stored[DOWN].float()
            values = (values.float() + branch).to(dtype)
        return values


def eight_bits(values: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """A matrix in fp8 with one scale (), or in int8 with a scale a row (rows, 1), and the scale.

    values: (rows, columns) in float32.
    """
    if fp8:
        dtype = FLOAT8["float8_e4m3fn"]
        most = torch.finfo(dtype).max
        scale = values.abs().amax().clamp_min(1e-12) / most
        return (values / scale).clamp(-most, most).to(dtype), scale
    scale = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (values / scale).round().clamp(-127, 127).to(torch.int8), scale


def layer_weight(
    layer: str, tensors: Mapping[str, Any], settings: Mapping[str, Any], name: str
) -> QuantisedWeight:
    """The weight of a layer, from its settings and its tensors in a file.

    Raises CheckpointError for formats that only ComfyUI's layers read, and a branch that does not
    fit.
    """
    what = f"{name}: {layer}.weight"
    extras = {
        suffix: tensors[f"{layer}.{suffix}"]
        for suffix in (SCALE, SMOOTHING, UP, DOWN)
        if f"{layer}.{suffix}" in tensors
    }
    weight, form, group = tensors[f"{layer}.weight"], settings.get("format"), None
    if form in FLOAT8:
        weight = weight.view(FLOAT8[form]) if weight.dtype == torch.uint8 else weight
    elif form == INT8:
        if SCALE not in extras:
            raise CheckpointError(f"{what} has no scale (weight_scale). Download the file again.")
        if settings.get("convrot"):
            group = settings.get("convrot_groupsize", 256)
    else:
        raise CheckpointError(
            f"{what} is stored as {form}, which only ComfyUI's layers read. Without ComfyUI use a "
            "bf16, fp8, int8 or GGUF file of the same model."
        )
    if UP in extras and DOWN in extras:
        _check_branch(extras[UP], extras[DOWN], weight.shape, f"{name}: {layer}")
    return QuantisedWeight(form, tuple(weight.shape), {"weight": weight, **extras}, group)


def tensor_weight(tensor: Tensor | gguf.GGUFTensor) -> QuantisedWeight | None:
    """The weight of a tensor that needs no others, or None where it is plain."""
    if isinstance(tensor, gguf.GGUFTensor):
        return QuantisedWeight(tensor.format, tuple(tensor.shape), {"weight": tensor.data})
    for form, dtype in FLOAT8.items():
        if tensor.dtype == dtype:
            return QuantisedWeight(form, tuple(tensor.shape), {"weight": tensor})
    return None


def _check_branch(up: Tensor, down: Tensor, shape: tuple[int, ...], what: str) -> None:
    fits = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
    if not fits or (up.shape[0], down.shape[1]) != tuple(shape):
        raise CheckpointError(
            f"{what} has a low-rank branch of {tuple(up.shape)} times {tuple(down.shape)}; "
            f"expected ({shape[0]}, rank) times (rank, {shape[1]}). Download it again."
        )


def check_group(group: Any, columns: int, what: str) -> None:
    """Refuse a rotation whose groups do not fit the columns, before its matrix is built."""
    power = type(group) is int and 0 < group <= columns and group & (group - 1) == 0
    if not power or group.bit_length() % 2 == 0 or columns % group:
        raise CheckpointError(
            f"{what} is rotated in groups of {group!r:.40}, which do not fit {columns} columns; "
            "expected a power of 4 that divides them. The file was quantised for another layer."
        )


def hadamard_rotate(weight: Tensor, group: int) -> Tensor:
    """Multiply each run of `group` columns by a Hadamard matrix, which is its own inverse.

    ConvRot's is regular (all rows sum to the same): the Kronecker power of a symmetric 4 x 4 one.
    """
    rows, columns = weight.shape
    check_group(group, columns, "A matrix")
    matrix = torch.ones(1, 1, device=weight.device)
    base = torch.tensor(
        [[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], device=weight.device
    )
    while len(matrix) < group:
        matrix = torch.kron(matrix, base)
    groups = weight.reshape(rows, columns // group, group)
    return (groups @ (matrix / group**0.5)).reshape(rows, columns)
