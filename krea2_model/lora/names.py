"""Names inside LoRA files: which layer a tensor belongs to, and which part of an update it is.

Trainers spell both in many ways. `split_key` takes the part off the end of a name, `Targets` knows
the spellings of a model's layers, and `strip_prefix` takes off what stands before them.
`layer_in_files` is how our own files spell a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoints.transformer_keys import Shape, module_to_official, official_to_diffusers

# Endings of names and the part of an update they hold.
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    "lora_alpha": "alpha",
    "lokr_w1": "w1",
    "lokr_w1_a": "w1_a",
    "lokr_w1_b": "w1_b",
    "lokr_w2": "w2",
    "lokr_w2_a": "w2_a",
    "lokr_w2_b": "w2_b",
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "a1.weight": "a1",
    "a2.weight": "a2",
    "b1.weight": "b1",
    "b2.weight": "b2",
    "oft_blocks": "oft_blocks",
    "rescale": "rescale",
    "diff_b": "bias",
    "b_norm": "bias",
    "diff": "diff",
    "w_norm": "diff",
    "set_weight": "set",
}
UNKNOWN_NAME = "not a name that any trainer is known to write"
# How our own files may be spelled, after the trainers whose names they are.
DIFFUSERS = "diffusers"
KEY_STYLES = ("ai-toolkit", "kohya", DIFFUSERS)
# Groups of layers that adapters go beside.
TARGETS = ("blocks", "attention", "mlp", "blocks+text")

_CONVOLUTIONS = "a Tucker core, which only convolutions have"
# Endings that are recognised in order to say that they are not supported.
_UNSUPPORTED = {
    "lora_mid.weight": "the middle matrix of a convolution",
    "lokr_t2": _CONVOLUTIONS,
    "hada_t1": _CONVOLUTIONS,
    "hada_t2": _CONVOLUTIONS,
    "bm.weight": _CONVOLUTIONS,
    "oft_diag": "a diagonal OFT is not supported: merge it into the model in its trainer",
    "oft_R.weight": "PEFT's OFT is not supported: merge it into the model with PEFT",
    "lora_A.bias": "a bias inside a LoRA is not supported",
    "lora_B.bias": "a bias inside a LoRA is not supported",
    "reshape_weight": "a LoRA that widens a layer is not supported",
}
# Modules and parameters that PEFT keeps one of for each adapter, by the adapter's name.
_BY_ADAPTER = frozenset(("lora_A", "lora_B", "lora_magnitude_vector", "oft_R"))
_PARAMETER_BY_ADAPTER = _BY_ADAPTER | {n for n in _PARTS if n.startswith(("lokr_", "hada_"))}

# Prefixes before the name of a layer, and the trainers that write them.
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
    ("module.", "a distributed trainer"),
)
_WRITERS = dict(_PREFIXES)
_PREFIX = re.compile("|".join(map(re.escape, _WRITERS)))
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
_FUSED = (
    ("attn.to_qkv", ("attn.wq", "attn.wk", "attn.wv")),
    ("attn.qkv", ("attn.wq", "attn.wk", "attn.wv")),
)


class Key(NamedTuple):
    """A tensor's layer, its part of the update, and the adapter's name where the file has one.

    `reason` says why it has no part.
    """

    layer: str
    part: str | None
    adapter: str = ""
    reason: str = ""


def split_key(key: str) -> Key:
    """Take a tensor's name apart, however its trainer spells it."""
    pieces = key.rsplit(".", 3)
    if len(pieces) == 3 and (part := _PARTS.get(f"{pieces[1]}.{pieces[2]}")):
        # The names of most files, whose layers hold no dots.
        return Key(pieces[0], part)
    for length in range(min(3, len(pieces) - 1), 0, -1):
        ending = _read_ending(tuple(pieces[-length:]))
        if ending is not None:
            part, adapter, reason = ending
            return Key(".".join(pieces[:-length]), part, adapter, reason)
    # A matrix that is an attribute of its own beside its layer, as older diffusers named them.
    attribute = re.fullmatch(r"(.+)_lora\.(down|up)\.weight", key)
    if attribute:
        return Key(attribute[1], attribute[2])
    return Key(key, None, reason=UNKNOWN_NAME)


