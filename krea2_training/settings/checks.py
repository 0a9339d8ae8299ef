"""Checks of settings, whose errors name the setting, its value and what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from krea2_model.images.sizes import MULTIPLE


def expected_one_of(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1, 0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"expected one of {', '.join(known)}.{hint}"


def check(is_right: bool, name: str, value: Any, expected: str) -> None:
    if not is_right:
        given = "not set" if value is None else f"{value}"
        raise ValueError(f"{name} is {given}; expected {expected}.")


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {expected_one_of(value, choices)}")


def check_side(name: str, side: int) -> None:
    """Raise ValueError for a side, in pixels, that pictures are not trained at."""
    check(_is_side(side), name, side, f"a multiple of {MULTIPLE} from 64 to 4096")


def check_sides(name: str, sides: tuple[int, ...]) -> None:
    ok = len(sides) > 0 and all(map(_is_side, sides))
    check(ok, name, list(sides), f"multiples of {MULTIPLE} from 64 to 4096")


def _is_side(side: int) -> bool:
    return 64 <= side <= 4096 and side % MULTIPLE == 0
