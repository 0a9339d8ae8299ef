"""What every training run of krea2-nano shares: steps, averages, a log, and going on later."""

from __future__ import annotations

import json
import logging
import math
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
        fall = (1 - self.share(step)) / self.cooldown
        return max(0.0, min(rise, fall, 1.0))

    def share(self, step: int) -> float:
        """How much of the run is done, from 0 to 1."""
        return step / self.steps

    @property
    def seconds_used(self) -> float:
        """Seconds of this run so far; a resumed run continues counting at those saved."""
        return 0.0

    def resume(self, seconds_used: float) -> None:
        """Continue a run that was saved after so many seconds."""


class TimedSchedule(Schedule):
    """A run that ends when its seconds are used, or its steps: what comes first.

    The clock starts with the first step. `share`, and with it the learning rate, follows the time.
    """

    def __init__(
        self,
        seconds: float,
        warmup: int = 100,
        cooldown: float = 0.3,
        steps: int = 10**9,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(steps, warmup, cooldown)
        self.seconds, self.clock = seconds, clock
        self.earlier = 0.0
        self.started: float | None = None

    def share(self, step: int) -> float:
        if self.started is None:
            self.started = self.clock()
        return min(1.0, max(self.seconds_used / max(self.seconds, 1e-9), step / self.steps))

    @property
    def seconds_used(self) -> float:
        running = 0.0 if self.started is None else self.clock() - self.started
        return self.earlier + running

    def resume(self, seconds_used: float) -> None:
        self.earlier, self.started = seconds_used, None


@dataclass
class Run:
    """One training run in a folder: resumes where its last saved state ends.

    `averages` holds the exponential moving averages of the weights, which are what is shipped.
    on_save: called after the state has been saved, to write what can be used already.
    A loss that is not finite returns to the saved state, a few times.
    """

    name: str
    folder: Path
    model: nn.Module
    optimisers: list[torch.optim.Optimizer]
    schedule: Schedule
    decay: float = 0.995
    step: int = 0
    averages: dict[str, Tensor] = field(default_factory=dict)
    on_save: Callable[[], None] | None = None
    save_every: float = SAVE_EVERY_SECONDS
    returns_left: int = 3

    def __post_init__(self):
        self.model.to(DEVICE)
        self.rates = [[g["lr"] for g in o.param_groups] for o in self.optimisers]
        self.averages = {n: p.detach().clone() for n, p in self._trained()}
        if self.path.is_file():
            self._load()
            logger.info("%s: goes on at step %d of %d", self.name, self.step, self.schedule.steps)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def train(self, loss_of_step: Callable[[int], Tensor]) -> None:
        """Run the steps that are left; `loss_of_step(step)` draws a batch and returns its loss."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = logged = time.monotonic()
        losses: list[Tensor] = []
        while self.schedule.share(self.step) < 1:
            self._set_rates()
            loss = loss_of_step(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_([p for _, p in self._trained()], 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            self.step += 1
            self._average()
            losses.append(loss.detach())  # Reading its value would wait for the device.
            if self.step % LOG_EVERY_STEPS == 0:
                mean, now = float(torch.stack(losses).mean()), time.monotonic()
                self._log(mean, (now - logged) / len(losses))
                losses, logged = [], now
                if not math.isfinite(mean):
                    self._return()
            if time.monotonic() - saved > self.save_every and _are_finite(losses):
                self.save()
                saved = time.monotonic()
        if not _are_finite(losses):
            self._return()
        self.save()

    def save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "averages": self.averages,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "seconds": self.schedule.seconds_used,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)
        if self.on_save is not None:
            self.on_save()

    def _load(self) -> None:
        state = torch.load(self.path, map_location=DEVICE, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.averages = state["averages"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.schedule.resume(state.get("seconds", 0.0))

    def _return(self) -> None:
        """Go back to the saved state, at a time that has passed; later batches differ."""
        if not self.returns_left or not self.path.is_file():
            raise RuntimeError(
                f"The loss of {self.name} is not finite at step {self.step}, and there is no state "
                "to return to. Lower the learning rate."
            )
        self.returns_left -= 1
        step, seconds = self.step, self.schedule.seconds_used
        self._load()
        self.step = step
        self.schedule.resume(seconds)
        logger.warning("%s: the loss is not finite; back to the state saved last", self.name)

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
        names, parameters = zip(*self._trained(), strict=True)
        averages = [self.averages[name] for name in names]
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)

    def _log(self, loss: float, seconds: float) -> None:
        record = {"step": self.step, "loss": round(loss, 5), "seconds_a_step": round(seconds, 3)}
        logger.info("%s %s", self.name, record)
        with (self.folder / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _are_finite(losses: list[Tensor]) -> bool:
    return not losses or bool(torch.isfinite(torch.stack(losses)).all())
