"""LoRA files of every style in circulation: changes to our weights, and what did not match.

A file is a set of tensors; their names say which layer they change (in one of many spellings, see
`Targets`) and how (`_PARTS`). `read_lora` sorts them into `Update`s by the module's own weight
names, and a `LoraReport` of the rest.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .identify import LORA, CheckpointError, identify, read_header
from .lora_updates import Update
from .storage import read_safetensors
from .transformer_keys import Shape, module_to_official, official_to_diffusers

# Endings of names and the part of an update they hold. Longer endings come first.
_PARTS = (
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    (".lora_A", "down"),
    (".lora_B", "up"),
    (".lora_magnitude_vector.default.weight", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    (".dora_scale", "magnitude"),
    (".alpha", "alpha"),
    (".lokr_w1_a", "w1_a"),
    (".lokr_w1_b", "w1_b"),
    (".lokr_w2_a", "w2_a"),
    (".lokr_w2_b", "w2_b"),
    (".lokr_w1", "w1"),
    (".lokr_w2", "w2"),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".diff_b", "bias"),
    (".b_norm", "bias"),
    (".diff", "diff"),
    (".w_norm", "diff"),
    (".set_weight", "set"),
)
# Endings that are recognised in order to say that they are not supported.
_UNSUPPORTED = {
    ".lora_mid.weight": "the middle matrix of a convolution",
    ".lokr_t2": "a Tucker core, which only convolutions have",
    ".hada_t1": "a Tucker core, which only convolutions have",
    ".hada_t2": "a Tucker core, which only convolutions have",
    ".oft_blocks": "OFT is not supported",
    ".oft_diag": "OFT is not supported",
    ".oft_R.weight": "OFT is not supported",
    ".a1.weight": "GLoRA is not supported",
    ".a2.weight": "GLoRA is not supported",
    ".b1.weight": "GLoRA is not supported",
    ".b2.weight": "GLoRA is not supported",
    ".lora_A.bias": "a bias inside a LoRA is not supported",
    ".lora_B.bias": "a bias inside a LoRA is not supported",
    ".reshape_weight": "a LoRA that widens a layer is not supported",
}
_COMPLETE = {
    frozenset(("down", "up")): "lora",
    frozenset(("w1", "w2")): "lokr",
    frozenset(("w1_a", "w1_b", "w2")): "lokr",
    frozenset(("w1", "w2_a", "w2_b")): "lokr",
    frozenset(("w1_a", "w1_b", "w2_a", "w2_b")): "lokr",
    frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")): "loha",
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
_KINDS = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "diff": "full differences",
          "set": "full weights"}  # fmt: skip

# What trainers put before the name of a layer, and who does.
_PREFIXES = (
    ("lora_unet_", "kohya or musubi-tuner"),
    ("lora_transformer_", "OneTrainer"),
    ("lora_", "older trainers"),
    ("lycoris_", "LyCORIS"),
    ("base_model.model.", "PEFT"),
    ("model.diffusion_model.", "ComfyUI"),
    ("diffusion_model.", "ai-toolkit or ComfyUI"),
    ("transformer.", "diffusers PEFT"),
    ("transformer_", "diffusers PEFT"),
    ("unet.", "older trainers"),
    ("unet_", "older trainers"),
)
_TEXT_PREFIXES = (
    "text_encoders.qwen3vl_4b.transformer.",
    "text_encoders.",
    "text_encoder.",
    "base_model.model.text_encoder.",
    "lora_te1_",
    "lora_te_",
    "lycoris_te_",
    "qwen3vl_4b.transformer.",
    "te.",
)

# Layers that some trainers fuse: their rows are those of the parts, one after the other.
_FUSED = (("attn.to_qkv", ("attn.wq", "attn.wk", "attn.wv")),
          ("attn.qkv", ("attn.wq", "attn.wk", "attn.wv")))  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A weight, and which rows of an update's are its own (all where `rows` is None)."""

    weight: str
    rows: tuple[int, int] | None = None
    fused: tuple[str, ...] = ()


@dataclass
class LoraReport:
    """What a LoRA file is and which of its tensors found their place.

    matched: weights of the model that change; text_matched: of the text encoder.
    unmatched: names of tensors that change nothing, and why.
    """

    name: str
    family: str = "unknown"
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    matched: int = 0
    text_matched: int = 0
    unmatched: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rank = ""
        if self.ranks:
            least, most = min(self.ranks), max(self.ranks)
            rank = f", rank {least}" if least == most else f", ranks {least} to {most}"
        lines = [
            f"{self.name}: {' and '.join(self.kinds) or 'nothing'} of {self.family}{rank}",
            f"{self.matched} weights of the transformer matched"
            + (f", {self.text_matched} of the text encoder" if self.text_matched else ""),
        ]
        reasons = defaultdict(list)
        for name, reason in self.unmatched.items():
            reasons[reason].append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left out: {', '.join(names[:3])}{more} ({reason})")
        return "\n".join(lines)


