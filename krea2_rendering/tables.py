"""Rows of tables: JSONL, CSV, text or Parquet, a file or a folder, here or at an address."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from krea2_model.cli.errors import UsageError
from krea2_model.cli.table import READERS, check_columns

from .places import Place

_PARQUET = ".parquet"
ENDINGS = (*READERS, _PARQUET)
_AT_ONCE = 4096


def read_table(
    address: str | Path, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any] | UsageError]]:
    """Rows by their numbers from 1, over all files of a folder: values, or what is wrong with one.

    columns: the columns that there may be; None is any. Raises UsageError for a table that cannot
    be read, has no prompts or other columns. Rows are read as they are asked for.
    """
    place = Place(address)
    number = 0
    for name in _files(place):
        for _, values in _rows(place, name, columns):
            number += 1
            yield number, values


def _files(place: Place) -> list[str]:
    """Names of the files of a table below its place, "" for itself."""
    if not place.exists():
        raise UsageError(f"There is no table {place}. Check the name and the folder.")
    if not place.is_folder():
        _reader(str(place))
        return [""]
    names = sorted(name for name in place.names() if _ending(name) in ENDINGS)
    if not names:
        raise UsageError(f"The folder {place} has no table; expected {', '.join(ENDINGS)} files.")
    return names


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _reader(name: str):
    ending = _ending(name)
    if ending not in ENDINGS:
        raise UsageError(f"{name} ends in {ending or 'nothing'}; expected {', '.join(ENDINGS)}.")
    return READERS.get(ending)


def _rows(place: Place, name: str, columns: Sequence[str] | None) -> Iterator[tuple[int, Any]]:
    shown = f"{place}/{name}" if name else str(place)
    reader = _reader(shown)
    try:
        with place.open(name) as file:
            if reader is None:
                yield from _from_parquet(file, shown, columns)
            else:
                lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
                yield from reader(lines, shown, columns)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UsageError(f"{shown} cannot be read: {reason}.") from error


def _from_parquet(
    file: Any, shown: str, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    table = pq.ParquetFile(file)
    check_columns(table.schema_arrow.names, shown, columns)
    number = 0
    for batch in table.iter_batches(batch_size=_AT_ONCE):
        for row in batch.to_pylist():
            number += 1
            yield number, {name: value for name, value in row.items() if value is not None}
