"""Features of a run that act on single steps and tokens: regions, controls, LoRAs on some tokens.

Both hosts of the transformer, `sampling` and ComfyUI's, ask for those of a step (`RunFeatures.at`)
and call the model within `StepFeatures.live`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .lora.control_run import RunControl, live_controls
from .lora.in_run import RunLora
from .lora.live import LoraUse, TokenLayout, live_loras
from .transformer.regions import ActiveRegions, RegionPlan
from .transformer.text_attention import TextStates
from .transformer.token_groups import TokenGroups

# A control LoRA in a run: its control channels, and the LoRA beside them, each or None.
ControlPair = tuple[RunControl | None, RunLora | None]


@dataclass(frozen=True)
class RunFeatures:
    """The features of a run. loras and controls: act on the calls of both texts."""

    regions: RegionPlan | None = None
    loras: tuple[RunLora, ...] = ()
    controls: tuple[RunControl, ...] = ()

    def __bool__(self) -> bool:
        return self.regions is not None or bool(self.loras) or bool(self.controls)

    def with_controls(self, controls: tuple[ControlPair, ...]) -> RunFeatures:
        """The features with control LoRAs added."""
        loras = tuple(lora for _, lora in controls if lora is not None)
        channels = tuple(control for control, _ in controls if control is not None)
        return replace(self, loras=self.loras + loras, controls=self.controls + channels)

    def uses_on_all_text(self, sigma: float) -> list[LoraUse]:
        """LoRAs on all text in a step that begins at a sigma, for its fusion."""
        return [
            LoraUse(own.lora, own.strength)
            for own in self.loras
            if own.region is None and own.lora.changes_text and own.acts_at(sigma)
        ]

    def uses_on_text(self, number: int) -> list[LoraUse]:
        """LoRAs on the text of a region, for its fusion."""
        return [LoraUse(own.lora, own.strength) for own in self.loras if own.region == number]

    def at(self, sigma: float, grid: tuple[int, int], device: torch.device) -> StepFeatures:
        """The features of a step that begins at a sigma; grid: rows and columns of image tokens."""
        active = None if self.regions is None else self.regions.at(sigma, grid, device)
        return StepFeatures(sigma, grid, device, active, self.loras, self.controls)


@dataclass(frozen=True)
class StepFeatures:
    """The features of one step."""

    sigma: float
    grid: tuple[int, int]
    device: torch.device
    regions: ActiveRegions | None = None
    loras: tuple[RunLora, ...] = ()
    controls: tuple[RunControl, ...] = ()

    def for_negative(self) -> StepFeatures:
        """Those of the negative text's call, which has no regions."""
        return replace(self, regions=None)

    @property
    def texts(self) -> tuple[TextStates, ...]:
        """Texts in front of the call's own."""
        return () if self.regions is None else self.regions.texts

    @property
    def groups(self) -> TokenGroups | None:
        return None if self.regions is None else self.regions.groups

    def join(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The text (B, L, width) and its mask with the texts of regions in front."""
        return (states, mask) if self.regions is None else self.regions.join(states, mask)

    @contextmanager
    def live(
        self, model: nn.Module, text: int, references: int = 0, front: int = 0
    ) -> Iterator[None]:
        """Apply the LoRAs and controls to calls of a transformer.

        text: tokens of the joined text. references: tokens of references in the sequence. front:
        tokens before the text, of a negative.
        """
        layout = TokenLayout(front + text, self.grid[0] * self.grid[1], references)
        texts = {} if self.regions is None else self.regions.text_tokens(front)
        uses = [
            lora.use_at(self.sigma, layout, self.grid, texts, self.device) for lora in self.loras
        ]
        controls = [control for control in self.controls if control.acts_at(self.sigma)]
        with (
            live_controls(model, controls),
            live_loras(model, [use for use in uses if use is not None], layout),
        ):
            yield
