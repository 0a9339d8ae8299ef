"""What is seen of a run while it goes on: TensorBoard, and the loss as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .loop import LOG

CURVE = "loss.png"


def tensorboard(folder: Path) -> Callable[[int, dict[str, Any]], None]:
    """A function that writes each step for TensorBoard; without that installed, to nowhere."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda step, record: None
    writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def write(step: int, record: dict[str, Any]) -> None:
        for name in ("loss", "gradient", "rate"):
            writer.add_scalar(name, record[name], step)

    return write


def draw_curve(folder: Path) -> Path | None:
    """Draw the loss of a run's log, and its mean over 20 steps; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    losses = [record["loss"] for record in read_log(folder)]
    if not losses:
        return None
    means = [
        sum(part := losses[max(0, end - 20) : end]) / len(part) for end in range(1, len(losses) + 1)
    ]
    figure = Figure((8, 4.5))
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", label="each step")
    axes.plot(steps, means, color="C0", label="mean of 20 steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(folder / CURVE, dpi=120)
    return folder / CURVE


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    path = folder / LOG
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
