"""The training loop: steps, averages, a log, states to resume from.

A step's loss is a function of the step alone (its pictures and noise are drawn from the seed and
the step), so a run that is stopped and resumed goes on as if it never had been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .rates import Rates
from .sharded_states import (
    forget_sharded,
    load_sharded,
    newest_state,
    read_sharded_header,
    save_sharded,
)
from .sharding import clip_gradients, local_part
from .states import load_state, read_state_header, save_state
from .world import ALONE, World, is_sharded

STATE = "state.safetensors"
LOG = "log.jsonl"
NOTES, _LOSS = "notes", "loss"


@dataclass(frozen=True)
class Measured:
    """A loss, and other numbers of a batch for the log."""

    loss: Tensor
    numbers: Mapping[str, float]


# The loss of a batch (its number counts over steps and accumulation), ready for backward.
Loss = Callable[[int], Tensor | Measured]


class TrainingStopped(RuntimeError):
    """A run that cannot go on: its loss is not finite. The last state is good."""


def check_state(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raise ValueError where a folder's state is of another run than one with these settings."""
    found = _newest(folder)
    if found is None:
        return
    _, extra = found
    differing = [text for n, v in fingerprint.items() for text in _differences(n, extra.get(n), v)]
    if differing:
        raise ValueError(
            f"{folder} has a run with other settings: {', '.join(differing)}. Choose another "
            "output.folder, or remove that one."
        )


def _differences(name: str, there: Any, now: Any) -> list[str]:
    """Settings that differ between a state and a run, with both values; of files, that they do."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        names = [entry for entry in {**there, **now} if there.get(entry) != now.get(entry)]
        return [f"{name}.{n} ({there.get(n)!r} there, {now.get(n)!r} now)" for n in names]
    if there == now:
        return []
    return [f"{name} ({'none there' if not there else 'another' if now else 'none now'})"]


def begun(folder: Path) -> dict[str, Any] | None:
    """What a folder's state says of its run; None where there is no state."""
    found = _newest(folder)
    return None if found is None else found[1]


def _newest(folder: Path) -> tuple[Path | None, dict[str, Any]] | None:
    """A folder's newest state, or None: where it is sharded, and what it says of its run.

    The place is None for that of a single process, in the folder's file.
    """
    sharded, is_file = newest_state(folder), (folder / STATE).is_file()
    if sharded is None and not is_file:
        return None
    step, extra = read_state_header(folder / STATE) if is_file else (-1, {})
    if sharded is not None:
        other, own = read_sharded_header(sharded)
        if other >= step:
            return sharded, own
    return None, extra


def forget(folder: Path) -> None:
    """Remove the state and the log of a folder's run, so that the next one begins anew."""
    for name in (STATE, LOG):
        (folder / name).unlink(missing_ok=True)
    forget_sharded(folder)


def update(
    parameters: Iterable[nn.Parameter],
    optimisers: Iterable[torch.optim.Optimizer],
    clip: float,
    loss: float,
    what: str = "The loss",
    where: str = "",
    world: World = ALONE,
) -> float:
    """Clip the gradients, step, and drop them; returns their norm.

    clip: the largest norm; 0 is no limit. world: of which the gradients are made the mean. Raises
    TrainingStopped, before any step, where the loss or the norm is not finite; what, where: for
    its message.
    """
    parameters = list(parameters)
    world.synchronise(parameters)
    norm = clip_gradients(parameters, clip)
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    for optimiser in optimisers:
        if is_finite:
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    if not is_finite:
        raise TrainingStopped(
            f"{what} is {loss:g} and the gradient {norm:g}{where}. Lower training.learning_rate, "
            "and start the command again to go on from the last good state."
        )
    return norm


