"""Checks that several arguments share. Without torch, for the command line."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """True for a real number of Python's, NumPy's or a tensor of one; not for True or a text."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """True for an integer of Python's or NumPy's; not for True."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def counted(count: int, one: str, several: str = "") -> str:
    """A count and its word, `1 tile` or `2 tiles`. several: where it is not `one` with an s."""
    return f"{count} {by_count(count, one, several or one + 's')}"


def there_are(count: int, one: str, several: str = "") -> str:
    """`There is 1 tile`, or `There are 2 tiles`; see `counted`."""
    return f"There {by_count(count, 'is', 'are')} {counted(count, one, several)}"


def by_count(count: int, one: str, several: str) -> str:
    """The word that goes with a count."""
    return one if count == 1 else several


def numbers(name: str, values: Any, expected: str) -> list[float]:
    """A sequence of numbers as floats. Raises ValueError for anything else."""
    entries = None if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
    if entries is None or not all(map(is_number, entries)):
        raise ValueError(f"{name} is {values!r}; expected {expected}.")
    return [float(value) for value in entries]


def check_type(name: str, value: object, kind: type, expected: str) -> None:
    """Raise ValueError where a value is of another type."""
    if not isinstance(value, kind):
        shown = repr(value)
        shown = shown if len(shown) < 60 else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {shown}; expected {expected}.")


def check_finite(values: Any, name: str) -> None:
    """Raise ValueError where a tensor, of an image or of latents, has NaN or infinity."""
    if not values.isfinite().all():
        raise ValueError(
            f"{name} has NaN or infinite values; expected numbers. What made it failed, often a "
            "model or a VAE in fp16: run that in bf16 or fp32."
        )


def as_path(path: str | PathLike[str], name: str = "The path") -> Path:
    """A path. Raises ValueError for what is none."""
    if not isinstance(path, (str, PathLike)):
        raise ValueError(f"{name} is {path!r}; expected the path of a file or a folder.")
    return Path(path)
