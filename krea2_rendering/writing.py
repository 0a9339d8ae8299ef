"""Pictures to files, off the workers that paint: image files, or shards that hold many of them.

Whatever was written before a crash counts: a shard that the ledger does not know is read back by
`records_of`, and a file of that name is written anew with the same content.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from krea2_model.cli.errors import explain
from krea2_model.cli.jobs import is_disk_full
from krea2_model.images.output_files import image_format
from krea2_model.images.picture_texts import save_options

from .ledger import COLUMNS, Entry, now
from .places import Place

FOLDER, WEBDATASET, PARQUET = "folder", "webdataset", "parquet"
LAYOUTS = (FOLDER, WEBDATASET, PARQUET)
SHARDS = "shards"

ENTRIES = pa.schema([("entry", pa.string())])
ENCODED = pa.schema([("entry", pa.string()), ("file", pa.string()), ("data", pa.large_binary())])
_IMAGE = "image"
# The whole run ends with an entry that has this.
STOP = "stop"


def encode(block: pa.Table) -> pa.Table:
    """Painted pictures (`painting.PAINTED`) as the bytes of files (ENCODED); errors as they are."""
    rows = []
    for row in block.to_pylist():
        if not row["pixels"]:
            rows.append({"entry": row["entry"], "file": row["file"], "data": None})
            continue
        image = Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])
        data = image_bytes(image, row["file"], json.loads(row["texts"]))
        entry = json.loads(row["entry"]) | _facts(data, row["width"], row["height"])
        rows.append({"entry": json.dumps(entry), "file": row["file"], "data": data})
    return pa.Table.from_pylist(rows, ENCODED)


def image_bytes(image: Image.Image, name: str, texts: dict[str, str]) -> bytes:
    """An image as the plain command writes it under a name."""
    kind = image_format(Path(name))
    options, _ = save_options(kind, texts)
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return stored.getvalue()


def _facts(data: bytes, width: int, height: int) -> Entry:
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "width": width,
        "height": height,
        "time": now(),
    }


class FolderWriter:
    """Writes encoded pictures (ENCODED) to files; gives their entries (ENTRIES)."""

    def __init__(self, place: Place):
        self._place = place

    def __call__(self, block: pa.Table) -> pa.Table:
        entries = []
        for row in block.to_pylist():
            entry = json.loads(row["entry"])
            if row["data"] is not None:
                try:
                    self._place.write(row["file"], row["data"])
                    entry["file"] = row["file"]
                except Exception as error:
                    entry = not_written(entry, error)
            entries.append({"entry": json.dumps(entry)})
        return pa.Table.from_pylist(entries, ENTRIES)


class ShardWriter:
    """Writes encoded pictures (ENCODED) into one shard a block; gives their entries (ENTRIES).

    A shard's name is made of its content: a block that is written again is the same file.
    """

    def __init__(self, place: Place, layout: str):
        self._place, self._layout = place, layout

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = [(json.loads(row["entry"]), row["file"], row["data"]) for row in block.to_pylist()]
        good = [row for row in rows if row[2] is not None]
        entries = [entry for entry, _, data in rows if data is None]
        if good:
            keys = "".join(entry["key"] for entry, _, _ in good)
            digest = hashlib.sha256(keys.encode()).hexdigest()[:16]
            ending = "tar" if self._layout == WEBDATASET else "parquet"
            name = f"{SHARDS}/{digest}.{ending}"
            members = [(*_member(entry, file, name), data) for entry, file, data in good]
            write = _tar if self._layout == WEBDATASET else _parquet
            try:
                self._place.write(name, write(members))
                entries += [entry for entry, _, _ in members]
            except Exception as error:
                entries += [not_written(entry, error) for entry, _, _ in good]
        return pa.Table.from_pylist([{"entry": json.dumps(e)} for e in entries], ENTRIES)


def _member(entry: Entry, file: str, shard: str) -> tuple[Entry, str]:
    """The entry of a picture in a shard, and its name there."""
    member = entry["key"] + PurePosixPath(file).suffix
    return {**entry, "file": shard, "member": member}, member


def _tar(members: list[tuple[Entry, str, bytes]]) -> bytes:
    """A tar file as WebDataset reads it: KEY.png, KEY.json, KEY.txt with the prompt."""
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as tar:
        for entry, member, data in members:
            texts = {"json": json.dumps(entry).encode(), "txt": entry["prompt"].encode()}
            files = {member: data} | {f"{entry['key']}.{end}": t for end, t in texts.items()}
            for name, content in files.items():
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return stored.getvalue()


def _parquet(members: list[tuple[Entry, str, bytes]]) -> bytes:
    """A Parquet file with the columns of the ledger and one `image`, {bytes, path}.

    That is the form in which the datasets library shows images.
    """
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = COLUMNS.append(pa.field(_IMAGE, picture))
    rows = [
        {name: entry.get(name) for name in COLUMNS.names}
        | {
            "settings": json.dumps(entry.get("settings", {})),
            _IMAGE: {"bytes": data, "path": member},
        }
        for entry, member, data in members
    ]
    stored = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), stored, row_group_size=64)
    return stored.getvalue()


def records_of(place: Place, name: str) -> Iterator[Entry]:
    """The entries that a shard holds."""
    with place.open(name) as file:
        if name.endswith(".tar"):
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for header in tar:
                    if header.name.endswith(".json") and (member := tar.extractfile(header)):
                        yield json.loads(member.read())
            return
        for row in pq.read_table(file, columns=COLUMNS.names).to_pylist():
            row["settings"] = json.loads(row["settings"])
            yield {key: value for key, value in row.items() if value is not None}


def shard_names(place: Place) -> set[str]:
    """Names of the shards of a folder."""
    return {f"{SHARDS}/{name}" for name in Place(f"{place}/{SHARDS}").top_names() if name[0] != "."}


def not_written(entry: Entry, error: Exception) -> Entry:
    """The entry of a picture that could not be written; a full disk ends the run."""
    kept: dict[str, Any] = {
        name: entry[name] for name in ("row", "key", "id", "seed", "prompt") if name in entry
    }
    explained = explain(error)
    kept["error"] = explained[0] if explained else f"{type(error).__name__}: {error}"
    if is_disk_full(error):
        kept[STOP] = True
    return kept
