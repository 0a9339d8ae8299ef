"""LoRAs that act on the outputs of layers during a call, for some tokens and at some strength.

Merged into weights, a LoRA acts on all tokens of every step. One that belongs to a region, or whose
strength changes along the run, is added to the output of each linear layer instead: `up (down x)`
for a plain LoRA, and for other kinds what the changed weight would add. Weights stay as they are,
whatever format they have.

Forward hooks do it, while a call lasts, so that layers of a host work as its own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import there_are
from .outputs import Change, output_change, plain, plain_weight
from .updates import Update

# Layers that compute from the time or from norms: they have no token of their own.
_OF_ALL_TOKENS = ("tmlp.", "tproj.")
_OF_TEXT = ("txtfusion.", "txtmlp.")
FIRST = "first"


@dataclass(frozen=True)
class TokenLayout:
    """Numbers of tokens of a call: before the image (texts), of the image, of references."""

    text: int
    image: int
    references: int = 0

    @property
    def total(self) -> int:
        return self.text + self.image + self.references

    def shares(self, image: Tensor | None = None, text: slice | None = None) -> Tensor:
        """Shares (L,) of all tokens: the image's (I,) or 1, 1 for some of text, 0 elsewhere."""
        image = torch.ones(self.image) if image is None else image
        shares = image.new_zeros(self.total)
        shares[self.text : self.text + self.image] = image
        if text is not None:
            shares[text] = 1
        return shares


class LiveLora:
    """A LoRA's updates by the layer that they change, on any device.

    left_out: weights that it changes but that no single token has, such as norms.
    """

    def __init__(self, updates: Mapping[str, Sequence[Update]]):
        self.layers: dict[str, list[Update]] = defaultdict(list)
        self.biases: dict[str, list[Update]] = defaultdict(list)
        left_out = []
        for weight, several in updates.items():
            layer, _, kind = weight.rpartition(".")
            is_leaf = layer.endswith((".scale", ".lin"))
            if is_leaf or kind not in ("weight", "bias") or layer.startswith(_OF_ALL_TOKENS):
                left_out.append(weight)
            else:
                (self.layers if kind == "weight" else self.biases)[layer].extend(several)
        self.left_out = tuple(left_out)
        # Of each layer on the device of the last call: its updates, ready to be applied.
        self._prepared: dict[tuple, list[Change]] = {}
        self._source: LiveLora | None = None

    @property
    def names(self) -> set[str]:
        """Layers that it changes."""
        return {*self.layers, *self.biases}

    @property
    def changes_text(self) -> bool:
        """True if it changes the fusion of texts."""
        return any(map(_is_of_text, self.names))

    @property
    def changes_blocks(self) -> bool:
        """True if it changes layers of blocks."""
        return any(name.startswith("blocks.") for name in self.names)

    def change(self, model: nn.Module, name: str, strength: float, hidden: Tensor) -> Tensor:
        """Its addition to the output of a model's layer for tokens (B, R, D)."""
        key = name, hidden.device, hidden.dtype, strength
        if key not in self._prepared:

            def weight_of(weight: str) -> Tensor:
                return plain_weight(model.get_submodule(weight.removesuffix(".weight")))

            layer = model.get_submodule(name)
            self._prepared[key] = [
                output_change(update, layer, strength, hidden, weight_of)
                for update in self.layers.get(name, ())
            ] + [_bias(update, layer, strength, hidden) for update in self.biases.get(name, ())]
        total = None
        for change in self._prepared[key]:
            added = change(hidden)
            total = added if total is None else total + added
        assert total is not None
        return total

    def for_run(self) -> LiveLora:
        """The same LoRA with copies on a device of its own, freed with it."""
        lora = copy.copy(self)
        lora._prepared, lora._source = {}, self  # whose id a host may know it by
        return lora


@dataclass(frozen=True)
class LoraUse:
    """Use of a LoRA in a call.

    share: of each token (L,), laid out as `TokenLayout`, in [0, 1]; None for all tokens.
    """

    lora: LiveLora
    strength: float = 1.0
    share: Tensor | None = None


@contextmanager
def live_loras(model: nn.Module, uses: Sequence[LoraUse], layout: TokenLayout) -> Iterator[None]:
    """Within it, calls of a transformer apply the LoRAs; not those of its text fusion."""
    with ExitStack() as stack:
        for use in uses:
            if use.strength != 0:
                rows = None if use.share is None else _TokenRows(use.share, layout)
                names = (name for name in use.lora.names if not name.startswith(_OF_TEXT))
                _hook(stack, model, use, names, rows)
        yield


@contextmanager
def live_loras_of_text(model: nn.Module, uses: Sequence[LoraUse]) -> Iterator[None]:
    """Within it, the fusion of a text applies the LoRAs to all of its tokens."""
    with ExitStack() as stack:
        for use in uses:
            if use.strength != 0:
                _hook(stack, model, use, filter(_is_of_text, use.lora.names), None)
        yield


def _is_of_text(name: str) -> bool:
    return name.startswith(_OF_TEXT)


def _hook(stack: ExitStack, model: nn.Module, use: LoraUse, names, rows: _TokenRows | None) -> None:
    for name in sorted(names):
        layer = model.get_submodule(name)
        handle = layer.register_forward_hook(_Hook(model, name, use, rows))
        stack.callback(handle.remove)


class _TokenRows:
    """The tokens that a LoRA acts on, as rows of a layer's input and their shares."""

    def __init__(self, share: Tensor, layout: TokenLayout):
        if len(share) != layout.total:
            raise ValueError(
                f"{there_are(len(share), 'share')}; expected {layout.total}, one a token."
            )
        image = slice(layout.text, layout.text + layout.image)
        self._first = _rows(share[layout.text :])
        # The last block computes with tokens of the image alone.
        self._by_length = {layout.total: _rows(share), layout.image: _rows(share[image])}

    def of(self, name: str, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Rows (R,) and shares (R, 1) or None for 1, of an input of so many tokens."""
        return self._first if name == FIRST else self._by_length[tokens]


def _rows(share: Tensor) -> tuple[Tensor, Tensor | None]:
    rows = (share > 0).nonzero()[:, 0]
    shares = share[rows, None]
    return rows, None if bool((shares == 1).all()) else shares


class _Hook:
    """Adds a LoRA to a layer's output. A class, so that a host can tell whose hook it is."""

    def __init__(self, model: nn.Module, name: str, use: LoraUse, rows: _TokenRows | None):
        self._model, self._name, self._use, self._rows = model, name, use, rows

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden, use = inputs[0], self._use
        if self._rows is None:
            return output + use.lora.change(self._model, self._name, use.strength, hidden)
        rows, share = self._rows.of(self._name, hidden.shape[1])
        if not len(rows):
            return output
        change = use.lora.change(self._model, self._name, use.strength, hidden[:, rows])
        if share is not None:
            change = change * share.to(change.dtype)
        return output.index_add(1, rows, change)


def _bias(update: Update, layer: nn.Module, strength: float, hidden: Tensor) -> Change:
    change = update.difference(hidden.device)
    if update.kind == "set" and isinstance(layer.bias, Tensor):
        change = change - plain(layer.bias).to(change)
    bias = (strength * change).to(hidden.dtype)
    return lambda rows: bias.expand(*rows.shape[:-1], -1)
