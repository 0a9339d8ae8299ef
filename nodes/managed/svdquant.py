"""Low-rank branches of quantised layers (SVDQuant, Li et al., 2024).

Some four-bit files store the strongest directions of a matrix separately, in 16 bits: a layer's
output is that of its quantised weight plus `svdq_l1 (svdq_l2 x)`. Each branch becomes two layers
next to its own, which memory management moves like any other.
"""

import comfy.utils

from ...krea2_model.checkpoints.identify import CheckpointError
from ...krea2_model.checkpoints.quantised import BRANCH

_MODULE = "_branch"


def take_branches(tensors: dict, name: str) -> tuple[dict, dict[str, tuple]]:
    """Tensors without those of branches, and each branch's (up, down) by its layer's name.

    Raises CheckpointError where one half of a branch is missing.
    """
    rest = {key: tensor for key, tensor in tensors.items() if not key.endswith(BRANCH)}
    layers = sorted({key.rpartition(".")[0] for key in tensors.keys() - rest.keys()})
    branches = {layer: tuple(tensors.get(f"{layer}{end}") for end in BRANCH) for layer in layers}
    for layer, (up, down) in branches.items():
        weight = f"{layer}.weight"
        if up is None or down is None or weight not in rest:
            raise CheckpointError(
                f"{name} has an incomplete low-rank branch at {layer}; expected {weight} and both "
                f"of {', '.join(layer + end for end in BRANCH)}. Download it again."
            )
    return rest, branches


def add_branches(module, branches: dict[str, tuple], name: str) -> dict:
    """Build the branches of `module`'s layers; returns their weights by module name.

    Raises CheckpointError where a branch does not fit its layer.
    """
    weights = {}
    for path, (up, down) in branches.items():
        layer = comfy.utils.get_attr(module, path)
        rows, columns, rank = layer.out_features, layer.in_features, down.shape[0]
        if tuple(up.shape) != (rows, rank) or tuple(down.shape) != (rank, columns):
            raise CheckpointError(
                f"{name} has a low-rank branch of {tuple(up.shape)} times {tuple(down.shape)} at "
                f"{path}; expected ({rows}, rank) times (rank, {columns}). Download it again."
            )
        parent_path, _, child = path.rpartition(".")
        parent = comfy.utils.get_attr(module, parent_path)
        for part, inputs, outputs, weight in (
            ("down", columns, rank, down),
            ("up", rank, rows, up),
        ):
            branch = type(layer)(inputs, outputs, bias=False, device=up.device, dtype=up.dtype)
            parent.add_module(f"{child}{_MODULE}_{part}", branch)
            weights[f"{path}{_MODULE}_{part}.weight"] = weight
        layer.register_forward_hook(
            _plus(
                getattr(parent, f"{child}{_MODULE}_up"), getattr(parent, f"{child}{_MODULE}_down")
            )
        )
    return weights


def file_name(name: str) -> str:
    """The name of a branch's weight in files; other names unchanged."""
    for part, end in (("up", BRANCH[0]), ("down", BRANCH[1])):
        name = name.replace(f"{_MODULE}_{part}.weight", end)
    return name


def _plus(up, down):
    def hook(layer, inputs, output):
        return output + up(down(inputs[0]))

    return hook
