"""What is seen of a run while it goes on: TensorBoard, and the loss as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .curve import draw_curves
from .loop import LOG

CURVE = "loss.png"
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
    """Draw a run's loss, and the other numbers of its log, with means; None for an empty log."""
    records = read_log(folder)
    if not records:
        return None
    draw_curves(curves_of(records)).save(folder / CURVE)
    return folder / CURVE


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """A log's loss, and the numbers that not every run has, by name: pairs with their steps."""
    others = {name: None for record in records for name in record if name not in _COMMON}
    return {
        name: [(record["step"], record[name]) for record in records if name in record]
        for name in ("loss", *others)
    }


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    path = folder / LOG
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
