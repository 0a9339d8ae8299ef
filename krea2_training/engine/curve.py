"""Curves of a run's numbers as a picture, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

# Steps of a mean.
WINDOW = 20
_SIZE = (640, 360)  # pixels of a panel
_MARGINS = (76, 40, 24, 50)  # left, top, right, bottom
_BACK, _GRID, _EACH, _MEAN, _TEXT = "white", "#e4e4e4", "#c4cbd4", "#1f6fb4", "#404040"
_TEXT_SIZE = 18


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], steps: int = 0) -> Image.Image:
    """A panel for each curve: its numbers, and their mean over `WINDOW` of them.

    curves: by name, pairs of a step and a number. steps: of the whole run, where the axis ends.
    """
    width, height = _SIZE
    image = Image.new("RGB", (width, height * len(curves)), _BACK)
    draw = ImageDraw.Draw(image)
    for row, (name, points) in enumerate(curves.items()):
        _draw_panel(draw, row * height, name, points, steps)
    return image


def _draw_panel(
    draw: ImageDraw.ImageDraw, top: int, name: str, points: Sequence[tuple[int, float]], steps: int
) -> None:
    left, above, right, below = _MARGINS
    box = (left, top + above, _SIZE[0] - right, top + _SIZE[1] - below)
    font = ImageFont.load_default(_TEXT_SIZE)
    numbers = [number for _, number in points]
    means = moving_means(numbers)
    low, high = min(numbers), max(numbers)
    is_log = low > 0 and high > 3 * low
    scale = math.log if is_log else float
    bottom, span = scale(low), (scale(high) - scale(low)) or 1.0
    last = max(steps, points[-1][0], 2)

    def place(step: int, number: float) -> tuple[float, float]:
        across = box[0] + (step - 1) / (last - 1) * (box[2] - box[0])
        return across, box[3] - (scale(number) - bottom) / span * (box[3] - box[1])

    for part in range(5):
        number = bottom + span * part / 4
        number = math.exp(number) if is_log else number
        height = box[3] - part / 4 * (box[3] - box[1])
        draw.line((box[0], height, box[2], height), _GRID)
        draw.text((box[0] - 8, height), f"{number:.3g}", _TEXT, font, anchor="rm")
        step = round(1 + (last - 1) * part / 4)
        draw.text((place(step, low)[0], box[3] + 8), f"{step}", _TEXT, font, anchor="mt")
    draw.text((box[2], box[3] + 29), "step", _TEXT, font, anchor="rt")
    for values, colour, thick in ((numbers, _EACH, 1), (means, _MEAN, 3)):
        line = [place(step, value) for (step, _), value in zip(points, values, strict=True)]
        draw.line(line if len(line) > 1 else line * 2, colour, thick, joint="curve")
        across, height = line[-1]
        draw.ellipse((across - thick, height - thick, across + thick, height + thick), colour)
    latest = f"{name} {means[-1]:.4g} (mean of {min(WINDOW, len(means))}), step {points[-1][0]}"
    draw.text((box[0], box[1] - 10), latest, _TEXT, font, anchor="lb")


def moving_means(numbers: Sequence[float]) -> list[float]:
    """The mean of each number and of those before it, `WINDOW` at most."""
    parts = (numbers[max(0, end - WINDOW) : end] for end in range(1, len(numbers) + 1))
    return [sum(part) / len(part) for part in parts]
