"""The loop of `krea2_training` for krea2-nano's stages: a folder each, by steps or by time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from krea2_training.engine.loop import Run, TrainingStopped
from krea2_training.engine.rates import Rates
from krea2_training.engine.world import StopTraining

logger = logging.getLogger(__name__)

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
SAVE_EVERY_SECONDS = 120
_RETURNS = 3
_SECONDS, _BUFFERS = "seconds", "buffers"


def autocast() -> torch.autocast:
    """bfloat16 where it is safe; weights, losses and optimisers stay in float32."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


@dataclass
class Timer:
    """Seconds of a run. The clock starts with the first look; a resumed run counts on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    earlier: float = 0.0
    started: float | None = None

    @property
    def used(self) -> float:
        if self.started is None:
            self.started = self.clock()
        return self.earlier + self.clock() - self.started

    @property
    def share(self) -> float:
        return self.used / max(self.seconds, 1e-9)

    def resume(self, used: float) -> None:
        """Continue a run that had used so many seconds."""
        self.earlier, self.started = used, None


@dataclass(frozen=True)
class TimedRates(Rates):
    """Rates of a run that ends when its seconds are used, or its steps: what comes first."""

    timer: Timer = field(default_factory=lambda: Timer(1.0))

    def left(self, step: int) -> float:
        return max(0.0, min(super().left(step), 1 - self.timer.share))


class Stage(Run):
    """A run of one model's parameters in `folder / name`, which resumes where its state ends.

    decay: of the averages, which are what is shipped. on_saved: called after each save.
    The state is saved every so many seconds, with the model's buffers. A loss that is not finite
    returns to the saved state, a few times; later batches differ.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        model: nn.Module,
        optimisers: list[torch.optim.Optimizer],
        rates: Rates,
        decay: float = 0.995,
        seconds_between_saves: float = SAVE_EVERY_SECONDS,
        on_saved: Callable[[], None] = lambda: None,
    ):
        model.to(DEVICE)
        super().__init__(
            folder / name,
            {n: p for n, p in model.named_parameters() if p.requires_grad},
            optimisers,
            rates,
            average=decay,
            save_every=rates.steps,
            on_step=self._after,
            on_save=lambda step: self.on_saved(),
        )
        self.name, self.model, self.on_saved = name, model, on_saved
        self.seconds_between_saves, self.returns_left = seconds_between_saves, _RETURNS
        self.notes[_SECONDS] = 0.0
        if self.resume():
            logger.info("%s: goes on at step %d of %d", name, self.step, rates.steps)

    def train(self, loss_of: Callable[[int], Tensor]) -> None:  # type: ignore[override]
        """Run the steps that are left; `loss_of(step)` draws a batch and returns its loss."""
        self._saved = time.monotonic()
        while True:
            try:
                return super().train(loss_of)
            except StopTraining:
                return None
            except TrainingStopped:
                if not self.returns_left or not self.state_file.is_file():
                    raise
                step, seconds = self.step, self.notes[_SECONDS]
                self.returns_left -= 1
                self.resume()
                self.step = step + 1
                self._count_on(seconds)
                logger.warning("%s: the loss is not finite; back to the last state", self.name)

    def resume(self) -> bool:
        if not super().resume():
            return False
        for name, values in self.notes[_BUFFERS].items():
            buffer = self.model.get_buffer(name)
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
        self._count_on(self.notes[_SECONDS])
        return True

    def save(self) -> None:
        # As JSON: there are few of them, the statistics of a VAE's norm.
        named = self.model.named_buffers()
        self.notes[_BUFFERS] = {name: buffer.tolist() for name, buffer in named}
        super().save()
        self._saved = time.monotonic()

    def averaged_state(self) -> dict[str, Tensor]:
        """The model's state with the averages of what was trained."""
        return {**self.model.state_dict(), **self.values()}

    def _count_on(self, seconds: float) -> None:
        if isinstance(self.rates, TimedRates):
            self.rates.timer.resume(seconds)

    def _after(self, step: int, record: dict[str, Any]) -> None:
        if isinstance(self.rates, TimedRates):
            self.notes[_SECONDS] = self.rates.timer.used
        if step < self.rates.steps and self.rates.left(step) <= 0:
            raise StopTraining
        if time.monotonic() - self._saved > self.seconds_between_saves:
            self.save()