class Targets:
    """The names that LoRA files may use for the weights of a transformer.

    shapes: of the model's weights, by the module's own names (`blocks.0.attn.wq.weight`).
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = dict(shapes)
        self._targets: dict[str, tuple[Target, ...]] = {}
        for weight in shapes:
            official = module_to_official(weight)
            for name in (official, official_to_diffusers(official)):
                self._targets[_key(name.removesuffix(".weight"))] = (Target(weight),)
            # Saved from our module itself, as some trainers do.
            self._targets.setdefault(_key(weight.removesuffix(".weight")), (Target(weight),))
        for fused, parts in _FUSED:
            for query in [name for name in shapes if name.endswith(f"{parts[0]}.weight")]:
                block = query.removesuffix(f"{parts[0]}.weight")
                weights = tuple(f"{block}{part}.weight" for part in parts)
                if not all(weight in shapes for weight in weights):
                    continue
                targets, start = [], 0
                for weight in weights:
                    end = start + shapes[weight][0]
                    targets.append(Target(weight, (start, end), weights))
                    start = end
                for name in (block, official_to_diffusers(f"{block}x").removesuffix("x")):
                    self._targets[_key(f"{name}{fused}")] = tuple(targets)

    def find(self, name: str) -> tuple[Target, ...]:
        """The weights that a layer's bare name stands for; none where there is no such layer."""
        return self._targets.get(_key(name), ())


def _key(name: str) -> str:
    return name.replace(".", "_")


def read_lora_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file. Raises CheckpointError where it is broken or something else."""
    read_header(path)
    return read_safetensors(path)[0]


def read_lora(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    name: str = "LoRA",
    text_shapes: Mapping[str, Shape] | None = None,
) -> tuple[dict[str, list[Update]], dict[str, list[Update]], LoraReport]:
    """Sort a LoRA's tensors by the weights they change.

    shapes: of the transformer's weights by module name; text_shapes: of the text encoder's.
    Returns updates of the transformer, updates of the text encoder, and the report. Raises
    CheckpointError where nothing matches.
    """
    report = LoraReport(name)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    endings: dict[tuple[str, str], str] = {}
    for key, tensor in tensors.items():
        base, part = _split(key)
        if part is None:
            report.unmatched[key] = base
        elif part in layers[base]:
            report.unmatched[key] = "the same part is there under another name"
        else:
            layers[base][part] = tensor
            endings[base, part] = key
    models = (Targets(shapes), TextTargets(text_shapes or {}))
    found: tuple[dict[str, list[Update]], ...] = ({}, {})
    families, kinds, ranks = [], set(), set()
    for base, parts in layers.items():
        text, bare, family = _text_layer(base) or (False, *_strip(base, models[0]))
        targets = models[text].find(bare)
        keys = [endings[base, part] for part in parts]
        if not targets:
            reason = _why_not(bare, text, models[text])
            report.unmatched |= dict.fromkeys(keys, reason)
            continue
        updates, reason = _updates(parts, targets, models[text].shapes)
        if not updates:
            report.unmatched |= dict.fromkeys(keys, reason)
            continue
        families.append(family)
        for update in updates:
            found[text].setdefault(update.weight, []).append(update)
            kinds.add(_KINDS[update.kind] + (" with DoRA" if update.magnitude is not None else ""))
            if update.rank:
                ranks.add(update.rank)
    report.family = max(set(families), key=families.count) if families else "unknown"
    report.kinds, report.ranks = tuple(sorted(kinds)), tuple(sorted(ranks))
    report.matched, report.text_matched = len(found[0]), len(found[1])
    if not found[0] and not found[1]:
        kind = identify(tensors)
        if LORA not in kind.split(" with ") and "unknown" not in kind:
            raise CheckpointError(f"{name} is {kind}; expected a LoRA that was trained for Krea 2.")
        examples = ", ".join(list(tensors)[:3]) or "none"
        reasons = sorted(set(report.unmatched.values()))
        raise CheckpointError(
            f"{name} changes nothing in this model: none of its {len(tensors)} tensors (such as "
            f"{examples}) fits{': ' + '; '.join(reasons[:3]) if reasons else ''}. Choose a LoRA "
            "that was trained for Krea 2."
        )
    return found[0], found[1], report


class TextTargets(Targets):
    """The names that LoRA files may use for the weights of the text encoder."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = dict(shapes)
        self._targets = {}
        for weight in shapes:
            bare = weight.removesuffix(".weight")
            for before in ("", "model.", "model.language_model.", "language_model."):
                self._targets[_key(before + bare)] = (Target(weight),)


