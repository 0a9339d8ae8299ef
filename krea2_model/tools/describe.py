"""Describe a model file as text: kind, variant, layout, quantisation, missing tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint, prefix_of
from ..checkpoints.gguf import GGUFTensor
from ..checkpoints.identify import (
    CONTROL_LORA,
    LORA,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    WHERE,
    CheckpointError,
    identify,
)
from ..checkpoints.quantised import BRANCH, SUFFIXES, layer_settings
from ..checkpoints.text_encoder import read_text_encoder
from ..checkpoints.transformer import TRAINING_LEFTOVERS, read_transformer, variant_of
from ..checkpoints.transformer_keys import DIFFUSERS_MARKER, OFFICIAL_MARKER
from ..checkpoints.vae import read_vae
from ..checks import counted
from ..config import TransformerConfig
from ..lora.control_files import CHANNELS, REFERENCES, input_sizes, is_down, is_named_control
from ..lora.files import read_lora
from ..text.encoder import Qwen3VLTextEncoder
from ..transformer.model import Krea2Transformer
from ..vae.model import QwenImageVAE

PARTS = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "vae": VAE}


def describe(path: str | Path) -> str:
    """Describe a file or a diffusers folder in lines of text.

    Raises CheckpointError where it cannot be read at all.
    """
    path = Path(path)
    if path.is_dir():
        return _describe_folder(path)
    checkpoint = open_checkpoint(path, "transformer")
    kind = identify(checkpoint.tensors)
    lines = [f"{path.name}: {kind}, {size_text(path.stat().st_size)}"]
    if kind == CONTROL_LORA or LORA in kind:
        lines += _lora_lines(checkpoint, kind)
    else:
        lines += _part_lines(checkpoint, kind)
    return "\n".join(lines)


def _describe_folder(path: Path) -> str:
    parts = [name for name in PARTS if (path / name).is_dir()]
    if not parts:
        checkpoint = open_checkpoint(path, "transformer")
        kind = identify(checkpoint.tensors)
        lines = [f"{path.name}: a folder with {kind}"]
        return "\n".join(lines + _part_lines(checkpoint, kind))
    lines = [f"{path.name}: a diffusers folder with {', '.join(parts)}"]
    missing = [name for name in PARTS if name not in parts]
    if missing:
        lines.append(f"  missing: {', '.join(missing)}")
    for name in parts:
        lines += _part_lines(open_checkpoint(path, name), PARTS[name])
    return "\n".join(lines)


def _part_lines(checkpoint: Checkpoint, kind: str) -> list[str]:
    """Lines on each part of Krea 2 that a kind names; on the tensors where it names none."""
    readers = {TRANSFORMER: _transformer_lines, TEXT_ENCODER: _encoder_lines, VAE: _vae_lines}
    lines = [reader(checkpoint) for part, reader in readers.items() if part in kind]
    return sum(lines, []) or _unknown_lines(checkpoint)


def _transformer_lines(checkpoint: Checkpoint) -> list[str]:
    lines = [f"  {TRANSFORMER}"]
    official = prefix_of(checkpoint, (OFFICIAL_MARKER,))
    prefix = prefix_of(checkpoint, (OFFICIAL_MARKER, DIFFUSERS_MARKER))
    layout = "diffusers names" if official is None else "official names"
    lines.append(f"    layout: {layout}" + (f', prefix "{prefix}"' if prefix else ""))
    variant, how = variant_of(checkpoint)
    lines.append(f"    variant: {variant or 'unknown'} ({how})")
    try:
        state = read_transformer(checkpoint)
    except CheckpointError as error:
        return [*lines, f"    broken: {error}"]
    if state.preset is not None:
        preset = state.preset
        mu = "by size" if preset.mu is None else preset.mu
        lines.append(f"    settings: {preset.steps} steps, guidance {preset.guidance}, mu {mu}")
    config = state.config
    lines.append(
        f"    size: {config.num_layers} blocks of width {config.hidden_size}, text width "
        f"{config.text_hidden_dim}"
    )
    expected = Krea2Transformer(config, device="meta").state_dict()
    lines += _weights_lines(state.tensors, expected)
    strays = sorted(name for name in checkpoint.tensors if name.endswith(tuple(TRAINING_LEFTOVERS)))
    if strays:
        lines.append(f"    ignored: {', '.join(strays)} (left over from training)")
    return lines


def _encoder_lines(checkpoint: Checkpoint) -> list[str]:
    lines = [f"  {TEXT_ENCODER}"]
    try:
        state = read_text_encoder(checkpoint)
    except CheckpointError as error:
        return [*lines, f"    broken: {error}"]
    vision = any("visual." in name for name in checkpoint.tensors)
    lines.append(
        f"    size: width {state.config.hidden_size}, vision tower: {'yes' if vision else 'no'}"
    )
    expected = Qwen3VLTextEncoder(state.config, device="meta").state_dict()
    return lines + _weights_lines(state.tensors, expected)


def _vae_lines(checkpoint: Checkpoint) -> list[str]:
    lines = [f"  {VAE}"]
    try:
        state = read_vae(checkpoint)
    except CheckpointError as error:
        return [*lines, f"    broken: {error}"]
    lines.append(f"    size: base width {state.config.base_dim}")
    if state.config.upscale > 1:
        lines.append(f"    decodes to {state.config.upscale} times the width and height")
    return lines + _weights_lines(
        state.tensors, QwenImageVAE(state.config, device="meta").state_dict()
    )


def _lora_lines(checkpoint: Checkpoint, kind: str) -> list[str]:
    if kind == CONTROL_LORA:
        return _control_lines(checkpoint)
    released = Krea2Transformer(TransformerConfig(), device="meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items()}
    try:
        _, _, report = read_lora(
            checkpoint.tensors, shapes, checkpoint.path.name, metadata=checkpoint.metadata
        )
    except CheckpointError as error:
        return [f"  {error}"]
    lines = [f"  {line}" for line in str(report).splitlines()]
    if is_named_control(checkpoint.path.name, checkpoint.metadata):
        lines.append(
            f"  its name says that it is a control LoRA with {REFERENCES}: use Krea 2 Control LoRA"
        )
    return lines


def _control_lines(checkpoint: Checkpoint) -> list[str]:
    """Lines on a control LoRA with control channels."""
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    sizes = input_sizes(shapes)
    if sizes is None:
        return ["  broken: without an input layer, so nothing reads the control image"]
    width, channels = sizes
    released = TransformerConfig()
    lines = [
        f"  {CHANNELS}: reads a control image beside the picture; use Krea 2 Control LoRA",
        f"  input layer: width {width}, {channels} channels",
    ]
    if sizes != (released.hidden_size, 2 * released.in_channels):
        lines.append(
            f"  not for the released Krea 2, which has width {released.hidden_size} and "
            f"{2 * released.in_channels} channels with those of a control image"
        )
    downs = [shape for name, shape in shapes.items() if is_down(name) and len(shape) == 2]
    if downs:
        ranks = sorted({shape[0] for shape in downs})
        text = " to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))
        lines.append(f"  LoRA of {counted(len(downs), 'layer')} of the blocks, rank {text}")
    return lines


def _unknown_lines(checkpoint: Checkpoint) -> list[str]:
    names = list(checkpoint.tensors)
    examples = ", ".join(names[:4])
    lines = [f"  {counted(len(names), 'tensor')}, such as {examples}"]
    lines.append("  Krea 2 uses " + "; ".join(f"{kind}: {place}" for kind, place in WHERE.items()))
    return lines


def _weights_lines(tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Lines on parameters, dtypes by group of layers, and missing and surplus tensors."""
    extras = (*SUFFIXES, *BRANCH)
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(extras)}
    count = sum(tensor.numel() for tensor in expected.values())
    lines = [f"    parameters: {count:,}"]
    settings = layer_settings(tensors)
    groups: dict[str, Counter] = defaultdict(Counter)
    for name, tensor in weights.items():
        match = re.match(r"(blocks|layers|txtfusion|encoder|decoder)\b", name)
        form = _form(name, tensor, settings)
        groups[match[1] if match else "others"][form] += 1
    for group, forms in groups.items():
        text = ", ".join(f"{number} x {form}" for form, number in forms.most_common())
        lines.append(f"    {group}: {text}")
    downs = [tensor for n, tensor in tensors.items() if n.endswith(BRANCH[1]) and tensor.ndim]
    if ranks := sorted({tensor.shape[0] for tensor in downs}):
        text = " to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))
        lines.append(f"    low-rank branches: rank {text}")
    for word, names in (
        ("missing", sorted(expected.keys() - weights.keys())),
        ("surplus", sorted(weights.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"    {word}: {', '.join(names[:5])}{more}")
    return lines


def _form(name: str, tensor, settings: Mapping[str, Mapping]) -> str:
    layer = name.removesuffix(".weight")
    if layer in settings:
        form = str(settings[layer].get("format"))
        return f"{form} (rotated)" if settings[layer].get("convrot") else form
    if isinstance(tensor, GGUFTensor):
        return f"GGUF {tensor.format}"
    return str(tensor.dtype).removeprefix("torch.")


def size_text(size: int) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size} bytes"
