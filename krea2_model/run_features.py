"""Features of a run that act on single steps and tokens: regions, and LoRAs on some of the tokens.

Both hosts of the transformer, `sampling` and ComfyUI's, ask for those of a step (`RunFeatures.at`)
and call the model within `StepFeatures.live`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .lora.in_run import RunLora
from .lora.live import LoraUse, TokenLayout, live_loras
from .transformer.references import Reference, boost_factors
from .transformer.regions import ActiveRegions, RegionPlan
from .transformer.text_attention import TextStates
from .transformer.token_groups import TokenGroups


@dataclass(frozen=True)
class RunFeatures:
    """The features of a run. loras: act on the calls of both texts."""

    regions: RegionPlan | None = None
    loras: tuple[RunLora, ...] = ()

    def __bool__(self) -> bool:
        return self.regions is not None or bool(self.loras)

    def uses_on_text(self, number: int) -> list[LoraUse]:
        """LoRAs on the text of a region, for its fusion."""
        return [LoraUse(own.lora, own.strength) for own in self.loras if own.region == number]

    def at(self, sigma: float, grid: tuple[int, int], device: torch.device) -> StepFeatures:
        """The features of a step that begins at a sigma; grid: rows and columns of image tokens."""
        active = None if self.regions is None else self.regions.at(sigma, grid, device)
        return StepFeatures(sigma, grid, device, active, self.loras)


@dataclass(frozen=True)
class StepFeatures:
    """The features of one step. references: active ones, for their boosts."""

    sigma: float
    grid: tuple[int, int]
    device: torch.device
    regions: ActiveRegions | None = None
    loras: tuple[RunLora, ...] = ()
    references: tuple[Reference, ...] = ()

    def with_references(self, references: Sequence[Reference]) -> StepFeatures:
        return replace(self, references=tuple(references))

    def for_negative(self) -> StepFeatures:
        """Those of the negative text's call, which has no regions."""
        return replace(self, regions=None)

    @property
    def texts(self) -> tuple[TextStates, ...]:
        """Texts in front of the call's own."""
        return () if self.regions is None else self.regions.texts

    @property
    def groups(self) -> TokenGroups | None:
        """Groups of tokens that see different keys, None where all see all alike."""
        groups = None if self.regions is None else self.regions.groups
        boosts = boost_factors(self.references, *self.grid)
        if not boosts:
            return groups
        groups = groups or TokenGroups(self.grid[0] * self.grid[1])
        return groups.with_references(boosts, self.device)

    def join(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The text (B, L, width) and its mask with the texts of regions in front."""
        return (states, mask) if self.regions is None else self.regions.join(states, mask)

    def live(
        self, model: nn.Module, text: int, references: int = 0, front: int = 0
    ) -> AbstractContextManager[None]:
        """Apply the LoRAs to calls of a transformer.

        text: tokens of the joined text. references: tokens of references in the sequence. front:
        tokens before the text, of a negative.
        """
        layout = TokenLayout(front + text, self.grid[0] * self.grid[1], references)
        texts = {} if self.regions is None else self.regions.text_tokens(front)
        uses = [
            lora.use_at(self.sigma, layout, self.grid, texts, self.device) for lora in self.loras
        ]
        return live_loras(model, [use for use in uses if use is not None], layout)
