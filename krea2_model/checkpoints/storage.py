"""Files and folders of tensors, whatever the tensors are: reading, finding shards, writing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..replacing import replacing
from .identify import CheckpointError

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


Progress = Callable[[int, int], None]

# An index of shards names every tensor of a model; no configuration is longer.
_MAX_JSON = 25_000_000


def without_compile(name: str) -> str:
    """A name without `_orig_mod`, the prefix of modules that torch.compile wraps, at any depth."""
    if "_orig_mod" not in name:
        return name
    return name.replace("_orig_mod.", "").replace("_orig_mod_", "")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a safetensors file: tensors on the CPU that are read from disk when they are used."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read ({error}). Download it again."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one part of a diffusers folder: its shards, or its only file."""
    try:
        contents = sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}).") from error
    indexes = [file for file in contents if file.name.endswith(".safetensors.index.json")]
    if indexes:
        names = read_json(indexes[0]).get("weight_map")
        shards = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
        if not shards:
            raise CheckpointError(f"{indexes[0]} names no files. Download the whole folder again.")
        there = {file.name for file in contents}
        for shard in shards:
            if shard not in there:
                raise CheckpointError(
                    f"{indexes[0].name} in {folder} names the shard {shard[:200]!r}, which is "
                    "not in that folder. Download the whole folder again."
                )
        return [folder / shard for shard in shards]
    files = [file for file in contents if file.suffix.lower() == ".safetensors"]
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors file. Name a model file, a diffusers folder (with "
            "model_index.json) or one of its parts."
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} .safetensors files and no index. Name one of them."
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON + 1)
        if len(content) > _MAX_JSON:
            raise CheckpointError(f"{path} has over {_MAX_JSON:,} bytes; expected a short file.")
        value = json.loads(content.decode("utf-8"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected an object.")
    return value


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what the header says, and how it is made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    entries: Iterable[Entry],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file, holding one tensor at a time.

    An existing file is replaced only once the new one is whole.
    progress: called after each tensor with the bytes written so far and in all.
    """
    entries = list(entries)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        written = 0
        for entry in entries:
            tensor = entry.make()
            if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
                raise RuntimeError(f"{entry.name} came out as {tensor.dtype} {tensor.shape}.")
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(data.numpy().data)
            if progress is not None:
                written += entry.size
                progress(written, start)
