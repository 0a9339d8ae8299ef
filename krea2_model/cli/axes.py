"""Axes of a grid: options and the values that they take, as `seed=1-4`, `prompt~fox=hare|owl`."""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pipeline.grid_axes import file_label, number_range, replace_parts
from .errors import UsageError, suggestion
from .picture_options import PICTURE, REPEATED
from .table import options_of_row
from .values import text_of

# An axis of its own: the strength of all LoRAs of a cell.
LORA_STRENGTH = "lora_strength"
NAMES = (*(name for name in PICTURE if name != "dtype"), LORA_STRENGTH)
# metavars of options that are numbers, which take ranges.
_NUMBERS = ("N", "PX", "X")
_MARK = re.compile(r"[{|}]")


@dataclass(frozen=True)
class Axis:
    """An option and its values.

    letter: x, y or z. name: of the option, as `PICTURE` has it, or `LORA_STRENGTH`. part: what of
    the prompt is replaced, None for an option. labels: what a sheet says at each value.
    """

    letter: str
    name: str
    part: str | None
    values: tuple[Any, ...]
    labels: tuple[str, ...]

    @property
    def title(self) -> str:
        return _option(self.name) if self.part is None else self.part


@dataclass(frozen=True)
class Cell:
    """The place of a cell by the index of its value on each axis, and its options."""

    place: tuple[int, ...]
    args: Namespace
    labels: tuple[str, ...]


def read_axes(
    texts: Mapping[str, str | None], base: Namespace, named: Sequence[str], most: int
) -> list[Axis]:
    """Axes of a command line, checked against the options that it names for all cells.

    texts: by letter, None for an axis that is not there. most: cells.
    Raises UsageError that names the axis, and the value where one is wrong.
    """
    axes = [_read_axis(letter, text) for letter, text in texts.items() if text is not None]
    if not axes:
        raise UsageError("There is no axis; expected one to three, such as --x seed=1,2,3.")
    for number, axis in enumerate(axes):
        for other in axes[:number]:
            if (axis.name, axis.part) == (other.name, other.part):
                raise UsageError(
                    f"--{other.letter} and --{axis.letter} are both {axis.title}; expected each "
                    "axis once. Put the values of both on one."
                )
        if axis.part is None and axis.name in named:
            given = "PROMPT" if axis.name == "prompt" else f"--{_option(axis.name)}"
            raise UsageError(
                f"--{axis.letter} is {axis.title}, which {given} gives too; leave {given} out, or "
                f"put its value on the axis."
            )
    cells = 1
    for axis in axes:
        cells *= len(axis.values)
    if cells > most:
        sizes = " x ".join(f"{len(axis.values)} of {axis.title}" for axis in axes)
        raise UsageError(
            f"The grid has {cells} cells, {sizes}; expected at most {most}. Take fewer values, or "
            f"allow it with --max-cells {cells}."
        )
    for axis in axes:
        _check_values(axis, base, axes)
    return axes


def cells_of(axes: Sequence[Axis], base: Namespace) -> Iterator[Cell]:
    """All cells: x goes fastest, then y, then z."""
    places: list[tuple[int, ...]] = [()]
    for axis in axes[::-1]:
        places = [(index, *place) for place in places for index in range(len(axis.values))]
    for place in places:
        chosen = list(zip(axes, place, strict=True))
        labels = tuple(axis.labels[index] for axis, index in chosen)
        yield Cell(place, _options([(axis, axis.values[i]) for axis, i in chosen], base), labels)


def _read_axis(letter: str, text: str) -> Axis:
    name, equals, listed = text.partition("=")
    name, tilde, part = name.strip().partition("~")
    name = name.strip().lstrip("-").replace("-", "_")
    if not equals:
        raise UsageError(
            f"--{letter} is {text}; expected an option and its values, such as seed=1,2,3 or "
            "prompt~fox=hare|owl."
        )
    if name not in NAMES:
        hint = suggestion(name, NAMES)
        raise UsageError(
            f"--{letter} is {text}: there is no option {name} of a picture that takes values.{hint}"
        )
    if tilde and (name != "prompt" or not part):
        raise UsageError(
            f"--{letter} is {text}; expected a part of the prompt after prompt~, such as "
            "prompt~fox=hare|owl."
        )
    values = _values(letter, text, name, listed)
    labels = [_label(name, part, value) for value in values]
    if len(set(labels)) < len(labels):  # files of one name in several folders
        labels = [f"{_option(name)}: {_text(value)}" for value in values]
    return Axis(letter, name, part if tilde else None, tuple(values), tuple(labels))


