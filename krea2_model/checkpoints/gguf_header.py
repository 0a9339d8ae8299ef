"""The header of a GGUF file: names, formats and shapes of its tensors, and short metadata.

Parsed here and not by the `gguf` package, which makes an object of every value: a vocabulary costs
it seconds and a hundred megabytes, and lists of models read headers often. Arrays are stepped
over. Nothing is believed: counts, lengths and offsets are compared with the file before use.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .identify import CheckpointError, CheckpointNotFoundError

MAGIC = b"GGUF"

# city96's converter keeps here the shape of a tensor that it stores in rows of another length,
# because blocks have to divide a row.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

# struct codes of the scalar value types, by their number in the file.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
# Texts that are longer say nothing about weights; chat templates are among them.
_LONGEST_TEXT = 100_000
_LONGEST_NAME = 10_000
_MOST_TENSORS = 200_000


class Stored(NamedTuple):
    """A tensor as the header describes it.

    type_id: ggml's number of its format. shape: of its values, the longest stride first.
    offset: of its data from the file's beginning.
    """

    type_id: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """Tensors by name in the file's order, and the metadata that is short text."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse a file's header.

    Raises CheckpointError for a broken file and CheckpointNotFoundError where there is none.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"There is no file {path}. Check the name and the folder.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data).header()
    except (struct.error, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path.name} is a broken GGUF file ({error}). Download it again."
        ) from error


class _Parser:
    """Reads one value after the other from `data`. Errors are ValueErrors or struct's."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != MAGIC:
            raise ValueError("it does not begin as one")
        self.place = 4
        version = self.number("I")
        if version not in (2, 3):
            order = ", written for a machine of other byte order" if not version & 0xFFFF else ""
            raise ValueError(f"version {version}{order}; expected 2 or 3")
        tensors, values = self.number("Q"), self.number("Q")
        # Each takes bytes of its own, however short.
        if tensors > min(_MOST_TENSORS, len(self.data) // 24) or values > len(self.data) // 13:
            raise ValueError(f"it claims {tensors:,} tensors and {values:,} values")
        metadata, shapes, alignment = self.values(values)
        entries = [self.tensor() for _ in range(tensors)]
        start = -(-self.place // alignment) * alignment
        stored: dict[str, Stored] = {}
        for name, type_id, shape, offset in entries:
            if name in stored:
                raise ValueError(f"it has two tensors {name[:100]!r}")
            original = shapes.get(name, shape)
            if math.prod(original) != math.prod(shape):
                raise ValueError(f"{name[:100]} is {shape}, and its original shape {original}")
            stored[name] = Stored(type_id, original, start + offset)
        return GGUFHeader(stored, metadata)

    def values(self, count: int) -> tuple[dict[str, str], dict[str, tuple[int, ...]], int]:
        """Texts by key, original shapes by tensor, and the alignment of data."""
        texts: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        alignment = 32
        for _ in range(count):
            key, kind = self.text(_LONGEST_NAME), self.number("I")
            if kind == _TEXT:
                length = self.number("Q")
                if length <= _LONGEST_TEXT:
                    texts[key] = bytes(self.take(length)).decode("utf-8", "replace")
                else:
                    self.skip(length)
            elif kind == _ARRAY and key.startswith(ORIGINAL_SHAPE):
                shapes[key.removeprefix(ORIGINAL_SHAPE)] = self.short_array()
            elif kind == _ARRAY:
                self.skip_array()
            else:
                value = self.number(_code(kind))
                if key == "general.alignment":
                    alignment = value
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}; expected a power of 2")
        return texts, shapes, alignment

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self.text(_LONGEST_NAME), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name[:100]} has {dimensions:,} dimensions")
        sides = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        _check_sides(sides, name)
        return name, self.number("I"), tuple(reversed(sides)), self.number("Q")

    def short_array(self) -> tuple[int, ...]:
        kind, count = self.number("I"), self.number("Q")
        code = _code(kind)
        if count > _MOST_DIMENSIONS or code in "fd":
            raise ValueError(f"an original shape has {count:,} sides of type {kind}")
        sides = tuple(self.number(code) for _ in range(count))
        _check_sides(sides, "an original shape")
        return sides

    def skip_array(self, depth: int = 0) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind not in (_TEXT, _ARRAY):
            self.skip(count * struct.calcsize(_code(kind)))
            return
        if count > len(self.data) // 8 or depth > 3:
            raise ValueError(f"it claims an array of {count:,} values in {depth} others")
        if kind == _ARRAY:
            for _ in range(count):
                self.skip_array(depth + 1)
            return
        data, place, read, end = self.data, self.place, _LENGTH.unpack_from, len(self.data)
        for _ in range(count):
            place += 8 + read(data, place)[0]
            if place > end:
                raise ValueError("it ends inside its header")
        self.place = place

    def text(self, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise ValueError(f"it has a name of {length:,} bytes")
        return bytes(self.take(length)).decode("utf-8")

    def number(self, code: str):
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def take(self, size: int) -> bytes:
        start = self.place
        self.skip(size)
        return self.data[start : self.place]

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.place:
            raise ValueError("it ends inside its header")
        self.place += size


_LENGTH = struct.Struct("<Q")


def _check_sides(sides: tuple[int, ...], name: str) -> None:
    # One side may be 0 and hide how large the others are.
    if not all(0 <= side < 2**48 for side in sides) or math.prod(sides) >= 2**62:
        raise ValueError(f"{name[:100]} has the sides {sides}")


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return _SCALARS[kind]
