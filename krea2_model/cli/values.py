"""Values of options: numbers within limits, lists, and a LoRA with its scale."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from ..features.style_library import MAX_WEIGHT


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""
    allowed = f"{low} or more" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise ArgumentTypeError(f"is {text}; expected a whole number {allowed}")
        return value

    return read


def number(
    low: float, high: float = math.inf, above: bool = False, unit: str = ""
) -> Callable[[str], float]:
    """A number from `low` to `high`; above: `low` itself is too small."""
    least = f"above {low:g}" if above else f"{low:g}"
    allowed = f"{least} to {high:g}" if high < math.inf else least if above else f"{least} or more"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            raise ArgumentTypeError(f"is {text}; expected a number{unit}, {allowed}")
        return value

    return read


def numbers(count: int) -> Callable[[str], list[float]]:
    """So many numbers with commas between them."""

    def read(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if len(values) != count or not all(map(math.isfinite, values)):
            raise ArgumentTypeError(f"is {text}; expected {count} numbers with commas between them")
        return values

    return read


def place(text: str) -> Path | str:
    """A path, or an address such as s3://bucket/folder as it is."""
    return text if "://" in text else Path(text)


def seeds(text: str) -> list[int]:
    """Seeds: `7`, `1,2,3` or `1-4`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentTypeError(f"is {text}; expected seeds such as 7, 1,2,3 or 1-4")
        low, high = int(first), int(last) if dash else int(first)
        if not low <= high < 2**64 or high - low >= 100_000:
            raise ArgumentTypeError(f"is {text}; expected seeds from 0 to {2**64 - 1}, rising")
        found += range(low, high + 1)
    return found


def lora(text: str) -> tuple[str, float]:
    """`style.safetensors:0.8`; what follows the last colon counts where it is a number."""
    name, colon, scale = text.rpartition(":")
    try:
        value = (name, float(scale)) if colon else (text, 1.0)
    except ValueError:
        value = (text, 1.0)
    if not math.isfinite(value[1]):
        raise ArgumentTypeError(f"is {text}; expected a scale that is a number, such as 0.8")
    return value


def style(text: str) -> tuple[str, float]:
    """`Ink wash:0.7`: a style and its weight, 1 where there is none."""
    name, weight = lora(text)
    if not name.strip() or not 0 <= weight <= MAX_WEIGHT:
        raise ArgumentTypeError(
            f"is {text}; expected a style and a weight from 0 to {MAX_WEIGHT:g}, such as "
            "Woodcut:0.7"
        )
    return name.strip(), weight


def variation(text: str) -> tuple[int, float]:
    """`7:0.3`: a seed, and a strength from 0 to 1."""
    seed, colon, strength = text.partition(":")
    try:
        value = int(seed), float(strength)
    except ValueError:
        value = -1, math.nan
    if not (0 <= value[0] < 2**64 and 0 <= value[1] <= 1):
        raise ArgumentTypeError(
            f"is {text}; expected a seed and a strength from 0 to 1, such as 7:0.3"
        )
    return value


def _exact(value: float) -> str:
    """A number as short as it can be, with every digit that counts."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def text_of(value: object) -> str:
    """A value as it is typed: the other way round."""
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], (str, int)):
            return f"{value[0]}:{_exact(value[1])}"
        return ",".join(map(_exact, value))
    return _exact(value) if isinstance(value, float) else str(value)
