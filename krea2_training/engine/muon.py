"""Muon over all matrices of a shape at once.

torch's own steps one matrix after the other, about thirty operations each: for many small matrices
a GPU waits on the host. States are torch's, so runs go on with either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .world import is_sharded

# Numbers of the matrices that are orthogonalised together: larger ones fill a GPU by themselves.
TOGETHER = 2**24
# Of the quintic, and below which a norm is not divided by.
_COEFFICIENTS, _EPSILON, _ITERATIONS = (3.4445, -4.7750, 2.0315), 1e-7, 5


class Muon(torch.optim.Muon):
    """torch's Muon with updates of AdamW's size and Nesterov's momentum, in fewer operations."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float):
        super().__init__(
            parameters,
            lr=lr,
            weight_decay=weight_decay,
            ns_coefficients=_COEFFICIENTS,
            eps=_EPSILON,
            ns_steps=_ITERATIONS,
            adjust_lr_fn="match_rms_adamw",
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of all parameters that have a gradient; `closure` is torch's."""
        if any(is_sharded(p) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = (parameter.shape, parameter.device, parameter.dtype)
                    by_shape.setdefault(key, []).append(parameter)
            for alike in by_shape.values():
                for part in _parts(alike):
                    self._step_alike(part, group["lr"], group["weight_decay"], group["momentum"])
        return loss

    def _step_alike(
        self, parameters: list[Tensor], rate: float, decay: float, momentum: float
    ) -> None:
        buffers = [self._momentum_of(parameter) for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))
        directions = orthogonalised(updates).to(parameters[0].dtype)
        scale = 0.2 * math.sqrt(max(updates.shape[1:]))
        torch._foreach_mul_(parameters, 1 - rate * decay)
        torch._foreach_add_(parameters, directions.unbind(), alpha=-rate * scale)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, A, B) with nearly all singular values near 1, in bfloat16, by Newton-Schulz."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.bfloat16()
    found = found.mT if is_tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = found @ found.mT
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, change, found, beta=a)
    return found.mT if is_tall else found


def _parts(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    most = max(1, TOGETHER // matrices[0].numel())
    for start in range(0, len(matrices), most):
        yield matrices[start : start + most]
