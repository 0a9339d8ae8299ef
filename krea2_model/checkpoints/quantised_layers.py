"""Linear layers that hold their weights as a quantised file has them.

Each layer dequantises its weight when it is used, to the numbers that `quantised.dequantise` gives.
The stored tensors are buffers, so they are moved, saved and counted like any other weight. LoRAs
do not change them: a plain LoRA is a low-rank branch of the layer, others are applied to the
dequantised weight in each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantised import SETTINGS, dequantise, quantised_weights
from .quantised_weight import VALUES_AT_A_TIME, QuantisedWeight
from .storage import Entry

# Names of formats in messages, where they differ from those in files.
_KINDS = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "int8_tensorwise": "int8"}


class WeightUpdate(Protocol):
    """A LoRA's update of one weight, as a layer needs it: its matrices, and how to apply them."""

    @property
    def parts(self) -> Mapping[str, Tensor]: ...
    @property
    def scale(self) -> float: ...
    def branch(self) -> tuple[Tensor, Tensor] | None: ...
    def with_parts(self, parts: Mapping[str, Tensor]) -> WeightUpdate: ...
    def apply(self, weight: Tensor, strength: float, fused_norm: Tensor | None) -> Tensor: ...


class Change(NamedTuple):
    """An update, its strength, and the norms of fused weights that a DoRA may need."""

    update: WeightUpdate
    strength: float
    fused_norm: Tensor | None = None


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is stored quantised; `weight` gives it in `dtype`.

    settings: the file's description of the layer (JSON), which is saved with it.
    """

    def __init__(
        self,
        stored: QuantisedWeight,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        settings: Tensor | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.dtype, self.form, self._group = dtype, stored.form, stored.group
        self._names = tuple(stored.tensors)
        # Not by register_buffer, which refuses the name of a property.
        self._buffers.update(stored.tensors)
        if settings is not None:
            self.register_buffer(SETTINGS[1:], settings)
        self.bias = bias
        self._changes: tuple[Change, ...] = ()

    def __setattr__(self, name, value):
        # Past register_buffer, which looks whether there is a `weight` and so makes it.
        if name in self.__dict__.get("_buffers", ()):
            self._buffers[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dequantised weight."""
        return self.out_features, self.in_features

    @property
    def is_gguf(self) -> bool:
        return self.stored.is_gguf

    @property
    def is_changed(self) -> bool:
        return bool(self._changes)

    @property
    def has_branch(self) -> bool:
        """True if all LoRAs of the layer form one low-rank branch."""
        return "lora_down" in self._buffers

    @property
    def stored(self) -> QuantisedWeight:
        tensors = {name: self._buffers[name] for name in self._names}
        return QuantisedWeight(self.form, self.shape, tensors, self._group)  # type: ignore[arg-type]

    @property
    def original(self) -> Tensor:
        """The weight without LoRAs."""
        return self.stored.dequantise(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight with LoRAs merged."""
        weight = self.original
        for index, (update, strength, norm) in enumerate(self._changes):
            norm = None if norm is None else norm.to(weight.device)
            update = update.with_parts(
                {name: self._part(index, name, part) for name, part in update.parts.items()}
            )
            weight = update.apply(weight, strength, norm)
        return weight.to(self.dtype)

    def change(self, changes: Sequence[Change]) -> None:
        """Replace the layer's LoRAs by these; an empty sequence removes them."""
        for name in [name for name in self._buffers if name.startswith("lora_")]:
            delattr(self, name)
        self._changes = tuple(changes)
        if not changes:
            return
        device = self._buffers["weight"].device  # type: ignore[union-attr]
        branches = [change.update.branch() for change in changes]
        if all(branch is not None for branch in branches):
            scales = [change.update.scale * change.strength for change in changes]
            pairs = [pair for pair in branches if pair is not None]
            up = [u.float() * scale for (u, _), scale in zip(pairs, scales, strict=True)]
            down = [d.float() for _, d in pairs]
            parts = {"lora_down": torch.cat(down), "lora_up": torch.cat(up, dim=1)}
        else:
            parts = {
                _part_name(index, name): part
                for index, (update, _, _) in enumerate(changes)
                for name, part in update.parts.items()
            }
        branch = "lora_down" in parts
        for name, part in parts.items():
            part = part.to(device, self.dtype) if branch else part.to(device)
            self.register_buffer(name, part, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        down = self._buffers.get("lora_down")
        if down is None:
            weight = self.weight if self._changes else self.original
            return F.linear(hidden, weight, self.bias)
        result = F.linear(hidden, self.original, self.bias)
        up = self._buffers["lora_up"]
        assert up is not None
        return result.add_(F.linear(F.linear(hidden, down), up))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form} in {self.dtype}"

    def _part(self, index: int, name: str, part: Tensor) -> Tensor:
        held = self._buffers.get(_part_name(index, name))
        return part if held is None else held

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Move the stored tensors; a cast changes the dtype of the result, never theirs."""
        cast = fn(torch.empty(0, dtype=self.dtype)).dtype
        stored = {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None and name not in ("lora_down", "lora_up")
        }
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.dtype = cast
        return self


def _part_name(index: int, name: str) -> str:
    return f"lora_{index}_{name}"


def put_quantised_layers(
    module: nn.Module, tensors: Mapping[str, Any], name: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Replace linear layers by quantised ones where a file has their weights quantised.

    module: on meta. tensors: of the file, by the module's names; others are dequantised to `dtype`.
    Returns the state dict to load, stored tensors included. Raises CheckpointError as `dequantise`.
    """
    quantised = quantised_weights(tensors, name)
    rest, state = dict(tensors), dict[str, Tensor]()
    for key, stored in quantised.items():
        path = key.removesuffix(".weight")
        layer = _layer(module, path)
        # A shape that does not fit is left to `check_tensors`, which names it.
        if type(layer) is not nn.Linear or tuple(layer.weight.shape) != stored.shape:
            continue
        settings = tensors.get(f"{path}{SETTINGS}")
        quantised_layer = QuantisedLinear(stored, layer.bias, dtype, settings)
        parent, _, name_in_parent = path.rpartition(".")
        module.get_submodule(parent)._modules[name_in_parent] = quantised_layer
        for suffix, tensor in quantised_layer._buffers.items():
            if tensor is not None:
                state[f"{path}.{suffix}"] = tensor
        for suffix in (*quantised_layer._buffers, "input_scale"):
            rest.pop(f"{path}.{suffix}", None)
    return state | dequantise(rest, name, dtype)


def _layer(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def stored_names(module: nn.Module) -> set[str]:
    """Names of the stored tensors of quantised layers in a module's state dict."""
    return {
        f"{path}.{name}"
        for path, layer in module.named_modules()
        if isinstance(layer, QuantisedLinear)
        for name in layer._buffers
    }


def stored_entries(module: nn.Module) -> list[Entry]:
    """A module's state dict to be written to a safetensors file, one tensor at a time.

    GGUF blocks, which such files do not know, and layers with LoRAs become plain weights.
    """
    entries: list[Entry] = []
    plain: dict[str, QuantisedLinear] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, QuantisedLinear) and (layer.is_gguf or layer.is_changed):
            plain |= {f"{path}.{name}": layer for name in layer._buffers}
    for name, tensor in module.state_dict().items():
        if name not in plain:
            entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), tensor.detach))
        elif name.endswith(".weight"):
            layer = plain[name]
            make = functools.partial(getattr, layer, "weight")
            entries.append(Entry(name, layer.dtype, layer.shape, make))
    return entries


def temporary_bytes(module: nn.Module) -> int:
    """Bytes of the largest weight that a quantised layer of a module dequantises."""
    most = 0
    for layer in module.modules():
        if isinstance(layer, QuantisedLinear):
            count = layer.in_features * layer.out_features
            # A run of rows in float32 and a copy of it; LoRAs that are no branch are applied to
            # all rows at once.
            values = count if layer.is_changed and not layer.has_branch else VALUES_AT_A_TIME
            most = max(most, count * layer.dtype.itemsize + 12 * min(count, values))
    return most


def quantisation_of(module: nn.Module) -> str:
    """The format of most quantised layers of a module; empty if it has none."""
    forms = [part.form for part in module.modules() if isinstance(part, QuantisedLinear)]
    most = max(set(forms), key=forms.count, default="")
    return _KINDS.get(most, most)
