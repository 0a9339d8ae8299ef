"""LoRA files of every style in circulation: changes to our weights, and what did not match.

A file is a set of tensors; their names say which layer they change and how (`names`).
`read_lora` sorts them into `Update`s by the module's own weight names, and a `LoraReport` of the
rest.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.identify import LORA, CheckpointError, identify, read_header
from ..checkpoints.storage import read_safetensors, without_compile
from ..checkpoints.transformer_keys import Shape
from ..checks import counted
from .control_files import is_widened
from .edit_family import EditFamily, read_family
from .few_steps import FULL_STRENGTH, read_steps
from .names import UNKNOWN_NAME, Target, Targets, TextTargets, split_key, strip_prefix, text_layer
from .scale import ADAPTER_CONFIG, HeaderScale, read_header_scale
from .updates import Update

_COMPLETE = {
    frozenset(("down", "up")): "lora",
    frozenset(("w1", "w2")): "lokr",
    frozenset(("w1_a", "w1_b", "w2")): "lokr",
    frozenset(("w1", "w2_a", "w2_b")): "lokr",
    frozenset(("w1_a", "w1_b", "w2_a", "w2_b")): "lokr",
    frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")): "loha",
    frozenset(("a1", "a2", "b1", "b2")): "glora",
    frozenset(("oft_blocks",)): "oft",
    frozenset(("oft_blocks", "rescale")): "oft",
    frozenset(("diff",)): "diff",
    frozenset(("set",)): "set",
}
# Parts that are multiplied: the columns of the first are the rows of the second.
_FACTORS = (
    ("up", "down"),
    ("w1_a", "w1_b"),
    ("w2_a", "w2_b"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
)
_KINDS = {
    "lora": "LoRA",
    "lokr": "LoKr",
    "loha": "LoHa",
    "diff": "full differences",
    "set": "full weights",
    "oft": "OFT",
    "boft": "BOFT",
    "glora": "GLoRA",
}
_ROTATIONS = ("oft", "boft")
# No trained change comes near; what does makes weights infinite, or pictures noise.
_LARGEST = 1e8
_TEXT = "a text encoder"
_MISFIT = "its matrices do not fit together"


@dataclass
class LoraReport:
    """The kind of a LoRA file, and which of its tensors match weights of the model.

    matched: number of the model's weights that have an update; text_matched: of the text encoder's.
    idle: weights whose update changes nothing, since it is zeros or has alpha 0.
    scales: multipliers of its matrices; scale_sources: the settings that give them.
    unmatched: names of tensors that change nothing, with the reason.
    steps: of a few-step LoRA, else None.
    edit: the family of an edit LoRA, or None where nothing tells one.
    """

    name: str
    family: str = "unknown"
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    matched: int = 0
    text_matched: int = 0
    unmatched: dict[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    scale_sources: tuple[str, ...] = ()
    steps: int | None = None
    edit: EditFamily | None = None

    @property
    def is_complete(self) -> bool:
        """True if every tensor of the file matches a weight and changes it."""
        return not self.unmatched and not self.idle

    def __str__(self) -> str:
        rank = f", {_span('rank', self.ranks)}" if self.ranks else ""
        lines = [
            f"{self.name}: {' and '.join(self.kinds) or 'nothing'} of {self.family}{rank}",
            f"{counted(self.matched, 'weight')} of the transformer matched"
            + (f", {self.text_matched} of the text encoder" if self.text_matched else ""),
        ]
        if self.scales:
            sources = " and ".join(self.scale_sources)
            lines.append(f"{_span('scale', self.scales)} ({sources})")
        if self.steps is not None:
            lines.append(
                f"a few-step LoRA: preset auto takes {self.steps} steps without guidance, at a "
                f"strength from {FULL_STRENGTH}"
            )
        if self.edit is not None and self.edit.is_edit:
            lines.append(f"an edit LoRA, {self.edit}: for Krea 2 Edit")
        if self.idle:
            count = len(self.idle)
            part = "all" if count == self.matched + self.text_matched else f"{count}"
            shown = f"{', '.join(self.idle[:3])}{f' and {count - 3} more' if count > 3 else ''}"
            lines.append(f"does nothing to {part} of them: zeros, or alpha 0 ({shown})")
        reasons = defaultdict(list)
        for name, reason in self.unmatched.items():
            reasons[reason].append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left out: {', '.join(names[:3])}{more} ({reason})")
        return "\n".join(lines)


def _span(word: str, values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return f"{word} {least:g}" if least == most else f"{word}s {least:g} to {most:g}"


def read_lora_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's texts of a LoRA file.

    The configuration that PEFT saves beside `adapter_model.safetensors` counts as one of its texts.
    Raises CheckpointError where the file is broken or something else.
    """
    read_header(path)
    tensors, metadata = read_safetensors(path)
    config = path.with_name(ADAPTER_CONFIG)
    if path.name == "adapter_model.safetensors" and config.is_file():
        try:
            metadata = {ADAPTER_CONFIG: config.read_text(encoding="utf-8"), **metadata}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{config} cannot be read ({error}).") from error
    return tensors, metadata