def between_bars(text: str) -> list[str]:
    """What bars part; those of {red|blue}, which is a wildcard, part nothing."""
    parts, last, is_inside = [], len(text), False
    for mark in reversed(list(_MARK.finditer(text))):
        if mark[0] != "|":
            is_inside = mark[0] == "}"
        elif not is_inside:
            parts.append(text[mark.end() : last])
            last = mark.start()
    return [text[:last], *reversed(parts)]


def _values(letter: str, text: str, name: str, listed: str) -> list[Any]:
    """Values as columns of a table hold them; lists of files for options that repeat."""
    bars = between_bars(listed)
    parts = bars if len(bars) > 1 else listed.split(",")
    parts = [part.strip() for part in parts]
    is_text = name in ("prompt", "negative")
    if not listed.strip() or (not all(parts) and not (is_text and len(bars) > 1)):
        raise UsageError(
            f"--{letter} is {text}, in which a value is missing; expected values with commas "
            f"between them, or with | where they hold commas, such as {_option(name)}=A,B."
        )
    values: list[Any] = []
    for part in parts:
        numbers = _range(letter, text, part) if _is_number(name) else None
        if numbers is not None:
            values += [[number] for number in numbers] if name in REPEATED else numbers
        elif name in REPEATED:
            values.append([] if part == "none" else [p.strip() for p in part.split(";")])
        else:
            values.append(part)
    said, count = Counter(map(_text, values)).most_common(1)[0]
    if count > 1:
        raise UsageError(f"--{letter} is {text}, which has {said!r} twice; expected it once.")
    return values


def _is_number(name: str) -> bool:
    from .parser import command_parser

    actions = command_parser("generate")._actions
    return name == LORA_STRENGTH or any(
        action.dest == name and action.metavar in _NUMBERS for action in actions
    )


def _range(letter: str, text: str, part: str) -> list[str] | None:
    try:
        return number_range(part)
    except ValueError as error:
        raise UsageError(f"--{letter} is {text}; {error}.") from error


def _check_values(axis: Axis, base: Namespace, axes: Sequence[Axis]) -> None:
    """Refuse values that their option refuses, and parts that no prompt has."""
    if axis.part is not None:
        prompts = next((a.values for a in axes if a.name == "prompt" and a.part is None), None)
        for prompt in (base.prompt,) if prompts is None else prompts:
            if axis.part not in prompt:
                raise UsageError(
                    f"--{axis.letter} replaces {axis.part!r}, which is not in the prompt "
                    f"{prompt!r}; expected a part of it, in the same letters."
                )
        return
    if axis.name == LORA_STRENGTH and not (base.lora or any(a.name == "lora" for a in axes)):
        raise UsageError(
            f"--{axis.letter} is {_option(LORA_STRENGTH)} without a LoRA; give --lora or an axis "
            "lora."
        )
    for value in axis.values:
        try:
            _options([(axis, value)], base)
        except UsageError as error:
            raise UsageError(f"--{axis.letter} {axis.title}={_text(value)}: {error}") from error


def _options(chosen: Sequence[tuple[Axis, Any]], base: Namespace) -> Namespace:
    """The options of a cell."""
    row, parts, strength = {}, {}, None
    for axis, value in chosen:
        if axis.part is not None:
            parts[axis.part] = value
        elif axis.name == LORA_STRENGTH:
            strength = value
        else:
            row[axis.name] = value
    result = options_of_row(row, base, NAMES)
    if strength is not None:
        # Read as the strength of a file is, so that the same is refused.
        of_any = options_of_row({"lora": [f"any:{strength}"]}, base).lora
        if of_any[0][0] != "any":
            raise UsageError(f"the strength is {strength}; expected a number, such as 0.8.")
        result.lora = [(file, of_any[0][1]) for file, _ in result.lora]
    result.prompt = replace_parts(result.prompt, parts)
    return result


def _label(name: str, part: str, value: Any) -> str:
    if name in REPEATED:
        value = [_file_label(name, text) for text in value]
    elif name in ("model", "transformer", "text_encoder", "vae"):
        value = _file_label(name, value)
    return f"{part or _option(name)}: {_text(value)}"


def _file_label(name: str, text: str) -> str:
    """A file's name without folder and ending, with its strength."""
    file, colon, scale = text.rpartition(":")
    if name != "lora" or not colon or not re.fullmatch(r"-?[\d.]+", scale):
        file, scale = text, ""
    return f"{file_label(file)}:{scale}" if scale else file_label(file)


def _text(value: Any) -> str:
    return ("; ".join(value) or "none") if isinstance(value, list) else text_of(value)


def _option(name: str) -> str:
    return name.replace("_", "-")
