"""LoRA arithmetic of each style, and a module with LoRAs merged in.

The formulas are those of the trainers: LoRA (Hu and others, 2021), LoKr and LoHa (LyCORIS), DoRA
(Liu and others, 2024, as PEFT and LyCORIS compute it). OFT, BOFT and GLoRA, which change a weight
by what it holds, follow ComfyUI's adapters to the number, so that a file means the same in both.
Everything is calculated in float32.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..checkpoints.quantised_layers import Change, QuantisedLinear
from ..checkpoints.transformer_keys import Shape


@dataclass(frozen=True)
class Update:
    """One LoRA's update of one weight.

    kind: "lora", "lokr", "loha", "diff", "set", "oft", "boft" or "glora"; `parts` are its matrices
        by the names of `names`.
    alpha: divided by the rank it gives the scale; of OFT and BOFT it limits the rotation.
    header_scale: the scale itself, where no tensor but the file's header gives it.
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
    header_scale: float | None = None

    @property
    def rank(self) -> int | None:
        if self.kind == "glora":
            return min(self.parts["a1"].shape)
        for part, axis in (("down", 0), ("w1_b", 0), ("w2_b", 0), ("hada_w1_b", 0)):
            if part in self.parts:
                return self.parts[part].shape[axis]
        return None

    @property
    def scale(self) -> float:
        """The header's, or alpha over rank; without alpha, or where nothing has a rank, 1."""
        if self.header_scale is not None:
            return self.header_scale
        if self.alpha is None or self.rank is None:
            return 1.0
        return self.alpha / self.rank

    @property
    def magnitude(self) -> Tensor | None:
        return self.parts.get("magnitude")

    @property
    def needs_fused_weights(self) -> bool:
        """True if `apply` needs the norms of all fused weights: DoRA over columns."""
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
        """The shape of the difference for all fused rows."""
        parts = self.parts
        if self.kind == "lora":
            return (parts["up"].shape[0], *parts["down"].shape[1:])
        if self.kind == "loha":
            return (parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1])
        if self.kind == "lokr":
            first = self._factor_shape("w1")
            second = self._factor_shape("w2")
            return (first[0] * second[0], first[1] * second[1])
        if self.kind == "oft":
            return (parts["oft_blocks"].shape[0] * parts["oft_blocks"].shape[1],)
        if self.kind == "boft":
            return (parts["oft_blocks"].shape[1] * parts["oft_blocks"].shape[2],)
        if self.kind == "glora":
            # Newer files multiply b1 b2, older ones b2 b1: outputs times inputs in both.
            b1, b2 = parts["b1"].shape, parts["b2"].shape
            return (b1[0], b2[1]) if b1[1] == self.rank == b2[0] else (b2[0], b1[1])
        return tuple(parts[self.kind].shape)

    def _factor_shape(self, name: str) -> tuple[int, int]:
        if name in self.parts:
            rows, columns = self.parts[name].shape
        else:
            rows = self.parts[f"{name}_a"].shape[0]
            columns = self.parts[f"{name}_b"].shape[1]
        return rows, columns

    def branch(self) -> tuple[Tensor, Tensor] | None:
        """Matrices (outputs, rank) and (rank, inputs) whose product times `scale` is the update.

        None for anything but a plain LoRA.
        """
        if self.kind != "lora" or self.magnitude is not None:
            return None
        rows = slice(None) if self.rows is None else slice(*self.rows)
        return self.parts["up"][rows].flatten(1), self.parts["down"].flatten(1)

    def parts_without(self, name: str) -> Mapping[str, Tensor]:
        return {other: tensor for other, tensor in self.parts.items() if other != name}

    def with_parts(self, parts: Mapping[str, Tensor]) -> Update:
        """The same update with other tensors, such as copies on a device."""
        return replace(self, parts=parts)

    def fused_norm(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Column norms (1, in) of the fused weights plus their difference, for `apply`."""
        fused = torch.cat([weights[name].float() for name in self.fused])
        return (fused + self.difference(fused.device, all_rows=True)).norm(dim=0, keepdim=True)

    def difference(self, device: torch.device | str = "cpu", all_rows: bool = False) -> Tensor:
        """The difference added to the weight at strength 1 (without DoRA), in float32.

        all_rows: for all fused rows instead of the weight's own.
        """
        part = self._reader(device)
        if self.kind == "lora":
            rows = slice(None) if all_rows or self.rows is None else slice(*self.rows)
            return self.scale * (part("up")[rows].flatten(1) @ part("down").flatten(1))
        if self.kind == "lokr":
            result = torch.kron(*self.factors(device))
        elif self.kind == "loha":
            first = part("hada_w1_a") @ part("hada_w1_b")
            second = part("hada_w2_a") @ part("hada_w2_b")
            if first.shape != second.shape:
                # Multiplying would stretch the smaller one.
                raise ValueError(f"factors of {tuple(first.shape)} and {tuple(second.shape)}")
            result = first * second
        else:
            result = part(self.kind)
        if self.rows is not None and not all_rows:
            result = result[slice(*self.rows)]
        return self.scale * result

    def factors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The two factors of LoKr, in float32."""
        part = self._reader(device)

        def factor(name: str) -> Tensor:
            if name in self.parts:
                return part(name)
            return part(f"{name}_a") @ part(f"{name}_b")

        return factor("w1"), factor("w2")

    def magnitude_factors(self, weight: Tensor, fused_norm: Tensor | None = None) -> Tensor:
        """DoRA's factors on the rows (out, 1) or columns (1, in) of the weight plus difference.

        weight: in float32. fused_norm: as for `apply`.
        """
        return self._magnitude_over(weight + self.difference(weight.device), fused_norm)

    def _magnitude_over(self, changed: Tensor, fused_norm: Tensor | None) -> Tensor:
        assert self.magnitude is not None
        magnitude = self.magnitude.to(changed.device, torch.float32)
        if self.over_columns:
            magnitude = magnitude.reshape(1, -1)
            norm = changed.norm(dim=0, keepdim=True) if fused_norm is None else fused_norm
        else:
            magnitude = magnitude.reshape(-1, 1)
            if self.rows is not None:
                magnitude = magnitude[slice(*self.rows)]
            norm = changed.norm(dim=1, keepdim=True)
        return magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny)

    def apply(self, weight: Tensor, strength: float, fused_norm: Tensor | None = None) -> Tensor:
        """The changed weight in float32; `weight` is left as it is.

        fused_norm: column norms (1, in) of the fused weight plus difference, where
            `needs_fused_weights`.
        """
        weight = weight.float()
        if self.kind in OF_THE_WEIGHT:
            return weight + strength * OF_THE_WEIGHT[self.kind](self, weight, strength)
        change = self.difference(weight.device).reshape(weight.shape)
        if self.kind == "set":
            return torch.lerp(weight, change, strength)
        if self.magnitude is None:
            return weight.add(change, alpha=strength)
        changed = weight + change
        changed *= self._magnitude_over(changed, fused_norm)
        return torch.lerp(weight, changed, strength)

    @functools.cached_property
    def largest_change(self) -> float:
        """A bound on the values of the difference at strength 1; NaN if its parts hold NaN.

        0 means that nothing changes. Of OFT and BOFT, which rotate, and of GLoRA it is relative to
        the weight.
        """
        parts = self.parts

        def product(first: str, second: str) -> float:
            inner = min(parts[first].shape[1], parts[second].shape[0])
            return inner * _largest(parts[first]) * _largest(parts[second])

        def factor(name: str) -> float:
            return _largest(parts[name]) if name in parts else product(f"{name}_a", f"{name}_b")

        if self.kind == "lora":
            bound = product("up", "down")
        elif self.kind == "lokr":
            bound = factor("w1") * factor("w2")
        elif self.kind == "loha":
            bound = product("hada_w1_a", "hada_w1_b") * product("hada_w2_a", "hada_w2_b")
        elif self.kind == "glora":
            bound = product("a1", "a2") + product("b1", "b2")
        elif self.kind in ("oft", "boft"):
            bound = sum(_largest(tensor) for tensor in parts.values()) + 0 * (self.alpha or 0.0)
            # Any sound numbers give a rotation, however large they are.
            return min(bound, 1.0) if bound <= _LARGEST_BLOCK else bound
        else:
            bound = sum(_largest(tensor) for tensor in parts.values())
        if self.magnitude is not None or self.kind == "set":
            # These replace the weight, zeros too.
            return max(abs(self.scale) * bound, 1.0) + 0 * sum(map(_largest, parts.values()))
        return abs(self.scale) * bound

    def glora_parts(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """a1, a2, b1, b2 for a weight of a shape; older files have each two the other way round."""
        part = self._reader(device)
        a1, a2, b1, b2 = (part(name).flatten(1) for name in ("a1", "a2", "b1", "b2"))
        newer = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
        older = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
        square = a2.shape[0] == shape[0] == shape[1]
        return (a2, a1, b2, b1) if older and (not newer or square) else (a1, a2, b1, b2)

    def _reader(self, device) -> Callable[[str], Tensor]:
        return lambda name: self.parts[name].to(device=device, dtype=torch.float32)


# Beyond this the inverse of Cayley's transform loses all its digits.
_LARGEST_BLOCK = 1e6


def _largest(tensor: Tensor) -> float:
    """The largest magnitude, in one pass and without a copy; NaN where there is one."""
    least, most = (tensor.float() if tensor.element_size() < 2 else tensor).aminmax()
    return max(abs(float(least)), abs(float(most)))


def _rotations(update: Update, device) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices (..., b, b) by Cayley's transform of the blocks, and the identity."""
    blocks = update.parts["oft_blocks"].to(device=device, dtype=torch.float32)
    skew = blocks - blocks.mT
    if update.alpha is not None and update.alpha > 0:
        norm = skew.norm() + 1e-8
        skew = torch.where(norm > update.alpha, skew * (update.alpha / norm), skew)
    identity = torch.eye(blocks.shape[-1], device=device)
    return (identity + skew) @ torch.linalg.inv(identity - skew), identity


def _oft_change(update: Update, weight: Tensor, strength: float) -> Tensor:
    """Rows of the weight rotated in blocks. The strength counts here and again in the sum."""
    rotations, identity = _rotations(update, weight.device)
    blocks = weight.reshape(*rotations.shape[:2], *weight.shape[1:])
    turned = (strength * (rotations - identity)).mT @ blocks
    return turned.reshape(weight.shape)


def _boft_change(update: Update, weight: Tensor, strength: float) -> Tensor:
    """Rows rotated in blocks of several butterfly stages, then rescaled."""
    rotations, identity = _rotations(update, weight.device)
    size, turned = rotations.shape[-1], weight
    for stage, blocks in enumerate(rotations):
        if strength != 1:
            blocks = strength * blocks + (1 - strength) * identity
        # A stage brings rows that lie `span` apart into one block, and back again.
        span = 2**stage * (size // 2)
        paired = turned.reshape(-1, 2, span, weight.shape[1]).transpose(1, 2)
        paired = blocks @ paired.reshape(-1, size, weight.shape[1])
        turned = paired.reshape(-1, span, 2, weight.shape[1]).transpose(1, 2)
    turned = turned.reshape(weight.shape)
    if "rescale" in update.parts:
        turned = turned * update.parts["rescale"].to(turned).reshape(-1, 1)
    return turned - weight


def _glora_change(update: Update, weight: Tensor, strength: float) -> Tensor:
    """`scale * (weight a1 a2 + b1 b2)`."""
    a1, a2, b1, b2 = update.glora_parts(weight.shape, weight.device)
    return update.scale * (weight @ a1 @ a2 + b1 @ b2)


# Kinds whose difference depends on the weight, which is (outputs, ...): they are linear in it.
OF_THE_WEIGHT = {"oft": _oft_change, "boft": _boft_change, "glora": _glora_change}


# Updates and strengths by weight, as they were before an `add`.
PreviousUpdates = Mapping[str, list[tuple[Update, float]]]


class LoraStack:
    """LoRAs merged into a module's weights, which can be restored.

    A plain weight is computed from the original and all updates in float32 and rounded once.
    Originals stay where they were, so a weight that was mapped from a file takes no more memory
    than its merged copy. Quantised layers hold updates beside their weights.
    """

    def __init__(self, module: nn.Module):
        self.weights = dict(module.named_parameters())
        self.layers = {
            f"{name}.weight": layer
            for name, layer in module.named_modules()
            if isinstance(layer, QuantisedLinear)
        }
        self.originals: dict[str, Tensor] = {}
        self.updates: dict[str, list[tuple[Update, float]]] = defaultdict(list)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all weights that a LoRA may change."""
        plain: dict[str, Shape] = {n: tuple(weight.shape) for n, weight in self.weights.items()}
        return plain | {name: layer.shape for name, layer in self.layers.items()}

    def add(self, *loras: tuple[Mapping[str, list[Update]], float]) -> PreviousUpdates:
        """Merge LoRAs (updates and a strength each) on top of the present ones.

        Several at once compute each weight once. Returns the argument with which `restore` undoes
        it. Raises ValueError where a weight would not stay finite, and changes nothing then.
        """
        for _, strength in loras:
            if not abs(strength) <= torch.finfo(torch.float32).max:
                raise ValueError(f"The LoRA's scale is {strength}; expected a finite number.")
        previous = {name: list(self.updates[name]) for updates, _ in loras for name in updates}
        try:
            for name in previous:
                if name not in self.layers:
                    self.originals.setdefault(name, self.weights[name].data)
                for updates, strength in loras:
                    self.updates[name] += [(update, strength) for update in updates.get(name, ())]
                if not self._update_weight(name):
                    strengths = ", ".join(f"{s:g}" for u, s in loras if name in u)
                    raise ValueError(
                        f"The LoRA at {strengths} makes {name} infinite in {self._dtype(name)}; "
                        "nothing was changed. Lower its strength, or choose another LoRA."
                    )
        except BaseException:
            self.restore(previous)
            raise
        return previous

    def restore(self, previous: PreviousUpdates) -> None:
        """Undo the last `add`."""
        for name, updates in previous.items():
            changed, self.updates[name] = self.updates[name] != updates, list(updates)
            if updates or name in self.layers:
                if changed:
                    self._update_weight(name)
            elif name in self.originals:
                original = self.originals.pop(name)
                self.weights[name].data = original.to(self.weights[name].device)

    def clear(self) -> None:
        for name, original in self.originals.items():
            self.weights[name].data = original.to(self.weights[name].device)
        for layer in self.layers.values():
            layer.change(())
        self.originals.clear()
        self.updates.clear()

    def _update_weight(self, name: str) -> bool:
        """Compute a weight from its original and updates; False if it would not be finite."""
        layer = self.layers.get(name)
        if layer is None:
            merged = self._merged(name)
            if not bool(torch.isfinite(merged).all()):
                return False
            self.weights[name].data = merged
            return True
        layer.change([Change(u, strength, self._norm(u)) for u, strength in self.updates[name]])
        # Dequantise only if it might overflow: float16 ends at 65504, far beyond any sound LoRA.
        largest = sum(u.largest_change * abs(strength) for u, strength in self.updates[name])
        if largest < torch.finfo(layer.dtype).max / 2:
            return True
        return bool(torch.isfinite(layer.weight).all())

    def _merged(self, name: str) -> Tensor:
        weight = self.originals[name]
        for update, strength in self.updates[name]:
            weight = update.apply(weight, strength, self._norm(update))
        return weight.to(self.originals[name].dtype).to(self.weights[name].device)

    def _norm(self, update: Update) -> Tensor | None:
        if not update.needs_fused_weights:
            return None
        return update.fused_norm({name: self._original(name) for name in update.fused})

    def _original(self, name: str) -> Tensor:
        if name in self.layers:
            return self.layers[name].original
        return self.originals.get(name, self.weights[name].data)

    def _dtype(self, name: str) -> torch.dtype:
        return self.layers[name].dtype if name in self.layers else self.originals[name].dtype
