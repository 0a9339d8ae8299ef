"""The table of a folder's pictures, in Parquet: what was measured, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from krea2_model.replacing import replacing

from .measures import Measures

# In the file's metadata, so that no other table is taken for one, or overwritten.
_MARK, _VERSION = b"krea2 curate", b"1"

_TYPES = {"int": pa.int64(), "str": pa.string(), "bytes": pa.binary(), "float": pa.float64()}
_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        *((field.name, _TYPES[str(field.type)]) for field in fields(Measures)),
        ("kept", pa.bool_()),
        ("reasons", pa.list_(pa.string())),
        ("duplicate_of", pa.string()),
        ("buckets", pa.list_(pa.string())),
        ("crops", pa.list_(pa.list_(pa.int32()))),
    ],
    metadata={_MARK: _VERSION},
)


@dataclass(frozen=True)
class Row:
    """A picture of the table.

    file: relative to the folder, with forward slashes. kept: None where nothing is decided yet.
    duplicate_of: the file that is kept in its place. buckets: width x height at which training
    takes it, for each resolution that it is large enough for. crops: what it sees of the picture
    there, left, top, width, height in pixels.
    """

    file: str
    measures: Measures
    kept: bool | None = None
    reasons: tuple[str, ...] = ()
    duplicate_of: str | None = None
    buckets: tuple[str, ...] = ()
    crops: tuple[tuple[int, int, int, int], ...] = ()


def read_measures(path: Path) -> dict[str, Measures]:
    """Measures of a table's files; none where there is no table.

    Raises ValueError for a file that `write_table` has not written.
    """
    if not path.exists():
        return {}
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise _not_ours(path, f"it cannot be read: {error}") from error
    metadata = table.schema.metadata or {}
    names = ["file", *(field.name for field in fields(Measures))]
    is_ours = metadata.get(_MARK) == _VERSION and set(names) <= set(table.column_names)
    if not is_ours or any(table.schema.field(n).type != _SCHEMA.field(n).type for n in names):
        raise _not_ours(path, f"its columns are {', '.join(table.column_names[:5])}, ...")
    rows = table.select(names).to_pylist()
    return {row.pop("file"): Measures(**row) for row in rows}


def _not_ours(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path} is no table of krea2 curate ({found}). Name another file with --table, or remove "
        "this one."
    )


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Replace the table by these rows."""
    columns = [
        {
            "file": row.file,
            **asdict(row.measures),
            "kept": row.kept,
            "reasons": list(row.reasons),
            "duplicate_of": row.duplicate_of,
            "buckets": list(row.buckets),
            "crops": [list(crop) for crop in row.crops],
        }
        for row in rows
    ]
    with replacing(path) as partial:
        parquet.write_table(pa.Table.from_pylist(columns, schema=_SCHEMA), partial)