@dataclass
class Run:
    """A run in a folder, which resumes where its last state ends.

    parameters: what is trained, by name. average: decay of a moving average of them, or 0.
    on_step(step, record): after every step, with what the log says of it. after_step(step): after
    that, in all processes at once, which may compute together.
    on_save(step): after a state has been saved, to write what can be used.
    prepare(step): before each step, from 0. If it raises, the state so far is saved.
    measure(step): after each step, for more numbers of the log.
    fingerprint: settings that a resumed run has to share. notes: JSON values of the command that
    are saved with the state, and put back when it is resumed. world: the processes that share the
    batches of each step; the first writes files.
    """

    folder: Path
    parameters: Mapping[str, nn.Parameter]
    optimisers: list[torch.optim.Optimizer]
    rates: Rates
    accumulate: int = 1
    clip: float = 1.0
    average: float = 0.0
    save_every: int = 250
    on_step: Callable[[int, dict[str, Any]], None] = lambda step, record: None
    after_step: Callable[[int], None] = lambda step: None
    on_save: Callable[[int], None] = lambda step: None
    prepare: Callable[[int], None] = lambda step: None
    measure: Callable[[int], Mapping[str, float]] = lambda step: {}
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    world: World = ALONE
    step: int = 0
    averages: dict[str, Tensor] = field(default_factory=dict)
    _in_step: bool = field(default=False, init=False)

    def __post_init__(self):
        self._base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimisers]
        if self.average:
            self.averages = {n: p.detach().clone() for n, p in self.parameters.items()}

    @property
    def state_file(self) -> Path:
        return self.folder / STATE

    def resume(self) -> bool:
        """Go on from the folder's state, if there is one. Raises ValueError for another run's."""
        check_state(self.folder, self.fingerprint)
        found = _newest(self.folder)
        if found is None:
            return False
        sharded, extra = found
        own = self.parameters, self.averages, self.optimisers
        if sharded is None:
            self.step = load_state(self.state_file, *own)
        else:
            self.step = load_sharded(sharded, self.world, *own)
        self.notes.update(extra.get(NOTES, {}))
        with self.world.together():
            if self.world.is_first:
                self._cut_log()
        return True

    def train(self, loss_of: Loss) -> None:
        """Run the steps that are left.

        Raises TrainingStopped where the loss or a gradient is not finite. Whatever else ends a run
        between two steps (an interrupt in `on_step`, say) saves its state first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            while self.step < self.rates.steps:
                self._step(loss_of)
                if self.step % self.save_every == 0 and self.step < self.rates.steps:
                    self.save()
        except TrainingStopped:
            raise
        except BaseException:
            if not self._in_step:
                self.save()
            raise
        self.save()

    def _step(self, loss_of: Loss) -> None:
        started, total = time.monotonic(), 0.0
        with self.world.together():
            self.prepare(self.step)
        self._in_step = True
        others: dict[str, list[float]] = {}
        factor = self._set_rates()
        for part in self.world.own(self.accumulate):
            found = loss_of(self.step * self.accumulate + part)
            measured = found if isinstance(found, Measured) else Measured(found, {})
            # Gradients and losses become the mean over the shares.
            loss = measured.loss * (self.world.shares / self.accumulate)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
            for name, number in measured.numbers.items():
                others.setdefault(name, []).append(number)
        numbers = {name: sum(own) / len(own) for name, own in others.items()}
        numbers = self.world.mean({**numbers, _LOSS: total})
        total = numbers.pop(_LOSS)
        where = f" at step {self.step}, after the last good state ({self.state_file})"
        norm = update(
            self.parameters.values(), self.optimisers, self.clip, total, where=where,
            world=self.world,
        )  # fmt: skip
        self.step += 1
        self._average()
        numbers |= self.measure(self.step)
        self._in_step = False
        record = {
            "step": self.step,
            _LOSS: round(total, 6),
            "gradient": round(norm, 6),
            "rate": self._base_rates[0][0] * factor,
            **{name: round(number, 6) for name, number in numbers.items()},
            "seconds": round(time.monotonic() - started, 4),
        }
        with self.world.together():
            if self.world.is_first:
                with (self.folder / LOG).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            self.on_step(self.step, record)
        self.after_step(self.step)

    def _set_rates(self) -> float:
        """Set the learning rates of this step; returns their factor."""
        factor = self.rates.factor(self.step)
        for optimiser, rates in zip(self.optimisers, self._base_rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return factor

    def save(self) -> None:
        """Write the state, then what `on_save` writes."""
        extra = {**self.fingerprint, NOTES: self.notes}
        own = self.step, self.parameters, self.averages, self.optimisers, extra
        if any(map(is_sharded, self.parameters.values())):
            save_sharded(self.folder, self.world, *own)
        else:
            with self.world.together():
                if self.world.is_first:
                    save_state(self.state_file, *own)
        self.on_save(self.step)

    def values(self) -> dict[str, Tensor]:
        """The weights to ship: averages, or the weights themselves."""
        return dict(self.averages or {n: p.detach() for n, p in self.parameters.items()})

    def _cut_log(self) -> None:
        """Drop what the log has of steps after the state's: they are done again."""
        path = self.folder / LOG
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text("".join(f"{x}\n" for x in lines[: self.step]), encoding="utf-8")

    def _average(self) -> None:
        if self.averages:
            # Early on, a long memory would only remember the initial weights.
            decay = min(self.average, self.step / (self.step + 10))
            current = [local_part(self.parameters[name].detach()) for name in self.averages]
            averages = [local_part(average) for average in self.averages.values()]
            torch._foreach_lerp_(averages, current, 1 - decay)
