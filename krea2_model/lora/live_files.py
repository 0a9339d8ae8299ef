"""LoRA files for single tokens: of a region, beside weights that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoints.identify import CheckpointError
from ..checkpoints.transformer_keys import Shape
from .files import read_lora, read_lora_file
from .live import LiveLora

# Names of weights in a report.
_SHOWN = 3


def read_live_lora(path: Path, shapes: Mapping[str, Shape]) -> tuple[LiveLora, str]:
    """A LoRA file for single tokens of a transformer with weights of these shapes, and a report.

    Raises CheckpointError where it does not fit, or changes nothing that single tokens have.
    """
    tensors, metadata = read_lora_file(path)
    updates, _, report = read_lora(tensors, shapes, path.name, None, metadata)
    lora = LiveLora(updates)
    if not lora.names:
        raise CheckpointError(
            f"{path.name} changes only weights that act on all tokens at once "
            f"({_some(lora.left_out)}), so it cannot act in a region. Apply it to the whole image, "
            "with Load Krea 2 LoRA (in Python load_loras)."
        )
    text = str(report)
    if lora.left_out:
        text += f"\nnot used in a region: {_some(lora.left_out)}, of all tokens at once"
    return lora, text


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
