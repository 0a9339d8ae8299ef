"""LoRAs as low-rank branches, `up (down x)`, where ComfyUI cannot merge them into the weight.

Weights that stream to the device, and GGUF weights, get their patches on each use: a difference as
large as the weight is made, added and dropped at every step. A plain LoRA is cheaper to add to the
layer's output. Quantised layers then compute with their own weights, and the LoRA is not rounded to
their format.
"""

from typing import NamedTuple

import comfy.weight_adapter
import torch
from comfy.model_patcher import LowVramPatch

from .lora import LoraPatch


class Branch(NamedTuple):
    """Matrices (outputs, rank) and (rank, inputs), and the scale of their product."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    def to(self, like: torch.Tensor) -> "Branch":
        return Branch(self.up.to(like), self.down.to(like), self.scale)


class WithBranches(torch.nn.Module):
    """A linear layer of ComfyUI that adds plain LoRAs to its output, not to its weight."""

    weight: torch.Tensor
    weight_function: list

    def forward(self, input, *args, **kwargs):
        branches = self._branches(input) if self.weight_function else None
        if branches is None:
            return super().forward(input, *args, **kwargs)
        functions, self.weight_function = self.weight_function, []
        try:
            output = super().forward(input, *args, **kwargs)
        finally:
            self.weight_function = functions
        rows = output.flatten(0, -2)
        for up, down, scale in branches:
            inner = input.flatten(0, -2) @ down.mT
            # Summed in the product's own precision, and rounded once.
            rows = torch.addmm(rows, inner, up.mT, alpha=scale)
        return rows.view_as(output)

    def _branches(self, input) -> list[Branch] | None:
        """On the input's device and in its dtype; None unless all patches are plain LoRAs.

        Cached on the patch object, which ComfyUI rebuilds when patches change, where the weight is
        on the device too. A weight that streams is much larger than they are.
        """
        if torch.is_grad_enabled() or type(input) is not torch.Tensor:
            return None
        result = []
        for patch in self.weight_function:
            cached = getattr(patch, "krea2_branches", None)
            if cached is not None and cached[0] == (input.device, input.dtype):
                result += cached[1]
                continue
            branches = branches_of(patch)
            if branches is None:
                return None
            branches = [branch.to(input) for branch in branches]
            if self.weight.device == input.device:
                patch.krea2_branches = (input.device, input.dtype), branches
            result += branches
        return result


def branches_of(patch) -> list[Branch] | None:
    """The plain LoRAs of a patch on use, or None where it holds anything else."""
    if type(patch) is not LowVramPatch or getattr(patch, "prepared_patches", None) is not None:
        return None
    branches = []
    for strength, adapter, strength_model, offset, function in patch.patches[patch.key]:
        if strength_model != 1.0 or offset is not None or function is not None:
            return None
        branch = _branch(adapter)
        if branch is None:
            return None
        branches.append(branch._replace(scale=branch.scale * strength))
    return branches


def branch_bytes(patches: dict, size: int) -> int:
    """Bytes of the branches of a patcher's patches, at `size` bytes per value."""
    branches = (_branch(entry[1]) for entries in patches.values() for entry in entries)
    return sum(size * (b.up.numel() + b.down.numel()) for b in branches if b is not None)


def _branch(adapter) -> Branch | None:
    if isinstance(adapter, LoraPatch):
        update = adapter.weights[0]
        matrices = update.branch()
        if matrices is None:
            return None
        up, down = matrices
        return Branch(up, down, update.scale)
    if type(adapter) is comfy.weight_adapter.LoRAAdapter:
        up, down, alpha, *rest = adapter.weights
        if all(extra is None for extra in rest):
            scale = 1.0 if alpha is None else float(alpha / down.shape[0])
            up, down = up.flatten(1), down.flatten(1)
            return Branch(up, down, scale) if up.shape[1] == down.shape[0] else None
    return None
