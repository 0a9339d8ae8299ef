"""Headers of the parts of Krea 2: what a path holds, and which text encoder a transformer needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..config import TextEncoderConfig
from .checkpoint import read_shapes
from .gguf import is_gguf, require_package
from .identify import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    WHERE,
    CheckpointError,
    CheckpointNotFoundError,
    identify,
)
from .storage import weight_files

Shapes = Mapping[str, tuple[int, ...]]
# Layers of a text encoder up to the last that is tapped.
LAYERS = max(TextEncoderConfig().tap_layers)
COMPONENTS = {TRANSFORMER: "transformer", TEXT_ENCODER: "text_encoder", VAE: "vae"}


def check_parts(transformer: Path, text_encoder: Path, vae: Path) -> None:
    """Check by headers that three paths hold the parts of one model; no weight is read.

    Raises CheckpointError for files that are missing, damaged or of another kind, and for a text
    encoder of another width than the transformer needs.
    """
    shapes = {
        part: _part_shapes(path, part)
        for part, path in ((TRANSFORMER, transformer), (TEXT_ENCODER, text_encoder), (VAE, vae))
    }
    needed, width = text_width(shapes[TRANSFORMER]), encoder_width(shapes[TEXT_ENCODER])
    if None not in (needed, width) and needed != width:
        raise CheckpointError(wrong_pair(text_encoder, width, transformer, needed))


def text_width(shapes: Shapes) -> int | None:
    """Width of the text that a transformer reads; None where its shapes do not say."""
    return size_of(
        shapes,
        "txtfusion.layerwise_blocks.0.prenorm.scale",
        "text_fusion.layerwise_blocks.0.norm1.weight",
    )


def encoder_width(shapes: Shapes) -> int | None:
    """Width of a text encoder; None where its shapes do not say."""
    return size_of(shapes, "layers.0.input_layernorm.weight")


def has_all_layers(shapes: Shapes) -> bool:
    """True if a text encoder has every layer that Krea 2 reads."""
    layers = (re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in shapes)
    return max((int(layer[1]) for layer in layers if layer), default=-1) + 1 >= LAYERS


def wrong_pair(encoder: Path, width: int | None, model: Path, needed: int | None) -> str:
    """The message for a text encoder of another width than a transformer needs."""
    return (
        f"{encoder.name} gives text of width {width}; {model.name} needs {needed}. Use the "
        f"text encoder that belongs to it, for example {WHERE[TEXT_ENCODER]}."
    )


def size_of(shapes: Shapes, *endings: str, axis: int = 0) -> int | None:
    """One size of the first tensor whose name, after any prefix, is one of `endings`."""
    for name, shape in shapes.items():
        if any(name == end or name.endswith(f".{end}") for end in endings):
            return shape[axis] if len(shape) > axis else None
    return None


def _part_shapes(path: Path, part: str) -> Shapes:
    if not path.exists():
        raise CheckpointNotFoundError(
            f"There is no file or folder {path}. Check the name and the folder."
        )
    files = [path]
    if path.is_dir():
        folder = path / COMPONENTS[part]
        files = weight_files(folder if folder.is_dir() else path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if is_gguf(file):
            require_package(file)
        shapes |= read_shapes(file)
    if part not in (kind := identify(shapes)):
        raise CheckpointError(f"{path.name} is {kind}; expected {part}, for example {WHERE[part]}.")
    return shapes
