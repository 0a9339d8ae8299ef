"""Temporary copies of weights on a device.

A copy replaces each weight, which itself stays in main memory and is put back later. So nothing is
copied back to main memory, and a mapped file stays mapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weight(NamedTuple):
    """A parameter or buffer by its place in a module."""

    owner: nn.Module
    name: str

    @property
    def key(self) -> tuple[int, str]:
        return id(self.owner), self.name

    @property
    def tensor(self) -> Tensor:
        return self._holder.detach()

    @property
    def version(self) -> int:
        """A number that grows whenever the weight is written to."""
        return 0 if self._holder.is_inference() else self._holder._version

    @property
    def _holder(self) -> Tensor:
        parameter = self.owner._parameters.get(self.name)
        holder = self.owner._buffers[self.name] if parameter is None else parameter
        assert holder is not None
        return holder

    def put(self, tensor: Tensor) -> None:
        """Replace the weight by a tensor of the same shape and dtype on any device."""
        parameter = self.owner._parameters.get(self.name)
        if parameter is not None:
            parameter.data = tensor
        else:
            self.owner._buffers[self.name] = tensor


def weights_of(modules: Iterable[nn.Module]) -> list[Weight]:
    """Every parameter and buffer of modules, each once."""
    weights = {}
    for part in modules:
        for owner in part.modules():
            for names in (owner._parameters, owner._buffers):
                for name, tensor in names.items():
                    if tensor is not None:
                        weight = Weight(owner, name)
                        weights[weight.key] = weight
    return list(weights.values())


def bytes_of(modules: Iterable[nn.Module]) -> int:
    return sum(w.tensor.numel() * w.tensor.element_size() for w in weights_of(modules))


def new_bytes(count: int, device: torch.device, pinned: bool = False) -> Tensor:
    """Memory for `count` bytes, which may be written to in and outside of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(count, dtype=torch.uint8, device=device, pin_memory=pinned)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, also where that is the tensor's own, in the same memory format."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


class Copies:
    """Copies of weights on a device, in the place of the weights until `remove`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._originals: dict[tuple[int, str], tuple[Weight, Tensor]] = {}

    @property
    def bytes(self) -> int:
        tensors = [original for _, original in self._originals.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def make(self, weights: Iterable[Weight]) -> None:
        """Copy the weights that have no copy yet."""
        for weight in weights:
            if weight.key not in self._originals:
                original = weight.tensor
                copy = copy_to(original, self.device)
                # In this order: an interrupted run must find its way back.
                self._originals[weight.key] = (weight, original)
                weight.put(copy)

    def remove(self) -> None:
        for weight, original in self._originals.values():
            weight.put(original)
        self._originals.clear()
