"""Kinds of the files in the model folders, each read once and cached by its stamp.

ComfyUI asks for the lists of every loader each time the page loads, and one file that raises would
take the node out of them; so only `shapes_of`, for a chosen file, raises.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..krea2_model.checkpoints.checkpoint import Checkpoint, read_shapes
from ..krea2_model.checkpoints.gguf import is_gguf
from ..krea2_model.checkpoints.gguf_header import read_gguf_header
from ..krea2_model.checkpoints.identify import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    CheckpointError,
    identify,
    read_header,
)
from ..krea2_model.checkpoints.storage import read_json
from ..krea2_model.checkpoints.transformer import sampling_defaults
from ..krea2_model.config import Preset

Shapes = dict[str, tuple[int, ...]]


class Kind(NamedTuple):
    """The kind of a file as a noun phrase, or the reason why it cannot be read."""

    name: str
    problem: str = ""


# By path, with the stamp of the file at reading. Shapes of Krea 2's parts only: others are not
# needed again, and a header may hold a vocabulary.
_kinds: dict[str, tuple[tuple[int, ...], Kind]] = {}
_shapes: dict[str, tuple[tuple[int, ...], Shapes]] = {}
_indexes: dict[str, tuple[tuple[int, ...], bool]] = {}
_presets: dict[str, tuple[tuple[int, ...], Preset | None]] = {}


def kind_of(path: Path) -> Kind:
    """The kind of a file. Never raises."""
    try:
        current = stamp(path)
        cached = _kinds.get(str(path))
        if cached is None or cached[0] != current:
            cached = _kinds[str(path)] = (current, _read(path, current))
        return cached[1]
    except OSError as error:
        return Kind("", f"{path.name} cannot be read ({error.strerror}).")


def _read(path: Path, current: tuple[int, ...]) -> Kind:
    try:
        shapes = read_shapes(path)
        name = identify(shapes)
    except Exception as error:  # any: one strange file must not take a node from the list
        has_message = isinstance(error, (CheckpointError, OSError))
        return Kind("", str(error) if has_message else f"{path.name} cannot be read ({error!r}).")
    if any(part in name for part in (TRANSFORMER, TEXT_ENCODER, VAE)):
        _shapes[str(path)] = (current, shapes)
    return Kind(name)


def shapes_of(path: Path) -> Shapes:
    """Shapes of a file's tensors by name. Raises CheckpointError or OSError for a broken one."""
    current = stamp(path)
    cached = _shapes.get(str(path))
    if cached is None or cached[0] != current:
        # A shard by itself is no part that `kind_of` knows, and is asked for with every list.
        cached = _shapes[str(path)] = (current, read_shapes(path))
    return cached[1]


def preset_of_file(path: Path) -> Preset | None:
    """Sampling defaults of a transformer's file or diffusers folder, from its headers alone.

    None where nothing says whether it is Raw or Turbo, or where it cannot be read. Never raises.
    """
    source = path / "model_index.json" if path.is_dir() else path
    try:
        current = stamp(source)
        cached = _presets.get(str(path))
        if cached is None or cached[0] != current:
            cached = _presets[str(path)] = (current, _read_preset(path))
        return cached[1]
    except (OSError, CheckpointError):
        return None


def _read_preset(path: Path) -> Preset | None:
    if path.is_dir():
        index = read_json(path / "model_index.json")
        return sampling_defaults(Checkpoint(path, {}, model_index=index))
    header = read_gguf_header(path) if is_gguf(path) else read_header(path)
    return sampling_defaults(Checkpoint(path, {}, header.metadata))


def stamp(path: Path) -> tuple[int, ...]:
    """A value that changes with a file's content.

    A copy may have the size and the mtime of the original, but not its ctime.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk through links, each folder once: links may lead in circles.

    The names of folders may be taken out of their list, to stay out of them.
    """
    visited = set()
    for folder, children, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:
            children.clear()
            continue
        visited.add(place)
        yield folder, children, files


def is_krea_folder(folder: Path) -> bool:
    """True if the model_index.json of a diffusers folder is Krea 2's. Never raises."""
    index = folder / "model_index.json"
    try:
        current = stamp(index)
        cached = _indexes.get(str(index))
        if cached is None or cached[0] != current:
            # Written by diffusers itself; an index without a class is judged by its weights.
            name = read_json(index).get("_class_name")
            cached = _indexes[str(index)] = (current, name is None or "Krea2" in str(name))
        return cached[1]
    except (OSError, CheckpointError):
        return False
