"""Shared parts of all grids: ranges of numbers, parts of a prompt, labels, the order of cells."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from ..images.grid_sheet import Place

_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)-(-?\d+(?:\.\d+)?)(?::(\d+(?:\.\d+)?))?")
_MAX_VALUES = 100_000


def number_range(text: str) -> list[str] | None:
    """The numbers of a range such as 1-4 or 4-12:4, both ends included, as they would be typed.

    None for what is no range. Raises ValueError for one that does not rise, or never ends.
    """
    found = _RANGE.fullmatch(text)
    if found is None:
        return None
    first, last, each = (Decimal(part or 1) for part in found.groups())
    if first > last or each == 0 or (last - first) / each >= _MAX_VALUES:
        raise ValueError(
            f"expected a range that rises, such as 1-4, or 4-12:4 in steps of 4, of at most "
            f"{_MAX_VALUES} values"
        )
    count = int((last - first) / each) + 1
    return [f"{first + each * number:f}" for number in range(count)]


def replace_parts(prompt: str, parts: Mapping[str, str]) -> str:
    """A prompt with others in place of its parts.

    In one go, so that what comes in is not replaced again; longer parts first.
    """
    if not parts:
        return prompt
    olds = sorted(parts, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, olds)))
    return pattern.sub(lambda found: parts[found[0]], prompt)


def paint_order(counts: Sequence[int], slow: Collection[int]) -> list[Place]:
    """Places of all cells in the order in which they are painted.

    counts: columns, rows and blocks. slow: axes, 0 to 2, that change least often, the slowest
    first. Of the others the first goes fastest.
    """
    places: list[Place] = list(itertools.product(*map(range, counts)))  # type: ignore
    return sorted(places, key=lambda at: ([at[axis] for axis in slow], at[::-1]))


def file_label(name: str) -> str:
    """A file's name without folder and ending."""
    return Path(name).name.removesuffix(".safetensors").removesuffix(".gguf")
