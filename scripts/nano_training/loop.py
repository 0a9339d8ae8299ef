"""What every training run of krea2-nano shares: steps, averages, a log, and going on later."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
SAVE_EVERY_SECONDS = 120
LOG_EVERY_STEPS = 50


def autocast() -> torch.autocast:
    """bfloat16 where it is safe; weights, losses and optimisers stay in float32."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


@dataclass
class Schedule:
    """Learning rate over a run: a linear warm-up, a plateau, a linear way down to 0."""

    steps: int
    warmup: int = 100
    cooldown: float = 0.3

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        fall = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return max(0.0, min(rise, fall, 1.0))


@dataclass
class Run:
    """One training run in a folder: resumes where its last saved state ends.

    `averages` holds the exponential moving averages of the weights, which are what is shipped.
    """

    name: str
    folder: Path
    model: nn.Module
    optimisers: list[torch.optim.Optimizer]
    schedule: Schedule
    decay: float = 0.995
    step: int = 0
    averages: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.model.to(DEVICE)
        self.rates = [[g["lr"] for g in o.param_groups] for o in self.optimisers]
        self.averages = {n: p.detach().clone() for n, p in self._trained()}
        if self.path.is_file():
            state = torch.load(self.path, map_location=DEVICE, weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.averages = state["averages"]
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            logger.info("%s: goes on at step %d of %d", self.name, self.step, self.schedule.steps)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def train(self, loss_of_step: Callable[[int], Tensor]) -> None:
        """Run the steps that are left; `loss_of_step(step)` draws a batch and returns its loss."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = logged = time.monotonic()
        losses: list[float] = []
        while self.step < self.schedule.steps:
            self._set_rates()
            loss = loss_of_step(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_([p for _, p in self._trained()], 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            self.step += 1
            self._average()
            losses.append(loss.item())
            if self.step % LOG_EVERY_STEPS == 0:
                now = time.monotonic()
                self._log(sum(losses) / len(losses), (now - logged) / len(losses))
                losses, logged = [], now
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "averages": self.averages,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def averaged_state(self) -> dict[str, Tensor]:
        """The model's state with the averages of what was trained."""
        return {**self.model.state_dict(), **self.averages}

    def _trained(self):
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _set_rates(self) -> None:
        factor = self.schedule.factor(self.step)
        for optimiser, rates in zip(self.optimisers, self.rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _average(self) -> None:
        # Early on, a long memory would only remember the initial weights.
        decay = min(self.decay, self.step / (self.step + 10))
        for name, parameter in self._trained():
            self.averages[name].lerp_(parameter.detach(), 1 - decay)

    def _log(self, loss: float, seconds: float) -> None:
        record = {"step": self.step, "loss": round(loss, 5), "seconds_a_step": round(seconds, 3)}
        logger.info("%s %s", self.name, record)
        with (self.folder / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
