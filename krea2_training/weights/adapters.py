"""Adapters: the small trained matrices beside a frozen layer, and the names they have in files.

- LoRA (Hu and others, 2021): `W + s B A`.
- DoRA (Liu and others, 2024): the columns' directions change by a LoRA, their lengths are trained
  by themselves.
- LoKr (LyCORIS): `W + s kron(C, B A)`, with one small factor C, so fewer numbers for the same rank.

Their parameters are float32 and computed in the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.lora.names import DIFFUSERS, is_target, layer_in_files
from krea2_model.transformer.model import Krea2Transformer

from ..settings.sections import COLUMNS, ROWS, Adapter
from .base import FrozenLinear

_LINEAR = (nn.Linear, FrozenLinear, QuantisedLinear)


class LoraLinear(nn.Module):
    """A frozen layer plus `scale * up(down(x))`, which begins at 0.

    strength: factor on the adapter during training, for sliders and for a base without it at 0.
    """

    def __init__(self, layer: nn.Module, settings: Adapter):
        super().__init__()
        self.layer, self.scale, self.strength = layer, settings.scale, 1.0
        outputs, inputs = _sides(layer)
        rank = min(settings.rank, inputs, outputs)
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.normal_(self.down, std=inputs**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.layer(hidden)
        if self.strength == 0:
            return result
        return result + self.strength * self.scale * self._low_rank(hidden)

    def _low_rank(self, hidden: Tensor) -> Tensor:
        dtype = hidden.dtype
        return F.linear(F.linear(hidden, self.down.to(dtype)), self.up.to(dtype))

    def tensors(self) -> dict[str, Tensor]:
        """The parts of a file, by `PARTS`."""
        return {"down": self.down, "up": self.up}

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class DoraLinear(LoraLinear):
    """A LoRA of directions, and a trained length of each column of the weight, or each row.

    W' = m (W + s B A) / |W + s B A|, the norms over each column, an input's, as in the paper and in
    LyCORIS and ComfyUI, or over each row, an output's, as in PEFT. The norm is not differentiated
    through, as its authors advise: it halves the memory.
    """

    def __init__(self, layer: nn.Module, settings: Adapter):
        super().__init__(layer, settings)
        self.by_rows = settings.magnitude == ROWS
        self.magnitude = nn.Parameter(self.norm(frozen_weight(layer, self.down)))

    def norm(self, weight: Tensor) -> Tensor:
        """The lengths of a weight's columns, or of its rows."""
        return weight.norm(dim=1 if self.by_rows else 0)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.strength == 0:
            return self.layer(hidden)
        with torch.no_grad():
            update = self.strength * self.scale * (self.up @ self.down)
            norm = self.norm(frozen_weight(self.layer, self.down) + update)
        factor = 1 + self.strength * (self.magnitude / norm.clamp_min(1e-12) - 1)
        if not self.by_rows:
            return super().forward(hidden * factor.to(hidden.dtype))
        result = super().forward(hidden)
        bias = _frozen(self.layer).bias
        if bias is None:
            return result * factor.to(hidden.dtype)
        bias = bias.to(hidden.dtype)
        return (result - bias) * factor.to(hidden.dtype) + bias

    def tensors(self) -> dict[str, Tensor]:
        magnitude = self.magnitude[:, None] if self.by_rows else self.magnitude[None]
        return {**super().tensors(), "magnitude": magnitude}


class LokrLinear(nn.Module):
    """A frozen layer plus `scale * kron(small, up @ down)`.

    settings.factor: outputs and inputs of the small matrix, where they divide the layer's.
    """

    def __init__(self, layer: nn.Module, settings: Adapter):
        super().__init__()
        self.layer, self.scale, self.strength = layer, settings.scale, 1.0
        sides = _sides(layer)
        rows, columns = (_divisor(side, settings.factor) for side in sides)
        outputs, inputs = sides[0] // rows, sides[1] // columns
        self.rank = min(settings.rank, outputs, inputs)
        self.small = nn.Parameter(torch.empty(rows, columns))
        self.down = nn.Parameter(torch.empty(self.rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, self.rank))
        nn.init.normal_(self.small, std=columns**-0.5)
        nn.init.normal_(self.down, std=inputs**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.layer(hidden)
        if self.strength == 0:
            return result
        dtype, columns = hidden.dtype, self.small.shape[1]
        # kron(C, M) x = M X C^T, with x as a matrix of `columns` rows.
        parts = hidden.unflatten(-1, (columns, -1))
        parts = F.linear(F.linear(parts, self.down.to(dtype)), self.up.to(dtype))
        update = torch.einsum("rc,...co->...ro", self.small.to(dtype), parts).flatten(-2)
        return result + self.strength * self.scale * update

    def tensors(self) -> dict[str, Tensor]:
        return {"w1": self.small, "w2_a": self.up, "w2_b": self.down}


_KINDS: dict[str, type[nn.Module]] = {"lora": LoraLinear, "dora": DoraLinear, "lokr": LokrLinear}
AnyAdapter = LoraLinear | LokrLinear

# Endings of the parts in files. Core, diffusers and PEFT read each in these forms.
_LOKR = {"w1": "lokr_w1", "w2_a": "lokr_w2_a", "w2_b": "lokr_w2_b"}
_PEFT = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    **_LOKR,
}
_AI_TOOLKIT = {**_PEFT, "magnitude": "dora_scale"}
_KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale", **_LOKR}


