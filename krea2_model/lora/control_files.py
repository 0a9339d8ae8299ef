"""Kinds of control LoRA files, told by the names and shapes of their tensors.

A control LoRA of control channels widens the transformer's input layer: its first columns read the
image, the others the latents of a control image, token by token. It holds the whole widened layer
(`first.weight`), or a LoRA of it, beside a LoRA of the blocks whose matrices are called A and B or
as in any LoRA. One of reference tokens is a plain LoRA, trained with the control image as a
reference: only its name, or its header, tells it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..checkpoints.transformer_keys import Shape
from ..config import TransformerConfig

# What the forms are called in messages, in Python and in the node.
CHANNELS, REFERENCES = "control channels", "reference tokens"
FORMS = (CHANNELS, REFERENCES)

MAX_STRENGTH = 10.0

_IMAGE_CHANNELS = TransformerConfig().in_channels

# The input layer, after any prefix, as official files, diffusers and Flux's files call it.
_INPUT = re.compile(r"(?:^|[._])(?:first|img_in|x_embedder)[._](.+)$")
_DOWN = (
    "A",
    "lora_A.weight",
    "lora_A",
    "lora_down.weight",
    "lora.down.weight",
    "lora_A.default.weight",
)
_UP = ("B", "lora_B.weight", "lora_B", "lora_up.weight", "lora.up.weight", "lora_B.default.weight")
INPUT_PARTS = {
    "weight": "weight",
    "bias": "bias",
    "alpha": "alpha",
    "reshape_weight": "shape",
    "diff": "diff",
    "diff_b": "bias change",
    "lora_B.bias": "up bias",
    **dict.fromkeys(_DOWN, "down"),
    **dict.fromkeys(_UP, "up"),
}

_WORDS = re.compile(
    r"control(?!ler|led)|openpose|dwpose|canny|line[-_ ]?art|scribble|soft[-_ ]?edge|depth[-_ ]?map"
)


def input_part(name: str) -> str | None:
    """The part of the input layer that a tensor is, by `INPUT_PARTS`; None for other layers."""
    match = _INPUT.search(name)
    return None if match is None else INPUT_PARTS.get(match[1])


def input_channels(shapes: Mapping[str, Shape]) -> int | None:
    """Channels of the input layer that a file holds or changes, None where it leaves it alone."""
    for name, shape in shapes.items():
        if input_part(name) in ("weight", "down", "diff") and len(shape) == 2:
            return shape[1]
    return None


def input_sizes(shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Width and channels of the input layer that a file holds or changes; None without."""
    parts = {input_part(name): shape for name, shape in shapes.items() if len(shape) == 2}
    channels = input_channels(shapes)
    for part in ("weight", "diff", "up"):
        if part in parts and channels is not None:
            return parts[part][0], channels
    return None


def is_down(name: str) -> bool:
    """True for the first matrix of a LoRA of another layer than the input layer."""
    return input_part(name) is None and name.endswith(tuple(f".{part}" for part in _DOWN))


def is_widened(shapes: Mapping[str, Shape]) -> bool:
    """True for the tensors of a control LoRA with control channels."""
    channels = input_channels(shapes)
    return channels is not None and channels > _IMAGE_CHANNELS


def is_named_control(name: str, metadata: Mapping[str, str] | None = None) -> bool:
    """True where a file's name, or an entry of its header, calls it a control LoRA."""
    entries = [value for key, value in (metadata or {}).items() if key in _NAMES]
    return any(_WORDS.search(text.lower()) for text in (name, *entries))


# Entries of the header with a name or a purpose; others hold paths and settings of trainers.
_NAMES = ("name", "ss_output_name", "modelspec.title", "modelspec.description", "format", "task")


def control_form(
    shapes: Mapping[str, Shape], name: str = "", metadata: Mapping[str, str] | None = None
) -> str | None:
    """`CHANNELS`, `REFERENCES`, or None for a LoRA that nothing calls a control LoRA."""
    if is_widened(shapes):
        return CHANNELS
    return REFERENCES if is_named_control(name, metadata) else None
