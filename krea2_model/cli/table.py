"""Rows of a text, CSV or JSONL file as options of generate."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UsageError, suggestion
from .picture_options import PICTURE, REPEATED, WEIGHTS
from .settings import options_of

# Columns beside options of a picture. Weights are loaded once, so no row has its own.
_OTHERS = ("output", "images", "seeds")
COLUMNS = tuple(n for n in PICTURE if n not in (*WEIGHTS, "dtype")) + _OTHERS
_SWITCHED = ("nag", "weights", "mask_hard", "upscale_see_tiles")
_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass
class Row:
    """A row by its number in the file, from 1: its options, or the error that it has."""

    number: int
    args: Namespace | None = None
    error: str | None = None


def read_rows(path: Path, base: Namespace) -> list[Row]:
    """Rows of a file, over the options that the command line gives for all.

    Raises UsageError for a file that cannot be read, and for columns that are no options.
    """
    if path.suffix.lower() not in READERS:
        raise UsageError(
            f"{path} ends in {path.suffix or 'nothing'}; expected .txt, .csv or .jsonl. Parquet, "
            "folders and addresses are read with --engine ray."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            values = list(READERS[path.suffix.lower()](lines, str(path), COLUMNS))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"{path} cannot be read: {reason}.") from error
    rows = [_row(number, value, base) for number, value in values]
    if not rows:
        raise UsageError(f"{path} has no rows; expected at least one prompt.")
    return rows


def _from_text(
    lines: Iterable[str], name: str, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line.strip()}


def _from_csv(
    lines: Iterable[str], name: str, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    rows = csv.DictReader(lines)
    check_columns(rows.fieldnames or (), name, columns)
    for number, row in enumerate(rows, 2):
        if None in row:
            yield number, UsageError("It has more cells than there are columns.")
        elif any(row.values()):
            yield number, {name: value for name, value in row.items() if value}


def _from_jsonl(
    lines: Iterable[str], name: str, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, UsageError(f"It is no JSON ({error}).")
            continue
        if isinstance(row, dict):
            yield number, {name: value for name, value in row.items() if value is not None}
        else:
            yield number, UsageError(f"It is {type(row).__name__}; expected an object.")


# By the ending of a file. Each gives rows by their numbers, as dicts or as the UsageError that they
# are, of lines of text, a name for messages, and the columns that there may be (None: any).
READERS = {".txt": _from_text, ".csv": _from_csv, ".jsonl": _from_jsonl}


def check_columns(names: Iterable[str], place: str, columns: Sequence[str] | None) -> None:
    """Refuse columns of a table that are none of `columns`, and a table without prompts.

    columns: None is any.
    """
    if columns is None:
        return
    names = list(names)
    for name in names:
        if (known := name.strip().replace("-", "_")) not in columns:
            raise UsageError(f"{place} has the column {name!r}: {_unknown(known)}")
    if not {name.strip() for name in names} & {"prompt", "regions"}:
        raise UsageError(
            f"{place} has no column prompt; it has {', '.join(names) or 'none'}. Name the column "
            "of the prompts so."
        )


def _unknown(name: str) -> str:
    if name in (*WEIGHTS, "dtype"):
        return f"weights are loaded once; give --{name.replace('_', '-')} on the command line."
    hint = suggestion(name, COLUMNS)
    return f"expected an option of a picture, such as prompt, seed or steps.{hint}"


def _row(number: int, value: Any, base: Namespace) -> Row:
    if isinstance(value, UsageError):
        return Row(number, error=str(value))
    try:
        return Row(number, options_of_row(value, base))
    except UsageError as error:
        return Row(number, error=str(error))


def options_of_row(
    values: Mapping[str, Any], base: Namespace, columns: Sequence[str] = COLUMNS
) -> Namespace:
    """Options of a row over those of all rows, read as on the command line.

    columns: those that there may be.
    Raises UsageError for what is no option of a picture, or no value of it.
    """
    row = {str(name).strip().replace("-", "_"): value for name, value in values.items()}
    for name in row:
        if name not in columns:
            raise UsageError(f"{name}: {_unknown(name)}")
    prompt = row.pop("prompt", getattr(base, "prompt", ""))
    words = options_of({name: _value(name, value) for name, value in row.items()})
    read = _parser().parse_args([*words, "--", "rows"])
    result = copy(base)
    for name in row:
        # The folder is the command line's; a row names a file in it.
        setattr(result, "row_output" if name == "output" else name, getattr(read, name))
    if "weights" in row:
        result.weights = _switch("weights", row["weights"])
    result.prompt = str(prompt)
    return result


@cache
def _parser():
    from .parser import command_parser

    return command_parser("render")


def _value(name: str, value: Any) -> Any:
    if name in _SWITCHED:
        return _switch(name, value)
    if name in REPEATED and isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    if isinstance(value, (dict, bool)):
        raise UsageError(f"{name} is {value!r}; expected a number or a text.")
    if isinstance(value, list) and name not in (*REPEATED, "layer_weights"):
        return ",".join(map(str, value))
    return value


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    try:
        return _SWITCHES[str(value).strip().lower()]
    except KeyError:
        raise UsageError(f"{name} is {value!r}; expected true or false.") from None