def add_adapters(model: Krea2Transformer, settings: Adapter, seed: int = 0) -> list[AnyAdapter]:
    """Put an adapter beside each targeted layer of a frozen model; the first pass is unchanged."""
    model.requires_grad_(False)
    added = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in list(targeted(model, settings.targets)):
            layer = model.get_submodule(name)
            adapter = _KINDS[settings.method](layer, settings)
            device = _device(layer)
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent)._modules[attribute] = adapter
            for parameter in (adapter.get_parameter(n) for n in _own(adapter)):
                parameter.data = parameter.data.to(device)
            added.append(adapter)
    return added  # type: ignore[return-value]


def targeted(model: Krea2Transformer, targets: str) -> Iterator[str]:
    """Names of the layers that adapters go beside."""
    for name, layer in model.named_modules():
        if isinstance(layer, _LINEAR) and is_target(name, targets):
            yield name


def adapters_of(model: nn.Module) -> dict[str, AnyAdapter]:
    """Adapters by the names of the layers they are beside."""
    kinds = (LoraLinear, LokrLinear)
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds)}


def set_strength(model: nn.Module, strength: float) -> None:
    """The strength of all adapters; 0 is the model without them."""
    for adapter in adapters_of(model).values():
        adapter.strength = strength


def file_tensors(adapters: Mapping[str, AnyAdapter], key_style: str) -> dict[str, Tensor]:
    """Tensors of adapters in float32, by the names of a trainer's files.

    adapters: by the names of their layers.
    key_style: "ai-toolkit" (diffusion_model., official names), "kohya" (lora_unet_, with alpha) or
        "diffusers" (transformer., diffusers' names).
    """
    result: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        tensors = {part: tensor.detach() for part, tensor in adapter.tensors().items()}
        result |= _named(name, tensors, adapter, key_style)
    return {name: tensor.float().cpu().contiguous() for name, tensor in result.items()}


def _named(
    name: str, tensors: dict[str, Tensor], adapter: AnyAdapter, key_style: str
) -> dict[str, Tensor]:
    layer = layer_in_files(name, key_style)
    if key_style == "kohya":
        scale, endings = {"alpha": torch.tensor(float(adapter.scale * adapter.rank))}, _KOHYA
    else:
        # Without alpha the scale is 1, which every reader agrees on: it is in the matrix.
        scale, endings = {}, _PEFT if key_style == DIFFUSERS else _AI_TOOLKIT
        factor = "w2_a" if "w1" in tensors else "up"
        tensors = {**tensors, factor: tensors[factor] * adapter.scale}
    if isinstance(adapter, DoraLinear):
        if adapter.by_rows != (key_style == DIFFUSERS):
            expected = ROWS if key_style == DIFFUSERS else COLUMNS
            raise ValueError(
                f"Readers of {key_style} files take a DoRA's lengths for those of {expected}, and "
                f"these are others. Train with adapter.magnitude {expected}, or none."
            )
        if adapter.by_rows:
            tensors["magnitude"] = tensors["magnitude"].flatten()
    return {f"{layer}.{endings.get(part, part)}": t for part, t in {**tensors, **scale}.items()}


def _own(adapter: nn.Module) -> list[str]:
    """Names of an adapter's own parameters, without those of its layer."""
    return [name for name, _ in adapter.named_parameters(recurse=False)]


def _frozen(layer: Any) -> Any:
    """The frozen layer inside of a layer's adapters."""
    while isinstance(layer, (LoraLinear, LokrLinear)):
        layer = layer.layer
    return layer


def frozen_weight(layer: Any, example: Tensor) -> Tensor:
    """The weight in float32 of a frozen layer, without the adapters beside it."""
    layer = _frozen(layer)
    weight = layer.weight_for(example) if isinstance(layer, FrozenLinear) else layer.weight
    return weight.detach().float()


def _sides(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    return layer.out_features, layer.in_features


def _device(layer: nn.Module) -> torch.device:
    tensors = [*layer.parameters(), *layer.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number up to `most`, and not the number itself."""
    return max(d for d in range(1, min(most, math.isqrt(number)) + 1) if number % d == 0)