def read_lora(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    name: str = "LoRA",
    text_shapes: Mapping[str, Shape] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[str, list[Update]], dict[str, list[Update]], LoraReport]:
    """Sort a LoRA's tensors by the weights they change.

    shapes: of the transformer's weights by module name; text_shapes: of the text encoder's.
    metadata: of the file's header, for the scale where no tensor gives it.
    Returns updates of the transformer, updates of the text encoder, and the report. Raises
    CheckpointError where nothing matches, and where the file holds NaN, infinity or numbers that no
    weight can take.
    """
    if is_widened({key: tuple(tensor.shape) for key, tensor in tensors.items()}):
        raise CheckpointError(
            f"{name} is a control LoRA, which needs a control image; expected a plain LoRA. Use it "
            "with Krea 2 Control LoRA (in Python with the argument control)."
        )
    report = LoraReport(name, steps=read_steps(name, metadata), edit=read_family(name, metadata))
    headers = [
        read_header_scale(metadata or {}, name, part) for part in ("transformer", "text_encoder")
    ]
    models = (Targets(shapes), TextTargets(text_shapes or {}))
    layers, keys = _layers(tensors, models, report)
    changes: tuple[dict[str, list[Update]], ...] = ({}, {})
    idle: tuple[set[str], ...] = (set(), set())
    families, kinds, ranks, scales, sources = [], set(), set(), set(), set()
    for layer, parts in layers.items():
        which, bare, family = _place(layer[0], models)
        targets = models[which].find(bare)
        header = headers[which]
        if header is not None and header.kohya_names and not _is_kohya(keys[layer].values()):
            header = None
        updates, reason = _updates(parts, targets, models[which].shapes, header, bare)
        for update in updates:
            kinds.add(_KINDS[update.kind] + (" with DoRA" if update.magnitude is not None else ""))
            if update.rank:
                ranks.add(update.rank)
        if updates:
            families.append(family)
        if updates and all(u.largest_change == 0 for u in updates):
            idle[which].update(update.weight for update in updates)
            continue
        if any(update.weight in changes[which] for update in updates):
            # Added twice, a file saved under two prefixes would count double.
            updates, reason = [], "the same layer is there under another name, and counts once"
        if not updates:
            report.unmatched |= dict.fromkeys(keys[layer].values(), reason)
            continue
        for update in updates:
            _check_numbers(update, keys[layer], name)
            changes[which].setdefault(update.weight, []).append(update)
            if update.rank or update.header_scale is not None:
                scales.add(update.scale)
                sources.add(_source(update, header))
        if updates[0].kind == "oft" and "rescale" in parts:
            report.unmatched[keys[layer]["rescale"]] = "ComfyUI leaves it out of OFT, and so do we"
    report.family = max(set(families), key=families.count) if families else "unknown"
    report.kinds, report.ranks = tuple(sorted(kinds)), tuple(sorted(ranks))
    report.scales, report.scale_sources = tuple(sorted(scales)), tuple(sorted(sources))
    report.matched, report.text_matched = (
        len(changed.keys() | same) for changed, same in zip(changes, idle, strict=True)
    )
    report.idle = (*sorted(idle[0] - changes[0].keys()), *sorted(idle[1] - changes[1].keys()))
    if not report.matched and not report.text_matched:
        raise _nothing_fits(tensors, report)
    return changes[0], changes[1], report


def _nothing_fits(tensors: Mapping[str, Tensor], report: LoraReport) -> ValueError:
    # A file with parts of a LoRA is one; the kind of another takes all its names.
    is_lora = any(reason != UNKNOWN_NAME for reason in report.unmatched.values())
    kind = LORA if is_lora else identify(tensors)
    if LORA not in kind.split(" with ") and "unknown" not in kind:
        return CheckpointError(
            f"{report.name} is {kind}; expected a LoRA that was trained for Krea 2."
        )
    examples = ", ".join(list(tensors)[:3]) or "none"
    reasons = sorted(set(report.unmatched.values()))
    return CheckpointError(
        f"{report.name} changes nothing in this model: none of its "
        f"{counted(len(tensors), 'tensor')} (such as {examples}) "
        f"fits{': ' + '; '.join(reasons[:3]) if reasons else ''}. Choose a LoRA that was trained "
        "for Krea 2."
    )


