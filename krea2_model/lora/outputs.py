"""A LoRA's change of a layer's outputs, for every kind: what `Update.apply` does to the weight.

A kind that needs the weight itself is computed from the layer's own outputs, so that any format of
weights will do. Only DoRA's norms are of the weight, which is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from .updates import OF_THE_WEIGHT, Update

# Of inputs (B, R, D), what is added to the outputs.
Change = Callable[[Tensor], Tensor]


def output_change(
    update: Update,
    layer: nn.Module,
    strength: float,
    like: Tensor,
    weight_of: Callable[[str], Tensor],
) -> Change:
    """The change of a linear layer's outputs by an update of its weight.

    like: an input, for device and dtype. weight_of: a weight by its name in the model, as a plain
        tensor; called for DoRA alone.
    """

    def outputs(hidden: Tensor) -> Tensor:
        """The layer's own, without its bias and without its hooks."""
        out = layer.forward(hidden)
        bias = getattr(layer, "bias", None)
        return out if bias is None else out - bias.to(out)

    if update.kind in OF_THE_WEIGHT:
        return _of_outputs(update, outputs, strength, like)
    if update.kind == "set":
        weight = update.difference(like.device).to(like.dtype)
        return lambda hidden: strength * (F.linear(hidden, weight) - outputs(hidden))
    if update.magnitude is None:
        change = _difference(update, like)
        return lambda hidden: strength * change(hidden)
    return _with_magnitude(update, outputs, strength, like, weight_of)


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as a plain tensor, whatever holds it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return plain(weight)


def plain(weight: Tensor) -> Tensor:
    """A weight or a bias as a plain tensor, whatever holds it."""
    is_plain = type(weight).dequantize is Tensor.dequantize
    return weight.detach() if is_plain else weight.dequantize()


def _difference(update: Update, like: Tensor) -> Change:
    """`difference x`, without the matrix where its factors are smaller."""
    matrices = update.branch()
    if matrices is not None:
        up, down = (matrix.to(like) for matrix in matrices)
        scale = update.scale
        return lambda hidden: scale * (hidden @ down.mT @ up.mT)
    if update.kind == "lokr":
        return _kronecker(update, like)
    # A matrix as large as the weight is made for each use, and dropped.
    return lambda hidden: F.linear(hidden, update.difference(hidden.device).to(hidden.dtype))


def _kronecker(update: Update, like: Tensor) -> Change:
    """`(w1 x w2) x` by its two factors."""
    first, second = (factor.to(like.dtype) for factor in update.factors(like.device))
    rows = slice(None) if update.rows is None else slice(*update.rows)
    scale = update.scale

    def change(hidden: Tensor) -> Tensor:
        columns = hidden.unflatten(-1, (first.shape[1], second.shape[1]))
        return scale * (first @ (columns @ second.mT)).flatten(-2)[..., rows]

    return change


def _of_outputs(update: Update, outputs: Change, strength: float, like: Tensor) -> Change:
    """Of OFT, BOFT and GLoRA, which multiply the weight: its outputs stand for it."""
    if update.kind != "glora":
        kind = OF_THE_WEIGHT[update.kind]

        def turned(hidden: Tensor) -> Tensor:
            out = outputs(hidden)
            columns = out.flatten(0, -2).float().mT
            return (strength * kind(update, columns, strength)).mT.reshape(out.shape).to(out.dtype)

        return turned

    def change(hidden: Tensor) -> Tensor:
        out = outputs(hidden[..., :1, :])
        a1, a2, b1, b2 = (
            part.to(hidden.dtype)
            for part in update.glora_parts((out.shape[-1], hidden.shape[-1]), hidden.device)
        )
        inner = outputs(hidden @ a2.mT @ a1.mT) + hidden @ b2.mT @ b1.mT
        return strength * update.scale * inner

    return change


def _with_magnitude(update, outputs, strength, like, weight_of) -> Change:
    """DoRA: rows or columns of the changed weight are scaled to a length."""
    added = _difference(replace(update, parts=update.parts_without("magnitude")), like)
    weight = weight_of(update.weight).to(like.device)
    norm = None
    if update.needs_fused_weights:
        fused = {name: weight_of(name).to(like.device) for name in update.fused}
        norm = update.fused_norm(fused)
    factors = update.magnitude_factors(weight.float(), norm).to(like.dtype).flatten()
    if update.over_columns:

        def by_columns(hidden: Tensor) -> Tensor:
            scaled = hidden * factors
            return strength * (outputs(scaled) + added(scaled) - outputs(hidden))

        return by_columns

    def by_rows(hidden: Tensor) -> Tensor:
        out = outputs(hidden)
        return strength * (factors * (out + added(hidden)) - out)

    return by_rows
