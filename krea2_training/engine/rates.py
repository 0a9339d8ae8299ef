"""Learning rates over a run, and the optimisers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..settings.sections import Steps
from .sharding import mesh_of


@dataclass(frozen=True)
class Rates:
    """Warm-up, stable, decay: the factor on the learning rate of each step.

    decay: share of the steps in which it falls to 0, linearly. stages: pairs of the step that a
    stage ends at and its factor.
    """

    steps: int
    warmup: int = 0
    decay: float = 0.2
    stages: tuple[tuple[int, float], ...] = ()

    def left(self, step: int) -> float:
        """The share of the run that is left at a step."""
        return (self.steps - step) / self.steps

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / (self.warmup + 1)) if self.warmup else 1.0
        left = self.left(step)
        stage = next((factor for end, factor in self.stages if step < end), 1.0)
        return stage * min(rise, 1.0 if left >= self.decay else left / self.decay)


def optimisers_of(
    named: Iterable[tuple[str, nn.Parameter]], settings: Steps
) -> list[torch.optim.Optimizer]:
    """Optimisers of the trained parameters.

    "muon" is Muon (Jordan and others, 2024) for the blocks' matrices, with updates of AdamW's size,
    and AdamW for what is left: vectors, tables, and the first and last linear layers.
    """
    parameters = list(named)
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "adamw8bit":
        return [_eight_bit([p for _, p in parameters], rate, decay)]
    if settings.optimiser == "adamw":
        return [_adamw([p for _, p in parameters], rate, decay)]
    from .muon import Muon  # not every torch has one

    inside = [p for name, p in parameters if "blocks." in name and p.ndim == 2]
    outside = [p for name, p in parameters if not ("blocks." in name and p.ndim == 2)]
    found: list[torch.optim.Optimizer] = []
    if inside:
        found.append(Muon(inside, rate, decay))
    if outside:
        found.append(_adamw(outside, rate, decay))
    return found


def check_optimiser(settings: Steps) -> None:
    """Raise ValueError where the optimiser's package is not installed."""
    if settings.optimiser != "adamw8bit":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "training.optimiser is adamw8bit, which needs bitsandbytes: pip install bitsandbytes, "
            "or choose adamw."
        ) from error


def _adamw(parameters: Sequence[Tensor], rate: float, decay: float) -> torch.optim.Optimizer:
    # One operation for all tensors takes none that lie on other processes than the rest.
    foreach = None if len(set(map(mesh_of, parameters))) == 1 else False
    betas = 0.9, 0.99
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, foreach=foreach)


def _eight_bit(parameters: Sequence[Tensor], rate: float, decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay)