def _split(key: str) -> tuple[str, str | None]:
    """A tensor's layer and part; without a part, the reason why it is left out."""
    for ending, reason in _UNSUPPORTED.items():
        if key.endswith(ending):
            return reason, None
    for ending, part in _PARTS:
        if key.endswith(ending):
            return key[: -len(ending)], part
    return "not a name that any trainer is known to write", None


def _text_layer(base: str) -> tuple[bool, str, str] | None:
    for prefix in _TEXT_PREFIXES:
        if base.startswith(prefix):
            return True, base[len(prefix) :], "a text encoder"
    return None


def _strip(base: str, targets: Targets) -> tuple[str, str]:
    """A layer's name without what trainers put before it, and who does.

    A prefix may also be the beginning of a layer's name (`transformer_blocks`), so the first form
    that names a layer counts; without one, the shortest.
    """
    family, bare = "", base
    while not targets.find(bare):
        for prefix, writer in _PREFIXES:
            if bare.startswith(prefix):
                family, bare = family or writer, bare[len(prefix) :]
                break
        else:
            break
    return bare, family or "bare names"


def _why_not(bare: str, text: bool, targets: Targets) -> str:
    if text and not targets.shapes:
        return "a layer of the text encoder, and none is connected"
    if text:
        return "the text encoder has no such layer"
    number = re.match(r"(?:transformer_)?blocks[._](\d+)", bare)
    blocks = {int(m[1]) for n in targets.shapes if (m := re.match(r"blocks\.(\d+)\.", n))}
    if number and blocks and int(number[1]) > max(blocks):
        return f"this model has {max(blocks) + 1} blocks"
    return "this model has no such layer"


def _updates(
    parts: Mapping[str, Tensor], targets: Iterable[Target], shapes: Mapping[str, Shape]
) -> tuple[list[Update], str]:
    """The updates that a layer's tensors are, or why they are none."""
    parts, targets = dict(parts), list(targets)
    alpha = parts.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        return [], f"alpha has shape {tuple(alpha.shape)}; expected one number"
    bias, magnitude = parts.pop("bias", None), parts.pop("magnitude", None)
    updates = []
    if parts:
        kind = _COMPLETE.get(frozenset(parts))
        if kind is None:
            return [], f"incomplete: only {', '.join(sorted(parts))} of a layer"
        if magnitude is not None:
            parts["magnitude"] = magnitude
        number = None if alpha is None else float(alpha)
        updates = [Update(t.weight, kind, parts, number, t.rows, t.fused) for t in targets]
        if reason := _misfit(updates, shapes):
            return [], reason
    if bias is not None:
        name = re.sub(r"\.weight$", ".bias", targets[0].weight)
        if len(targets) > 1 or tuple(bias.shape) != shapes.get(name):
            return [], "the layer has no such bias"
        updates.append(Update(name, "diff", {"diff": bias}))
    return updates, "a number without matrices" if not updates else ""


def _misfit(updates: list[Update], shapes: Mapping[str, Shape]) -> str:
    """Why a layer's updates do not fit its weights; empty where they do."""
    matrices = [t for name, t in updates[0].parts.items() if name not in ("diff", "set")]
    if any(t.numel() == 0 or t.ndim < 2 for t in matrices if t is not updates[0].magnitude):
        return "its matrices do not fit together"
    try:
        found = updates[0].shape()
    except (ValueError, IndexError):
        return "its matrices do not fit together"
    parts = updates[0].parts
    for first, second in _FACTORS:
        if {first, second} <= parts.keys() and parts[first].shape[1] != parts[second].shape[0]:
            return "its matrices do not fit together"
    wanted = [shapes[update.weight] for update in updates]
    rows = sum(shape[0] for shape in wanted)
    whole = (rows, *wanted[0][1:])
    magnitude, over_columns = updates[0].magnitude, updates[0].over_columns
    if magnitude is not None and magnitude.numel() != whole[1 if over_columns else 0]:
        return f"a magnitude of {magnitude.numel()} for a layer of {_times(whole)}"
    # A table may be stored as (6, F) or (6 F); matrices have to agree in both sides.
    if math.prod(found) != math.prod(whole) or (len(whole) > 1 and found[0] != whole[0]):
        return f"made for {_times(found)}, the layer is {_times(whole)}"
    return ""


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
