"""The LoRA that a run begins as, in place of zero: `adapter.start`.

It is read and checked against the model's sizes before the model is loaded. A rank below that of
the settings fills a part of the adapter and leaves the rest as it is in a new one, so that the
adapter is the file's to the rounding of float32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from krea2_model import Krea2Transformer, TransformerConfig
from krea2_model.checkpoints.identify import read_header
from krea2_model.checkpoints.transformer import STEPS_KEY
from krea2_model.checks import by_count, counted
from krea2_model.lora.edit_family import family_header, read_family
from krea2_model.lora.few_steps import read_steps
from krea2_model.lora.files import read_lora, read_lora_file
from krea2_model.lora.names import DIFFUSERS, KEY_STYLES, TARGETS
from krea2_model.lora.updates import Update

from ..config import RunConfig
from ..data.examples import content_hash
from ..engine.loop import NOTES, begun
from ..settings.sections import COLUMNS, ROWS, Adapter
from .adapters import (
    AnyAdapter,
    DoraLinear,
    LoraLinear,
    adapters_of,
    add_adapters,
    frozen_weight,
    targeted,
)

logger = logging.getLogger(__name__)

# In a state's description of its run, and the setting's name.
START, SETTING = "start", "adapter.start"
# In the notes of a state.
_USAGE = "use of the start"
_WORDS = ("modelspec.trigger_phrase", "modelspec.usage_hint")
_HOLDS = {"lora": "a LoRA", "lokr": "a LoKr", "loha": "a LoHa", "diff": "full differences",
          "set": "full weights", "oft": "OFT", "boft": "BOFT", "glora": "GLoRA"}  # fmt: skip
_TAKES = {"lora": ("lora",), "dora": ("lora",), "lokr": ("lokr",)}
_EXPECTED = {"lora": "a LoRA", "dora": "a LoRA or a DoRA", "lokr": "a LoKr"}


class Start:
    """The start of a run; empty where the settings name none, or its folder has a state.

    digest: SHA-256 of the file, None without one; a resumed run has to share it. usage: metadata
    that says how the file is used. sizes: of the model. Raises ValueError for a file that cannot be
    a start.
    """

    def __init__(self, config: RunConfig, sizes: TransformerConfig):
        path, run = config.adapter.start, begun(config.output.run_folder)
        self.updates: dict[str, Update] = {}
        self.usage: dict[str, str] = {}
        self.digest: str | None = None
        if path is None:
            return
        self._name = path.name
        output = config.output.path
        if output is not None and output.exists() and path.exists() and output.samefile(path):
            raise ValueError(
                f"adapter.start and output.path are both {path}: the run would write over what it "
                "begins with, and not go on once stopped. Name another output."
            )
        if run is not None and run.get(START) and not path.is_file():
            # The state has what became of it.
            self.digest, self.usage = run[START], run.get(NOTES, {}).get(_USAGE, {})
            return
        if run is None or not path.is_file():
            self.updates = read_start(path, sizes, config.adapter)
        self.digest = content_hash(path)
        self.usage = usage_of(path)

    @property
    def steps(self) -> int | None:
        """Steps of a few-step LoRA; None for others."""
        return int(self.usage[STEPS_KEY]) if STEPS_KEY in self.usage else None

    def warn(self, family: str | None) -> None:
        """Warn where a run on pictures goes against what the file is for.

        family: of the edit LoRA that the run trains, None for others.
        """
        if self.steps is not None:
            logger.warning(
                "%s is a LoRA for %d steps. Training on pictures undoes its distillation, and "
                "pictures in so few steps become soft: train without it and use both, or distil "
                "the result.",
                self._name, self.steps,
            )  # fmt: skip
        own = read_family("", self.usage)
        if family is not None and own is not None and own.name != family:
            logger.warning(
                "%s is an edit LoRA of family %s, and this run shows references as %s does. Set "
                "data.references (--references) if it is to go on as the first.",
                self._name, own.name, family,
            )  # fmt: skip

    def noted(self, notes: dict[str, Any]) -> dict[str, Any]:
        """Notes of a run, to which what the file says of its use is added: it may go."""
        if self.usage:
            notes[_USAGE] = self.usage
        return notes

    def fill(self, adapters: Mapping[str, AnyAdapter]) -> None:
        """Make new adapters, by the names of their layers, what the file holds; once."""
        fill(adapters, self.updates)
        self.updates = {}


def usage_of(path: Path) -> dict[str, str]:
    """What a LoRA's file says of how it is used, by its header or name, as metadata of another.

    The steps of a few-step LoRA, the family of an edit LoRA, and the words that call it.
    """
    metadata = read_header(path).metadata
    usage = {name: metadata[name] for name in _WORDS if metadata.get(name)}
    if (steps := read_steps(path.name, metadata)) is not None:
        usage[STEPS_KEY] = str(steps)
    family = read_family(path.name, metadata)
    if family is not None and family.is_edit:
        usage |= family_header(family.name, family.cache)
    return usage


def read_start(path: Path, sizes: TransformerConfig, settings: Adapter) -> dict[str, Update]:
    """The updates of a LoRA's file by the names of the layers, which adapters can begin as.

    Raises ValueError for a file of another model, for layers that the settings do not train, for
    another method, and for a rank above that of the settings. Nothing of a file is left out.
    """
    with torch.device("meta"):
        model = Krea2Transformer(sizes)
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        layers = {targets: set(targeted(model, targets)) for targets in TARGETS}
        add_adapters(model, settings)
    adapters = adapters_of(model)
    given = f"{SETTING} is {path}"
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise ValueError(
            f"{given}, which is {kind}; expected the .safetensors file of a LoRA. Check the name "
            "and the folder."
        )
    try:
        tensors, metadata = read_lora_file(path)
        updates, _, report = read_lora(tensors, shapes, path.name, None, metadata)
    except ValueError as error:
        raise ValueError(f"{given}. {error}") from error
    if report.unmatched:
        name, reason = next(iter(report.unmatched.items()))
        count = len(report.unmatched)
        raise ValueError(
            f"{given}, which has {counted(count, 'tensor')} that cannot be trained on, such as "
            f"{name} ({reason}); expected a LoRA of this transformer alone. A run begins with the "
            "whole of a file: choose another."
        )
    found = {name.removesuffix(".weight"): own[0] for name, own in updates.items()}
    if not found:
        raise ValueError(
            f"{given}, which changes nothing: its matrices are zeros. Choose another file, or "
            f"leave {SETTING} out."
        )
    if left := sorted(found.keys() - adapters.keys()):
        wider = next((targets for targets, own in layers.items() if found.keys() <= own), None)
        _raise_left_out(given, left, settings.targets, wider)
    for layer, update in found.items():
        if misfit := _misfit(adapters[layer], update, settings):
            raise ValueError(
                f"{given}, which holds {misfit.holds} (in {layer}); adapter.method is "
                f"{settings.method}, which begins as {misfit.expected}. {misfit.remedy}."
            )
    ranks = {layer: len(_matrices(update)[1]) for layer, update in found.items()}
    higher = {layer: rank for layer, rank in ranks.items() if rank > adapters[layer].rank}
    if higher:
        layer, rank = max(higher.items(), key=lambda one: one[1])
        raise ValueError(
            f"{given}, which has rank {rank} (in {layer}); expected at most adapter.rank, "
            f"{settings.rank}. Set adapter.rank to {rank}, or take a file of a lower rank: "
            "krea2 extract makes one of any."
        )
    return found


def _raise_left_out(given: str, left: list[str], targets: str, wider: str | None) -> NoReturn:
    """wider: targets that have all layers of the file."""
    remedy = (
        f"Set adapter.targets to {wider}."
        if wider
        else f"No other targets have all of them. A file of krea2 extract --targets {targets} has "
        "only what these train."
    )
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    raise ValueError(
        f"{given}, which changes {', '.join(left[:3])}{more}; adapter.targets is {targets}, which "
        f"does not train {by_count(len(left), 'it', 'them')}. {remedy}"
    )


class Misfit(NamedTuple):
    """Of what a file holds that an adapter cannot begin as: the words for it, and the remedy."""

    holds: str
    expected: str
    remedy: str


def _misfit(adapter: AnyAdapter, update: Update, settings: Adapter) -> Misfit | None:
    """Why an adapter cannot begin as a layer of a file; None where it can."""
    kind, method = update.kind, settings.method
    expected, other = _EXPECTED[method], "Choose another file"
    if kind not in _TAKES[method]:
        fits = f"Set adapter.method to {kind}, or choose another file"
        return Misfit(_HOLDS[kind], expected, fits if kind in _TAKES else other)
    if update.magnitude is not None and not isinstance(adapter, DoraLinear):
        if kind == "lora":
            fits = "Set adapter.method to dora, or choose another file"
            return Misfit("a DoRA", expected, fits)
        return Misfit("a LoKr with lengths of its own", "one without", other)
    if update.magnitude is not None and isinstance(adapter, DoraLinear):
        if update.needs_fused_weights:
            return Misfit("a DoRA of a fused layer", "one of each layer by itself", other)
        if update.over_columns == adapter.by_rows:
            own, needed = (COLUMNS, ROWS) if update.over_columns else (ROWS, COLUMNS)
            style = KEY_STYLES[0] if update.over_columns else DIFFUSERS
            return Misfit(
                f"a DoRA with lengths of {own}",
                f"a DoRA with lengths of {needed} for this output.key_style",
                f"Set output.key_style to {style}, or choose another file",
            )
    if kind == "lokr":
        if update.rows is not None:
            return Misfit("a LoKr of a fused layer", "one of each layer by itself", other)
        small = update.parts["w1"] if "w1" in update.parts else update.parts["w1_a"]
        columns = small.shape[1] if "w1" in update.parts else update.parts["w1_b"].shape[1]
        size, own_size = (small.shape[0], columns), tuple(adapter.get_parameter("small").shape)
        if size != own_size:
            return Misfit(
                f"a LoKr whose small factor is {size[0]} x {size[1]}",
                f"one of {own_size[0]} x {own_size[1]} by adapter.factor {settings.factor}",
                f"Set adapter.factor to {max(size)} in a .toml file, or choose another file",
            )
    return None


def _matrices(update: Update) -> tuple[Tensor, Tensor]:
    """An update's low-rank factor as (outputs, rank) and (rank, inputs), in float32.

    Of LoKr it is the large one. The rank is at most the smaller side.
    """
    parts = update.parts
    if update.kind == "lokr" and "w2" in parts:
        up, down = parts["w2"], torch.eye(parts["w2"].shape[1])
    elif update.kind == "lokr":
        up, down = parts["w2_a"], parts["w2_b"]
    else:
        rows = slice(None) if update.rows is None else slice(*update.rows)
        up, down = parts["up"][rows].flatten(1), parts["down"].flatten(1)
    up, down = up.float(), down.float()
    outputs, inputs = len(up), down.shape[1]
    if len(down) <= min(outputs, inputs):
        return up, down
    product = up @ down
    return (product, torch.eye(inputs)) if inputs <= outputs else (torch.eye(outputs), product)


@torch.no_grad()
def fill(adapters: Mapping[str, AnyAdapter], updates: Mapping[str, Update]) -> None:
    """Make adapters what updates hold, both by the names of layers."""
    for layer, update in updates.items():
        _fill(adapters[layer], update)


def _fill(adapter: AnyAdapter, update: Update) -> None:
    up, down = _matrices(update)
    rank = len(down)
    # The rest of `up` is zeros, so that the rest of `down`, drawn at random, does nothing yet.
    adapter.up[:, :rank] = (up * (update.scale / adapter.scale)).to(adapter.up.device)
    adapter.down[:rank] = down.to(adapter.down.device)
    if not isinstance(adapter, LoraLinear):
        adapter.small.copy_(update.factors()[0])
    elif isinstance(adapter, DoraLinear):
        if update.magnitude is None:
            # Lengths of what the layer is with the LoRA: a DoRA that is the same as it.
            change = adapter.scale * (adapter.up @ adapter.down)
            adapter.magnitude.copy_(adapter.norm(frozen_weight(adapter, adapter.up) + change))
        else:
            magnitude = update.magnitude.flatten()
            if update.rows is not None:
                magnitude = magnitude[slice(*update.rows)]
            adapter.magnitude.copy_(magnitude)
