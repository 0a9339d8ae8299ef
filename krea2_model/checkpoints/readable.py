"""A checkpoint's tensors as weights to calculate with: in one dtype, or quantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .quantised import dequantise, is_quantised
from .quantised_layers import put_quantised_layers, stored_names
from .transformer_keys import is_norm_or_table

# What quantised weights are calculated in, unless the user chooses.
PLAIN = torch.bfloat16


def readable(
    module: nn.Module,
    tensors: Mapping[str, Any],
    path: Path,
    dtypes: tuple[torch.dtype, torch.dtype],
    keep_quantised: bool,
) -> dict[str, Tensor]:
    """The state of a meta module, in which what is quantised stays so or is plain.

    dtypes: of the values of what is quantised, and of all matrices; they differ in files that are
        quantised in a small part only, which is made plain.
    """
    if keep_quantised and dtypes[0] == dtypes[1]:
        tensors = put_quantised_layers(module, tensors, path.name, dtypes[0])
    else:
        tensors = dequantise(tensors, path.name, dtypes[0])
    stored = stored_names(module)
    return {
        name: tensor
        if name in stored
        else _at_least_16_bit(tensor)
        if is_norm_or_table(name)
        else tensor.to(dtypes[1])
        for name, tensor in tensors.items()
    }


def most_common_dtype(
    tensors: Mapping[str, Any], of_quantised: torch.dtype | None = None
) -> torch.dtype:
    """By numbers held; what is quantised counts as `of_quantised`, and without as it is stored.

    Blocks of a GGUF file then hold none that could be calculated with.
    """
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if of_quantised is not None and is_quantised(tensor):
            sizes[of_quantised] = sizes.get(of_quantised, 0) + tensor.numel()
        elif isinstance(tensor, Tensor):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _at_least_16_bit(tensor: Tensor) -> Tensor:
    """A norm scale or table as it is stored, but in 16 bits at least."""
    return tensor.float() if tensor.element_size() < 2 else tensor
