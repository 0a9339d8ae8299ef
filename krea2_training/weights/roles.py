"""Several models that share one frozen base, each with adapters of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from krea2_model.transformer.model import Krea2Transformer

from ..settings.sections import Adapter
from .adapters import AnyAdapter, adapters_of, add_adapters

BASE = "base"


class Roles:
    """A model in several roles: which adapters act. At rest it is in the first one.

    The role `BASE` is the model without adapters. Adapters of later roles are inside of those of
    earlier ones, beside the same layers.
    """

    def __init__(
        self, model: Krea2Transformer, settings: Adapter, roles: Sequence[str], seed: int = 0
    ):
        self.model = model
        self.adapters: dict[str, dict[str, AnyAdapter]] = {}
        for number, role in enumerate(roles):
            added = {id(part) for part in add_adapters(model, settings, seed + number)}
            own = {n: part for n, part in adapters_of(model).items() if id(part) in added}
            self.adapters[role] = {_layer_of(name): part for name, part in own.items()}
        for own in self.adapters.values():
            for part in own.values():  # `add_adapters` froze those before.
                for parameter in part.parameters(recurse=False):
                    parameter.requires_grad_(True)
        self._act(roles[0])

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters of a role by their names in the model."""
        parts = self.adapters[role].values()
        own = {id(p) for part in parts for p in part.parameters(recurse=False)}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    @contextmanager
    def acting(self, role: str) -> Iterator[Krea2Transformer]:
        """The model in a role, and then again in the one before."""
        before = self.role
        self._act(role)
        try:
            yield self.model
        finally:
            self._act(before)

    def _act(self, role: str) -> None:
        self.role = role
        for name, own in self.adapters.items():
            for part in own.values():
                part.strength = 1.0 if name == role else 0.0


def _layer_of(name: str) -> str:
    """The name of the layer that an adapter is beside, without the adapters around it."""
    while name.endswith(".layer"):
        name = name.removesuffix(".layer")
    return name
