"""LoRAs of a run that act on some of its steps and tokens: on a region, or as part of a control."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance import ALL_STEPS, StepWindow
from .live import LiveLora, LoraUse, TokenLayout

# Shares (rows * columns,) in [0, 1] of the image tokens of a grid.
ShareAt = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class RunLora:
    """A LoRA in a run.

    window: the steps in which it acts.
    share_at: where in the image it acts; None is everywhere.
    region: number of the region, from 0, whose text it acts on. Without a region, and without
        `share_at`, it acts on all text.
    on_references: act on the tokens of references too, as one that was trained with them.
    """

    lora: LiveLora
    strength: float = 1.0
    window: StepWindow = ALL_STEPS
    share_at: ShareAt | None = None
    region: int | None = None
    on_references: bool = False

    def acts_at(self, sigma: float) -> bool:
        """True in a step that begins at a sigma."""
        return self.strength != 0 and self.window.contains(sigma)

    def use_at(
        self,
        sigma: float,
        layout: TokenLayout,
        grid: tuple[int, int],
        texts: Mapping[int, slice],
        device: torch.device,
        cut: Callable[[Tensor], Tensor] | None = None,
    ) -> LoraUse | None:
        """Its use in a step that begins at a sigma, None where it does not act.

        grid: rows and columns of the image's tokens. texts: tokens of the texts of active regions.
        cut: of shares of the image's tokens, for those of a tile, whose tokens the layout has.
        """
        if not self.acts_at(sigma):
            return None
        if self.region is None:
            if self.share_at is None and (self.on_references or not layout.references):
                return LoraUse(self.lora, self.strength)
            text = slice(0, layout.text)
        else:
            text = texts.get(self.region, slice(0, 0))
        image = None if self.share_at is None else self.share_at(*grid)
        if image is not None and cut is not None:
            image = cut(image)
        return LoraUse(self.lora, self.strength, layout.shares(image, text).to(device))
