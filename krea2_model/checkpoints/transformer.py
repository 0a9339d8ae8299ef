"""Load and save the transformer: key layouts, sizes, and sampling defaults in the metadata."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import PRESETS, Preset
from ..transformer.model import Krea2Transformer
from .checkpoint import Checkpoint, open_checkpoint, prefix_of, raise_wrong_kind, strip_prefix
from .gguf import GGUFTensor
from .identify import TRANSFORMER, CheckpointError
from .loading import PLAIN, PartState, explain_bad_shapes, load_part, most_common_dtype
from .quantised_layers import stored_entries
from .settings import distilled, transformer_settings
from .storage import write_safetensors
from .transformer_keys import (
    DIFFUSERS_MARKER,
    OFFICIAL_MARKER,
    diffusers_to_official,
    infer_transformer_config,
    is_norm_or_table,
    module_to_official,
    official_to_module,
)

# Metadata keys of a safetensors file for the variant and sampling defaults.
VARIANT_KEY, STEPS_KEY, GUIDANCE_KEY, MU_KEY, SIZE_KEY = (
    "krea2.variant", "krea2.steps", "krea2.guidance", "krea2.mu", "krea2.size",
)  # fmt: skip

# Left over from training in some files, and unused.
TRAINING_LEFTOVERS = frozenset(("last.down.weight", "last.up.weight"))


def load_transformer(
    path: str | Path | Checkpoint,
    *,
    device="cpu",
    dtype: torch.dtype | str | None = None,
    layers=None,
    keep_quantised: bool = False,
) -> Krea2Transformer:
    """Load a Krea 2 transformer from a file or a diffusers folder.

    dtype, keep_quantised: as `load_part` takes them; without a dtype the file's most common one.
    The result has `variant` ("raw", "turbo" or None) and `preset` (its sampling defaults or None).
    Raises CheckpointError, a ValueError, that says what the file is and what was expected.
    """
    state = read_transformer(open_checkpoint(path, "transformer"))
    return load_part(state, device, dtype, layers, keep_quantised)


def save_transformer(transformer: Krea2Transformer, path: str | Path) -> None:
    """Save a transformer as one safetensors file in official names, with its sampling defaults.

    Quantised layers keep the format of safetensors files; blocks of a GGUF file, and layers with
    LoRAs, become plain. An existing file is replaced only once the new one is whole.
    """
    metadata = {"format": "pt", **preset_metadata(transformer.variant, transformer.preset)}
    entries = [
        replace(entry, name=module_to_official(entry.name)) for entry in stored_entries(transformer)
    ]
    write_safetensors(Path(path), entries, metadata)


def preset_metadata(variant: str | None, preset: Preset | None) -> dict[str, str]:
    """Metadata from which `read_transformer` gives the same variant and sampling defaults."""
    metadata = {VARIANT_KEY: variant} if variant else {}
    if preset and preset != PRESETS.get(variant or ""):
        metadata |= {STEPS_KEY: str(preset.steps), GUIDANCE_KEY: str(preset.guidance)}
        metadata |= {} if preset.mu is None else {MU_KEY: str(preset.mu)}
        metadata |= {SIZE_KEY: str(preset.size)}
    return metadata


def read_transformer(checkpoint: Checkpoint) -> PartState:
    """Translate a transformer's tensors to module names and read off its sizes and variant."""
    official = _official_tensors(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in official.items()}
    settings = transformer_settings(checkpoint.config, checkpoint.config_name)
    with explain_bad_shapes(checkpoint.path, TRANSFORMER):
        config = infer_transformer_config(shapes, **settings)
    tensors: dict[str, Any] = {}
    for name, tensor in official.items():
        # Some GGUF files quantise the last table.
        if is_norm_or_table(name) and isinstance(tensor, GGUFTensor):
            tensor = tensor.dequantise()
        # diffusers stores a block's table as (6, F), the official files as (6 F).
        table = name.endswith(".mod.lin")
        tensors[official_to_module(name)] = tensor.flatten() if table else tensor
    variant, _ = variant_of(checkpoint)
    preset = _preset(checkpoint, variant)
    return PartState(
        checkpoint.path,
        TRANSFORMER,
        config,
        tensors,
        build=partial(Krea2Transformer, config, variant=variant, preset=preset),
        dtype=most_common_dtype(tensors, PLAIN),
        variant=variant,
        preset=preset,
    )


def _official_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's tensors by official name, from either layout and under any prefix."""
    if (prefix := prefix_of(checkpoint, (OFFICIAL_MARKER,))) is not None:
        tensors = strip_prefix(checkpoint.tensors, prefix)
    elif (prefix := prefix_of(checkpoint, (DIFFUSERS_MARKER,))) is not None:
        stripped = strip_prefix(checkpoint.tensors, prefix)
        tensors = {diffusers_to_official(name): tensor for name, tensor in stripped.items()}
    else:
        raise_wrong_kind(checkpoint, TRANSFORMER)
    return {name: tensor for name, tensor in tensors.items() if name not in TRAINING_LEFTOVERS}


def variant_of(checkpoint: Checkpoint) -> tuple[str | None, str]:
    """Raw or Turbo, or None, and how it is known: the folder's index, metadata, or the name."""
    is_distilled = distilled(checkpoint.model_index, "model_index.json")
    if is_distilled is not None:
        return "turbo" if is_distilled else "raw", "is_distilled in model_index.json"
    if checkpoint.metadata.get(VARIANT_KEY) in PRESETS:
        return checkpoint.metadata[VARIANT_KEY], f"{VARIANT_KEY} in the file's metadata"
    # As words of their own: a "drawing" is not "raw".
    names = [checkpoint.path.name]
    if checkpoint.path.is_dir():
        # A part of a diffusers folder; it is the folder that has a name.
        names.append(checkpoint.path.parent.name)
    words = re.split(r"[^a-z]+", " ".join(names).lower())
    named = next((name for name in ("turbo", "raw") if name in words), None)
    return named, "its name" if named else "nothing says so"


def sampling_defaults(checkpoint: Checkpoint) -> Preset | None:
    """A checkpoint's sampling defaults, as `read_transformer` gives them; needs no tensors."""
    return _preset(checkpoint, variant_of(checkpoint)[0])


def _preset(checkpoint: Checkpoint, variant: str | None) -> Preset | None:
    """Sampling defaults: the file's own where its metadata carries them, else the variant's.

    All of them or none: `krea2.steps` decides, and without `krea2.mu` the shift is by size.
    """
    metadata = checkpoint.metadata
    if STEPS_KEY not in metadata:
        return PRESETS.get(variant or "")
    try:
        mu = float(metadata[MU_KEY]) if MU_KEY in metadata else None
        guidance = float(metadata.get(GUIDANCE_KEY, 0))
        size, steps = int(metadata.get(SIZE_KEY, Preset.size)), int(metadata[STEPS_KEY])
        for name, value, least, most in (
            (STEPS_KEY, steps, 1, 10_000), (GUIDANCE_KEY, guidance, 0, 1_000),
            (MU_KEY, 0.0 if mu is None else mu, -100, 100), (SIZE_KEY, size, 16, 16_384),
        ):  # fmt: skip
            if not least <= value <= most:
                raise ValueError(f"{name} is {value:g}; expected {least} to {most}")
        return Preset(variant or "custom", steps, guidance, mu, size)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path.name} carries unreadable sampling defaults ({error})."
        ) from error
