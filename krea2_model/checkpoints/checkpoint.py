"""Open a file or a diffusers folder, whatever it holds, as tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ..checks import as_path
from ..text.encoder import llama_cpp_to_hugging_face
from .gguf import is_gguf, read_gguf
from .gguf_header import read_gguf_header
from .identify import WHERE, CheckpointError, CheckpointNotFoundError, identify, read_header
from .quantised import normalise_metadata
from .storage import read_json, read_safetensors, weight_files, without_compile

ReadFile = Callable[[Path], tuple[Mapping[str, Tensor], Mapping[str, str] | None]]


@dataclass
class Checkpoint:
    """Tensors by the names in their file, its metadata, and the folder's configuration files."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model_index: dict[str, Any] = field(default_factory=dict)

    @property
    def config_name(self) -> str:
        """The configuration's name in messages, `vae/config.json` for example."""
        return f"{self.path.name}/config.json" if self.path.is_dir() else "config.json"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def open_checkpoint(
    path: str | Path | Checkpoint, component: str, read_file: ReadFile | None = None
) -> Checkpoint:
    """Open a file, or the part `component` of a diffusers folder; a Checkpoint is open already.

    component: "transformer", "text_encoder" or "vae": the subfolder to take where there is one.
    read_file: reads one safetensors file to tensors and metadata; a host may bring its own.
    """
    if isinstance(path, Checkpoint):
        return path
    path = as_path(path)
    read_file = read_file or read_safetensors
    if path.is_file() and is_gguf(path):
        stored, texts = read_gguf(path)
        return Checkpoint(path, {llama_cpp_to_hugging_face(n): t for n, t in stored.items()}, texts)
    if path.is_file():
        read_header(path)
        tensors, metadata = read_file(path)
        metadata = dict(metadata or {})
        return Checkpoint(path, _normalise(tensors, metadata, path.name), metadata)
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"There is no file or folder {path}. Check the name and the folder."
        )
    folder = path / component if (path / component).is_dir() else path
    checkpoint = Checkpoint(folder, {})
    for file in weight_files(folder):
        read_header(file)
        tensors, metadata = read_file(file)
        checkpoint.tensors.update(_normalise(tensors, metadata or {}, file.name))
        checkpoint.metadata.update(metadata or {})
    checkpoint.config = read_json(folder / "config.json")
    for parent in (path, path.parent):
        checkpoint.model_index = checkpoint.model_index or read_json(parent / "model_index.json")
    return checkpoint


def _normalise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str):
    return normalise_metadata({without_compile(n): t for n, t in tensors.items()}, metadata, name)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors by the names that `open_checkpoint` gives them, from its header.

    Raises CheckpointError where the file is broken or of another format.
    """
    if path.is_file() and is_gguf(path):
        stored = read_gguf_header(path).tensors
        return {llama_cpp_to_hugging_face(n): entry.shape for n, entry in stored.items()}
    return {without_compile(n): shape for n, shape in read_header(path).shapes.items()}


def prefix_of(checkpoint: Checkpoint, markers: tuple[str, ...]) -> str | None:
    """The prefix of a part's marker tensor, or None if no marker is there."""
    for name in checkpoint.tensors:
        for marker in markers:
            if name == marker or name.endswith(f".{marker}"):
                return name[: -len(marker)]
    return None


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: tensor for n, tensor in tensors.items() if n.startswith(prefix)}


def raise_wrong_kind(checkpoint: Checkpoint, expected: str) -> NoReturn:
    kind = identify(checkpoint.tensors)
    raise CheckpointError(
        f"{checkpoint.path.name} is {kind}; expected {expected}, for example {WHERE[expected]}."
    )
