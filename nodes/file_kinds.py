"""What files in the model folders are, each read once and remembered by its stamp.

ComfyUI asks for the lists of every loader each time the page loads, and one file that raises would
take the node out of them; so nothing here raises but what a chosen file is owed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..krea2_model.checkpoints.checkpoint import read_shapes
from ..krea2_model.checkpoints.identify import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    CheckpointError,
    identify,
)
from ..krea2_model.checkpoints.storage import read_json

Shapes = dict[str, tuple[int, ...]]


class Kind(NamedTuple):
    """What a file is, as a noun phrase; or why it cannot be read."""

    name: str
    problem: str = ""


# By path, with the stamp of the file that each was read from. Shapes of Krea 2's parts alone:
# others are never asked for again, and a header may hold a vocabulary.
_kinds: dict[str, tuple[tuple[int, ...], Kind]] = {}
_shapes: dict[str, tuple[tuple[int, ...], Shapes]] = {}
_indexes: dict[str, tuple[tuple[int, ...], bool]] = {}


def kind_of(path: Path) -> Kind:
    """What a file is. Never raises."""
    try:
        seen = stamp(path)
        known = _kinds.get(str(path))
        if known is None or known[0] != seen:
            known = _kinds[str(path)] = (seen, _read(path, seen))
        return known[1]
    except OSError as error:
        return Kind("", f"{path.name} cannot be read ({error.strerror}).")


def _read(path: Path, seen: tuple[int, ...]) -> Kind:
    try:
        shapes = read_shapes(path)
        name = identify(shapes)
    except Exception as error:  # any: one strange file must not take a node from the list
        own = isinstance(error, (CheckpointError, OSError))
        return Kind("", str(error) if own else f"{path.name} cannot be read ({error!r}).")
    if any(part in name for part in (TRANSFORMER, TEXT_ENCODER, VAE)):
        _shapes[str(path)] = (seen, shapes)
    return Kind(name)


def shapes_of(path: Path) -> Shapes:
    """Shapes of a file's tensors by name. Raises CheckpointError or OSError for a broken one."""
    seen = stamp(path)
    known = _shapes.get(str(path))
    return known[1] if known is not None and known[0] == seen else read_shapes(path)


def stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file's content. A copy may have the size and the time of the original,
    but not the time at which it came to this place."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk through links, each folder once: links may lead in circles.

    The names of folders may be taken out of their list, to stay out of them.
    """
    seen = set()
    for folder, children, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            children.clear()
            continue
        seen.add(place)
        yield folder, children, files


def is_krea_folder(folder: Path) -> bool:
    """Whether the model_index.json of a diffusers folder is Krea 2's. Never raises."""
    index = folder / "model_index.json"
    try:
        seen = stamp(index)
        known = _indexes.get(str(index))
        if known is None or known[0] != seen:
            # Written by diffusers itself; an index without a class is judged by its weights.
            name = read_json(index).get("_class_name")
            known = _indexes[str(index)] = (seen, name is None or "Krea2" in str(name))
        return known[1]
    except (OSError, CheckpointError):
        return False
