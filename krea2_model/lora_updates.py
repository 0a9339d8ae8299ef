"""What a LoRA does to weights: each style's arithmetic, and a module with LoRAs merged in.

The formulas are those of the trainers: LoRA (Hu and others, 2021), LoKr and LoHa (LyCORIS), DoRA
(Liu and others, 2024, as PEFT and LyCORIS compute it). Everything is calculated in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .transformer_keys import Shape


@dataclass(frozen=True)
class Update:
    """One change of one weight.

    kind: "lora", "lokr", "loha", "diff" or "set"; `parts` are its matrices by `_PARTS`' names.
    rows: where in a fused update the weight's own rows begin and end.
    fused: the weights that share the update, in its order; a magnitude (DoRA) of whole columns
        needs them all.
    """

    weight: str
    kind: str
    parts: Mapping[str, Tensor]
    alpha: float | None = None
    rows: tuple[int, int] | None = None
    fused: tuple[str, ...] = ()

    @property
    def rank(self) -> int | None:
        for part, axis in (("down", 0), ("w1_b", 0), ("w2_b", 0), ("hada_w1_b", 0)):
            if part in self.parts:
                return self.parts[part].shape[axis]
        return None

    @property
    def scale(self) -> float:
        """alpha over rank; without alpha, or where nothing has a rank, 1."""
        if self.alpha is None or self.rank is None:
            return 1.0
        return self.alpha / self.rank

    @property
    def magnitude(self) -> Tensor | None:
        return self.parts.get("magnitude")

    @property
    def needs_fused_weights(self) -> bool:
        """Whether the weights it is fused with have to be known: DoRA over columns."""
        return bool(self.fused) and self.magnitude is not None and self.over_columns

    @property
    def over_columns(self) -> bool:
        magnitude = self.magnitude
        # One number is that of a layer with one row, whose columns are many.
        return (
            magnitude is not None
            and magnitude.ndim > 1
            and 1 == magnitude.shape[0] < magnitude.numel()
        )

    def shape(self) -> Shape:
        """The shape of the whole difference, before rows are taken."""
        parts = self.parts
        if self.kind == "lora":
            return (parts["up"].shape[0], *parts["down"].shape[1:])
        if self.kind == "loha":
            return (parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1])
        if self.kind == "lokr":
            first = self._factor_shape("w1")
            second = self._factor_shape("w2")
            return (first[0] * second[0], first[1] * second[1])
        return tuple(parts[self.kind].shape)

    def _factor_shape(self, name: str) -> tuple[int, int]:
        if name in self.parts:
            rows, columns = self.parts[name].shape
        else:
            rows = self.parts[f"{name}_a"].shape[0]
            columns = self.parts[f"{name}_b"].shape[1]
        return rows, columns

    def with_parts(self, parts: Mapping[str, Tensor]) -> Update:
        """The same update with its matrices elsewhere."""
        return replace(self, parts=parts)

    def fused_norm(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Column norms (1, in) of the fused weights plus the whole difference, for `apply`."""
        whole = torch.cat([weights[name].float() for name in self.fused])
        return (whole + self.difference(whole.device, whole=True)).norm(dim=0, keepdim=True)

    def difference(self, device: torch.device | str = "cpu", whole: bool = False) -> Tensor:
        """What is added to the weight at strength 1 (without DoRA), in float32.

        whole: of all fused rows instead of the weight's own.
        """

        def part(name: str) -> Tensor:
            return self.parts[name].to(device=device, dtype=torch.float32)

        def factor(name: str) -> Tensor:
            if name in self.parts:
                return part(name)
            return part(f"{name}_a") @ part(f"{name}_b")

        if self.kind == "lora":
            rows = slice(None) if whole or self.rows is None else slice(*self.rows)
            return self.scale * (part("up")[rows].flatten(1) @ part("down").flatten(1))
        if self.kind == "lokr":
            result = torch.kron(factor("w1"), factor("w2"))
        elif self.kind == "loha":
            first = part("hada_w1_a") @ part("hada_w1_b")
            result = first * (part("hada_w2_a") @ part("hada_w2_b"))
        else:
            result = part(self.kind)
        if self.rows is not None and not whole:
            result = result[slice(*self.rows)]
        return self.scale * result

    def apply(self, weight: Tensor, strength: float, fused_norm: Tensor | None = None) -> Tensor:
        """The changed weight in float32; `weight` is left as it is.

        fused_norm: column norms (1, in) of the fused weight plus difference, where
            `needs_fused_weights`.
        """
        weight = weight.float()
        change = self.difference(weight.device).reshape(weight.shape)
        if self.kind == "set":
            return torch.lerp(weight, change, strength)
        if self.magnitude is None:
            return weight.add(change, alpha=strength)
        changed = weight + change
        magnitude = self.magnitude.to(weight.device, torch.float32)
        if self.over_columns:
            norm = changed.norm(dim=0, keepdim=True) if fused_norm is None else fused_norm
        else:
            magnitude = magnitude.reshape(-1, 1)
            if self.rows is not None:
                magnitude = magnitude[slice(*self.rows)]
            norm = changed.norm(dim=1, keepdim=True)
        changed *= magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.lerp(weight, changed, strength)


class LoraStack:
    """LoRAs merged into a module's weights, until they are taken out again.

    Each weight is made from the original and all updates in float32 and rounded once. Originals
    are kept where they were, so a weight that was mapped from a file takes no more memory than its
    merged copy.
    """

    def __init__(self, module: nn.Module):
        self.weights = dict(module.named_parameters())
        self.originals: dict[str, Tensor] = {}
        self.updates: dict[str, list[tuple[Update, float]]] = defaultdict(list)

    def add(self, updates: Mapping[str, list[Update]], strength: float) -> None:
        for name, several in updates.items():
            self.originals.setdefault(name, self.weights[name].data)
            self.updates[name] += [(update, strength) for update in several]
        for name in updates:
            self.weights[name].data = self._merged(name)

    def clear(self) -> None:
        for name, original in self.originals.items():
            self.weights[name].data = original.to(self.weights[name].device)
        self.originals.clear()
        self.updates.clear()

    def _merged(self, name: str) -> Tensor:
        weight = self.originals[name]
        for update, strength in self.updates[name]:
            norm = None
            if update.needs_fused_weights:
                norm = update.fused_norm({n: self._original(n) for n in update.fused})
            weight = update.apply(weight, strength, norm)
        return weight.to(self.originals[name].dtype).to(self.weights[name].device)

    def _original(self, name: str) -> Tensor:
        return self.originals.get(name, self.weights[name].data)
