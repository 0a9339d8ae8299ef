"""What is seen of a run while it goes on: TensorBoard, and the loss as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .loop import LOG

CURVE = "loss.png"
_WINDOW = 20  # steps of a mean
_NOT_DRAWN = ("step", "seconds")
# Of a log's numbers, those that every run has.
_COMMON = ("loss", "gradient", "rate", *_NOT_DRAWN)


def tensorboard(folder: Path) -> Callable[[int, dict[str, Any]], None]:
    """A function that writes each step for TensorBoard; without that installed, to nowhere."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda step, record: None
    writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def write(step: int, record: dict[str, Any]) -> None:
        for name, number in record.items():
            if name not in _NOT_DRAWN:
                writer.add_scalar(name, number, step)

    return write


def draw_curve(folder: Path) -> Path | None:
    """Draw a run's loss, and the other numbers of its log, with means; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read_log(folder)
    if not records:
        return None
    others = {name: None for record in records for name in record if name not in _COMMON}
    names = ["loss", *others]
    figure = Figure((8, 1 + 3.5 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        own = [(record["step"], record[name]) for record in records if name in record]
        steps, numbers = zip(*own, strict=True)
        axes.plot(steps, numbers, color="0.8", label="each step")
        axes.plot(steps, _means(numbers), color="C0", label=f"mean of {_WINDOW} steps")
        is_log = name == "loss" and min(numbers) > 0
        axes.set(xlabel="step", ylabel=name, yscale="log" if is_log else "linear")
        axes.legend()
    figure.savefig(folder / CURVE, dpi=120)
    return folder / CURVE


def _means(numbers: Sequence[float]) -> list[float]:
    parts = (numbers[max(0, end - _WINDOW) : end] for end in range(1, len(numbers) + 1))
    return [sum(part) / len(part) for part in parts]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    path = folder / LOG
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