def _place(layer: str, models: tuple[Targets, Targets]) -> tuple[bool, str, str]:
    """True for a layer of the text encoder; its bare name; the trainer that writes it so."""
    text = text_layer(layer)
    return (False, *strip_prefix(layer, models[0])) if text is None else (True, text, _TEXT)


# A layer's name and the adapter's, where a file holds several.
_Layer = tuple[str, str]


def _layers(
    tensors: Mapping[str, Tensor], models: tuple[Targets, Targets], report: LoraReport
) -> tuple[dict[_Layer, dict[str, Tensor]], dict[_Layer, dict[str, str]]]:
    """Parts of the layers that a model has, and the names they have in the file.

    The report has the others, which may be many.
    """
    layers: dict[_Layer, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[_Layer, dict[str, str]] = defaultdict(dict)
    missing: dict[str, str] = {}
    for key, tensor in tensors.items():
        if key.endswith("_scale") and key[: -len("_scale")] in tensors:
            continue  # a multiplier beside a matrix in 8 bits
        name, part, adapter, reason = split_key(key)
        if part is None:
            report.unmatched[key] = reason
            continue
        if "_orig_mod" in name:
            name = without_compile(name)
        if name in missing:
            report.unmatched[key] = missing[name]
            continue
        layer = (name, adapter)
        if layer not in layers:
            which, bare, _ = _place(name, models)
            if not models[which].find(bare):
                report.unmatched[key] = missing[name] = models[which].why_not(bare)
                continue
        if part in layers[layer]:
            report.unmatched[key] = "the same part is there under another name"
            continue
        if tensor.element_size() < 2 and (scale := tensors.get(f"{key}_scale")) is not None:
            tensor = _scaled(tensor, scale)
        layers[layer][part], keys[layer][part] = tensor, key
    for layer, parts in list(layers.items()):
        # Alpha and magnitude may stand without the adapter's name that the matrices have.
        beside = layers.get((layer[0], "")) if layer[1] else None
        if beside and beside.keys() <= {"alpha", "magnitude"}:
            layers[layer] = {**beside, **parts}
            keys[layer] = {**keys[layer[0], ""], **keys[layer]}
    named = {layer for layer, adapter in layers if adapter}
    for layer in [n for n in layers if not n[1] and n[0] in named]:
        if layers[layer].keys() <= {"alpha", "magnitude"}:
            del layers[layer], keys[layer]
    return layers, keys


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """A matrix in 8 bits by its multiplier; as it is where that does not fit."""
    if scale.numel() not in (1, tensor.shape[0] if tensor.ndim else 1):
        return tensor
    multiplier = scale.float().reshape(-1, *[1] * (tensor.ndim - 1)) if scale.numel() > 1 else scale
    return tensor.float() * multiplier


def _updates(
    parts: Mapping[str, Tensor],
    targets: Iterable[Target],
    shapes: Mapping[str, Shape],
    header: HeaderScale | None,
    bare: str,
) -> tuple[list[Update], str]:
    """The updates of a layer from its tensors, or the reason why there are none."""
    parts, targets = dict(parts), list(targets)
    alpha = parts.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        return [], f"alpha has shape {tuple(alpha.shape)}; expected one number"
    for tensor in parts.values():
        if not tensor.is_floating_point():
            stored = str(tensor.dtype).removeprefix("torch.")
            return [], f"stored as {stored} without a scale, which are no numbers of a LoRA"
    bias, magnitude = parts.pop("bias", None), parts.pop("magnitude", None)
    updates = []
    if parts:
        kind = _COMPLETE.get(frozenset(parts))
        if kind is None:
            return [], f"incomplete: only {', '.join(sorted(parts))} of a layer"
        if kind == "oft":
            blocks = parts["oft_blocks"]
            if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
                return [], f"OFT blocks of shape {tuple(blocks.shape)}; expected square ones"
            if blocks.ndim == 4:
                kind = "boft"
            else:
                # ComfyUI reads no rescale here; the report says so.
                parts.pop("rescale", None)
        if magnitude is not None:
            parts["magnitude"] = magnitude
        number = None if alpha is None else float(alpha)
        updates = [Update(t.weight, kind, parts, number, t.rows, t.fused) for t in targets]
        if reason := _misfit(updates, shapes):
            return [], reason
        if header is not None and alpha is None:
            names = (bare, *targets[0].spellings)
            scale = header.scale(kind, updates[0].rank, names)
            updates = [replace(update, header_scale=scale) for update in updates]
    if bias is not None:
        name = re.sub(r"\.weight$", ".bias", targets[0].weight)
        if len(targets) > 1 or tuple(bias.shape) != shapes.get(name):
            return [], "the layer has no such bias"
        updates.append(Update(name, "diff", {"diff": bias}))
    return updates, "a number without matrices" if not updates else ""


def _misfit(updates: list[Update], shapes: Mapping[str, Shape]) -> str:
    """The reason why a layer's updates do not fit its weights; empty if they do."""
    first = updates[0]
    matrices = [t for name, t in first.parts.items() if name not in ("diff", "set", "rescale")]
    if any(t.numel() == 0 or t.ndim < 2 for t in matrices if t is not first.magnitude):
        return _MISFIT
    if first.kind in ("oft", "boft", "glora") and (first.fused or first.magnitude is not None):
        beside = "of a fused layer" if first.fused else "with DoRA"
        return f"{_KINDS[first.kind]} {beside} is not supported: merge it in its trainer"
    try:
        made_for = first.shape()
    except (ValueError, IndexError):
        return _MISFIT
    parts = first.parts
    for left, right in _FACTORS:
        if {left, right} <= parts.keys() and parts[left].shape[1] != parts[right].shape[0]:
            return _MISFIT
    weight_shapes = [shapes[update.weight] for update in updates]
    rows = sum(shape[0] for shape in weight_shapes)
    layer_shape = (rows, *weight_shapes[0][1:])
    magnitude, over_columns = first.magnitude, first.over_columns
    if magnitude is not None and len(layer_shape) < 2:
        return "a magnitude (DoRA) for a vector, which has none"
    if magnitude is not None and magnitude.numel() != layer_shape[1 if over_columns else 0]:
        return f"a magnitude of {magnitude.numel()} for a layer of {_times(layer_shape)}"
    if first.kind in _ROTATIONS:
        if made_for[0] != rows:
            return f"made for {made_for[0]} outputs, the layer has {rows}"
    # A table may be stored as (6, F) or (6 F); matrices have to agree in both sides.
    elif math.prod(made_for) != math.prod(layer_shape) or (
        len(layer_shape) > 1 and made_for[0] != layer_shape[0]
    ):
        return f"made for {_times(made_for)}, the layer is {_times(layer_shape)}"
    return "" if all(_can_be_applied(update, shapes) for update in updates) else _MISFIT


def _can_be_applied(update: Update, shapes: Mapping[str, Shape]) -> bool:
    """True if an update's arithmetic works on tensors of these shapes, tried on meta."""

    def hollow(shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), device="meta")

    parts = {name: hollow(tensor.shape) for name, tensor in update.parts.items()}
    weight = hollow(shapes[update.weight])
    try:
        norm = hollow((1, *weight.shape[1:])) if update.needs_fused_weights else None
        return update.with_parts(parts).apply(weight, 0.5, norm).shape == weight.shape
    except (RuntimeError, ValueError, IndexError):
        return False


def _check_numbers(update: Update, keys: Mapping[str, str], name: str) -> None:
    """Refuse what would make a weight infinite, before any is changed."""
    largest = update.largest_change
    if largest <= _LARGEST and (update.kind not in _ROTATIONS or largest <= 1):
        return
    where = ", ".join(list(keys.values())[:2])
    if math.isfinite(largest):
        problem = f"changes {update.weight} by up to {largest:.3g}, which no weight can take"
    else:
        problem = f"holds NaN, infinity or numbers too large to multiply for {update.weight}"
    raise CheckpointError(
        f"{name} {problem} (in {where}). Nothing was changed. Train or save it again, or choose "
        "another LoRA."
    )


def _is_kohya(keys: Iterable[str]) -> bool:
    return any(key.endswith((".lora_down.weight", ".lora_up.weight")) for key in keys)


def _source(update: Update, header: HeaderScale | None) -> str:
    if update.header_scale is not None and header is not None:
        return header.source
    return "alpha in the file" if update.alpha is not None else "the file names no alpha"


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