def _read_ending(pieces: tuple[str, ...]) -> tuple[str | None, str, str] | None:
    """(part, adapter, reason) of the last pieces of a name; None where they mean nothing."""
    forms = [(".".join(pieces), "")]
    if len(pieces) == 3 and pieces[0] in _BY_ADAPTER:
        forms.append((f"{pieces[0]}.{pieces[2]}", pieces[1]))
    if len(pieces) == 2 and pieces[0] in _PARAMETER_BY_ADAPTER:
        forms.append((pieces[0], pieces[1]))
    for ending, adapter in forms:
        if ending in _UNSUPPORTED:
            return None, adapter, _UNSUPPORTED[ending]
        if ending in _PARTS:
            return _PARTS[ending], adapter, ""
    return None


@dataclass(frozen=True)
class Target:
    """A weight, and which rows of an update's are its own (all where `rows` is None)."""

    weight: str
    rows: tuple[int, int] | None = None
    fused: tuple[str, ...] = ()

    @property
    def spellings(self) -> tuple[str, str]:
        """The layer's name in diffusers and in the official model."""
        official = module_to_official(self.weight).removesuffix(".weight")
        return official_to_diffusers(official), official


class Targets:
    """The names that LoRA files may use for the weights of a transformer.

    shapes: of the model's weights, by the module's own names (`blocks.0.attn.wq.weight`).
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = dict(shapes)
        self._targets: dict[str, tuple[Target, ...]] = {}
        numbers = (re.match(r"blocks\.(\d+)\.", name) for name in shapes)
        self._last_block = max((int(match[1]) for match in numbers if match), default=None)
        for weight in shapes:
            official = module_to_official(weight)
            for name in (official, official_to_diffusers(official)):
                self._targets[_joined(name.removesuffix(".weight"))] = (Target(weight),)
            # Saved from our module itself, as some trainers do.
            self._targets.setdefault(_joined(weight.removesuffix(".weight")), (Target(weight),))
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
                    self._targets[_joined(f"{name}{fused}")] = tuple(targets)

    def find(self, name: str) -> tuple[Target, ...]:
        """The weights of a layer by its bare name; empty if the model has no such layer."""
        return self._targets.get(_joined(name), ())

    def why_not(self, name: str) -> str:
        """Why `find` has nothing for a bare name."""
        number = _BLOCK.match(name)
        if number and self._last_block is not None and int(number[1]) > self._last_block:
            return f"this model has {self._last_block + 1} blocks"
        return "this model has no such layer"


class TextTargets(Targets):
    """The names that LoRA files may use for the weights of the text encoder."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = dict(shapes)
        self._targets = {}
        for weight in shapes:
            bare = weight.removesuffix(".weight")
            for before in ("", "model.", "model.language_model.", "language_model."):
                self._targets[_joined(before + bare)] = (Target(weight),)

    def why_not(self, name: str) -> str:
        if not self.shapes:
            return "a layer of the text encoder, and none is connected"
        return "the text encoder has no such layer"


# Python refuses to read endless digits as a number.
_BLOCK = re.compile(r"(?:transformer_)?blocks[._](\d{1,6})(?!\d)")


def _joined(name: str) -> str:
    return name.replace(".", "_")


def text_layer(layer: str) -> str | None:
    """The bare name of a layer of the text encoder; None for one of the transformer."""
    if not layer.startswith(_TEXT_PREFIXES):
        return None
    for prefix in _TEXT_PREFIXES:
        if layer.startswith(prefix):
            return layer[len(prefix) :]
    return None


def strip_prefix(layer: str, targets: Targets) -> tuple[str, str]:
    """A layer's name without its prefix, and the trainer that writes that prefix.

    A prefix may also be the beginning of a layer's name (`transformer_blocks`), so the first form
    that names a layer counts; without one, the shortest.
    """
    family, bare = "", layer
    while not targets.find(bare) and (found := _PREFIX.match(bare)):
        family, bare = family or _WRITERS[found[0]], bare[found.end() :]
    return bare, family or "bare names"


def layer_in_files(layer: str, key_style: str) -> str:
    """A layer of our module (`blocks.0.attn.wq`) as files of one of `KEY_STYLES` name it."""
    official = module_to_official(f"{layer}.weight").removesuffix(".weight")
    return {
        "kohya": f"lora_unet_{official.replace('.', '_')}",
        DIFFUSERS: f"transformer.{official_to_diffusers(official)}",
    }.get(key_style, f"diffusion_model.{official}")


def is_target(layer: str, targets: str) -> bool:
    """True for a linear layer, by the module's name, that is in one of `TARGETS`."""
    if layer.startswith("blocks."):
        return targets.startswith("blocks") or (".attn." in layer) == (targets == "attention")
    # The projector mixes twelve layers into one: a row that has no low rank.
    is_text = re.match(r"txtmlp|txtfusion(?!\.projector)", layer) is not None
    return is_text and targets == "blocks+text"
