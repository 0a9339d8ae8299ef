"""The ledger of a folder of pictures: a line of JSON for each picture that was made or failed.

On a disk it is `results.jsonl`, to which lines are added. An object store cannot add to a file:
there are parts beside it, `results-TIME-RUN-NUMBER.jsonl`, one a minute. Whoever runs the command
writes it, alone. `table.parquet` is made of it at the end of a run.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .places import Place

RESULTS, TABLE = "results.jsonl", "table.parquet"
_PART = re.compile(r"results(-[0-9TZ]+-[0-9a-f]+-\d+)?\.jsonl$")
_PART_ENTRIES, _PART_SECONDS = 1000, 60
_AT_ONCE = 4096
Entry = dict[str, Any]

COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.uint64()),
        ("settings", pa.string()),
        ("file", pa.string()),
        ("member", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seconds", pa.float64()),
        ("time", pa.string()),
        ("error", pa.string()),
    ]
)


def number_of(key: str) -> int:
    """A key of 16 hexadecimal digits as a number of 64 bits, which takes less memory."""
    return int(key, 16)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Ledger:
    """Entries of earlier runs, and the lines of this one; a context manager.

    run: the time at which this run began, which is in each of its lines.
    """

    def __init__(self, place: Place):
        self._place, self.run = place, now()
        self._parts, self._waiting = 0, list[str]()
        self._token = secrets.token_hex(4)
        self._last = time.monotonic()
        self._file: Any = None

    def __enter__(self) -> Ledger:
        if self._place.is_local:
            path = self._place.local_path(RESULTS)
            path.parent.mkdir(parents=True, exist_ok=True)
            is_cut = path.is_file() and not _ends_a_line(path)
            self._file = path.open("a", encoding="utf-8")
            if is_cut:  # by a crash
                self._file.write("\n")
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self._write_part()

    def add(self, entries: Iterable[Entry]) -> None:
        """Keep entries; on a disk they are there when this returns."""
        self._waiting += [json.dumps({**entry, "run": self.run}) + "\n" for entry in entries]
        if self._file is not None:
            lines, self._waiting = self._waiting, []
            self._file.writelines(lines)
            self._file.flush()
        elif len(self._waiting) >= _PART_ENTRIES or time.monotonic() - self._last > _PART_SECONDS:
            self._write_part()

    def _write_part(self) -> None:
        self._last = time.monotonic()
        if self._waiting:
            time_of_run = self.run.replace("-", "").replace(":", "")
            name = f"results-{time_of_run}-{self._token}-{self._parts:06}.jsonl"
            self._place.write(name, "".join(self._waiting).encode())
            self._parts, self._waiting = self._parts + 1, []


def read_entries(place: Place) -> Iterator[Entry]:
    """The entries of a folder, earlier ones first; lines that a crash has cut are left out."""
    names = sorted(name for name in place.top_names() if _PART.fullmatch(name))
    for name in names:
        with place.open(name) as file:
            for line in io.TextIOWrapper(file, encoding="utf-8", errors="replace"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    yield entry


def finished(place: Place) -> np.ndarray:
    """Keys, as sorted numbers, of the pictures that were made and whose files are there."""
    there: dict[str, bool] = {}
    names = None if place.is_local else set(place.names())
    keys = array("Q")
    for entry in read_entries(place):
        file, key = entry.get("file"), entry.get("key")
        if not file or not key:
            continue
        is_there = there.get(file) if "member" in entry else None
        if is_there is None:
            is_there = file in names if names is not None else place.local_path(file).is_file()
            if "member" in entry:
                there[file] = is_there
        if is_there:
            keys.append(number_of(key))
    return np.unique(np.frombuffer(keys, dtype=np.uint64))


def write_table(place: Place, run: str) -> None:
    """`table.parquet`: a line for each picture that is there and each error of the last run."""
    last: dict[int, int] = {}
    for position, entry in enumerate(read_entries(place)):
        if entry.get("file") and entry.get("key"):
            last[number_of(entry["key"])] = position
    chosen = np.sort(np.fromiter(last.values(), dtype=np.int64, count=len(last)))
    made = np.sort(np.fromiter(last, dtype=np.uint64, count=len(last)))
    del last
    sink, at = io.BytesIO(), 0
    with pq.ParquetWriter(sink, COLUMNS) as writer:
        waiting: list[Entry] = []
        for position, entry in enumerate(read_entries(place)):
            if at < len(chosen) and position == chosen[at]:
                at += 1
            elif "error" not in entry or entry.get("run") != run or _is_in(entry, made):
                continue
            waiting.append(_as_columns(entry))
            if len(waiting) == _AT_ONCE:
                writer.write_table(pa.Table.from_pylist(waiting, COLUMNS))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, COLUMNS))
    place.write(TABLE, sink.getvalue())


def _is_in(entry: Entry, made: np.ndarray) -> bool:
    if not entry.get("key"):
        return False
    at = np.searchsorted(made, np.uint64(number_of(entry["key"])))
    return bool(at < len(made) and made[at] == number_of(entry["key"]))


def _as_columns(entry: Entry) -> Entry:
    found = {name: entry.get(name) for name in COLUMNS.names}
    if isinstance(found["settings"], dict):
        found["settings"] = json.dumps(found["settings"])
    return found


def _ends_a_line(path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
