"""Rows of tables, and the files and bytes that their cells name."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TABLES = frozenset((".jsonl", ".csv", ".parquet"))


def read_text(path: Path) -> str:
    """A text file's content. Raises ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def read_rows(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a table of `TABLES`, by the names of its columns."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(
                f"{path.name} is a Parquet file, which needs pyarrow: pip install pyarrow."
            ) from error
        try:
            file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as Parquet ({error}).") from error
        for batch in file.iter_batches(256):
            yield from batch.to_pylist()
        return
    text = read_text(path)
    if kind == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=1):
            if None in row:  # DictReader's name of fields beyond the header's
                raise ValueError(
                    f"{path.name}, row {number} has more fields than the header. A text with "
                    'commas needs quotation marks: "a star, blue".'
                )
            yield row
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, line {number}: expected an object.")
            yield row


def source_of(value: Any, where: str, table: Path) -> Path | bytes:
    """A path, relative to the table's folder, or the bytes that Parquet tables hold."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where}: {str(value)[:60]!r} is no picture; expected a path or bytes.")
    path = table.parent / value
    if not path.is_file():
        raise ValueError(f"{where}: {path} is not there.")
    return path
