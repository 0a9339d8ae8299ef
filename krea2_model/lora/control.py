"""Control LoRAs: pictures that follow a control image, such as outlines, depth or a pose.

With control channels the input layer becomes `first(x) + s W c`: x are patches of the image, c
those of the control image's latents, W the columns of the file that read them, s the strength. A
LoRA of the blocks acts with the same strength on tokens of text and image, and never on references.
Image columns and bias of a whole input layer in the file were trained with the others: at strength
1 they stand in place of the model's own, at another in between.

With reference tokens the control image is a reference, and the LoRA acts on all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.identify import CheckpointError
from ..checkpoints.transformer_keys import Shape
from .control_files import CHANNELS, FORMS, REFERENCES, control_form, input_part, is_widened
from .files import LoraReport, read_lora, read_lora_file
from .live import LiveLora
from .names import UNKNOWN_NAME
from .updates import Update

AUTO = "auto"


@dataclass(frozen=True)
class ControlLora:
    """A control LoRA for one transformer.

    form: `CHANNELS` or `REFERENCES`. projection: (width, channels), the columns of the input layer
    that read the control image; None with reference tokens. updates: of the transformer's weights.
    """

    name: str
    form: str
    updates: Mapping[str, list[Update]]
    report: LoraReport
    projection: Tensor | None = None

    @cached_property
    def live(self) -> LiveLora:
        """The LoRA beside the projection, to be applied during calls."""
        return LiveLora(self.updates)

    def __str__(self) -> str:
        lines = [f"a control LoRA with {self.form}"]
        if self.report.matched:
            lines += str(self.report).splitlines()
        if self.live.left_out:
            lines.append(f"left out, of no single token: {', '.join(self.live.left_out[:3])}")
        return "\n".join(lines)


def read_control_lora(path: Path, shapes: Mapping[str, Shape], form: str = AUTO) -> ControlLora:
    """Read a control LoRA file for a transformer with weights of these shapes.

    form: "auto" tells it by the tensors or the name; `CHANNELS` and `REFERENCES` insist.
    Raises CheckpointError for another kind of file, and for a control LoRA of another model.
    """
    tensors, metadata = read_lora_file(path)
    return control_lora(tensors, shapes, path.name, metadata, form)


def control_lora(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    name: str = "control LoRA",
    metadata: Mapping[str, str] | None = None,
    form: str = AUTO,
) -> ControlLora:
    """`read_control_lora` of tensors."""
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    form = form_of(sizes, name, metadata, form)
    if form == REFERENCES:
        updates, _, report = read_lora(tensors, shapes, name, metadata=metadata)
        return ControlLora(name, form, updates, report)
    inputs: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        part = input_part(key)
        if part is None:
            others[_peft_name(key)] = tensor
        else:
            inputs[part] = tensor
    projection, changes = _input_layer(inputs, shapes["first.weight"], name)
    updates, report = {}, LoraReport(name)
    if others:
        updates, _, report = read_lora(others, shapes, name, metadata=metadata)
    _check_fit(report, name)
    updates |= {change.weight: [change] for change in changes}
    values = (projection, *(part for change in changes for part in change.parts.values()))
    if not all(torch.isfinite(part).all() for part in values):
        raise CheckpointError(
            f"{name} holds NaN or infinity in its input layer. Download it again."
        )
    return ControlLora(name, form, updates, report, projection)


def form_of(
    shapes: Mapping[str, Shape], name: str, metadata: Mapping[str, str] | None, form: str = AUTO
) -> str:
    """The form of a control LoRA by the shapes of its tensors.

    Raises CheckpointError for a plain LoRA, and where `form` asks for another one.
    """
    if form not in (AUTO, *FORMS):
        raise ValueError(f"form is {form!r}; expected one of {', '.join((AUTO, *FORMS))}.")
    if form == AUTO:
        found = control_form(shapes, name, metadata)
        if found is None:
            raise CheckpointError(
                f"{name} is no control LoRA: it does not widen the input layer, and its name does "
                "not say that it was trained with control images as references. Apply a plain LoRA "
                f"with Load Krea 2 LoRA (krea2: --lora), or choose form {REFERENCES!r}."
            )
        return found
    if (form == CHANNELS) != is_widened(shapes):
        does = "does not widen" if form == CHANNELS else "widens"
        other = REFERENCES if form == CHANNELS else CHANNELS
        raise CheckpointError(
            f"{name} {does} the input layer, so its form is not {form!r}. Choose {other!r} or "
            f"{AUTO!r}."
        )
    return form


def _check_fit(report: LoraReport, name: str) -> None:
    """Refuse a LoRA of the blocks that fits in part: nothing was trained to follow half of it."""
    for key, reason in report.unmatched.items():
        if reason != UNKNOWN_NAME:
            raise CheckpointError(
                f"{name} is a control LoRA of another model: {key} does not fit ({reason})."
            )


def _input_layer(
    parts: Mapping[str, Tensor], shape: Shape, name: str
) -> tuple[Tensor, list[Update]]:
    """The columns of the control image (width, channels); changes of the image's, and of the bias.

    parts: of the input layer, by `INPUT_PARTS`. shape: of the model's own weight.
    """
    width, channels = shape
    changes, scale = [], 1.0
    if "down" in parts:
        if "up" not in parts:
            raise CheckpointError(
                f"{name} holds half a LoRA of the input layer. Download it again."
            )
        down, up = parts["down"], parts["up"]
        _check_sides(up.shape[0], down.shape[1], width, channels, name)
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        image = {"up": up, "down": down[:, :channels].contiguous()}
        changes.append(Update("first.weight", "lora", image, alpha))
        scale = changes[0].scale
        projection = scale * (up.float() @ down[:, channels:].float())
    else:
        kind, whole = ("diff", parts["diff"]) if "diff" in parts else ("set", parts["weight"])
        _check_sides(whole.shape[0], whole.shape[1], width, channels, name)
        image = {kind: whole[:, :channels].contiguous()}
        changes.append(Update("first.weight", kind, image))
        projection = whole[:, channels:].float().contiguous()
    for part, kind, factor in _BIASES:
        if part in parts:
            if tuple(parts[part].shape) != (width,):
                raise CheckpointError(
                    f"{name} is a control LoRA of another model: the bias of its input layer has "
                    f"the shape {tuple(parts[part].shape)}; this model needs ({width},)."
                )
            value = parts[part].float() * (scale if factor else 1.0)
            changes.append(Update("first.bias", kind, {kind: value}))
            break
    return projection, changes


# Parts of the input layer that say its bias, by the kind of update, and whether the scale of a LoRA
# counts there.
_BIASES = (("bias", "set", False), ("bias change", "diff", False), ("up bias", "diff", True))


def _check_sides(rows: int, columns: int, width: int, channels: int, name: str) -> None:
    if (rows, columns) != (width, 2 * channels):
        raise CheckpointError(
            f"{name} is a control LoRA of another model: its input layer has width {rows} and "
            f"{columns} channels; this model needs width {width} and {2 * channels} channels "
            f"({channels} of the image, {channels} of the control image)."
        )


def _peft_name(key: str) -> str:
    """`blocks.0.attn.wq.A` as `blocks.0.attn.wq.lora_A.weight`; other names as they are."""
    layer, _, part = key.rpartition(".")
    return f"{layer}.lora_{part}.weight" if part in ("A", "B") and layer else key
