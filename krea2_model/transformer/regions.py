"""Regional prompts: a text for a part of the image, beside the text of all of it.

The text of a region is encoded and fused by itself, and stands in front of the text in the
sequence; `token_groups` has what sees what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number
from ..guidance import NEVER, SigmaAt, StepWindow, check_window, unshifted
from .text_attention import TextStates
from .token_groups import RegionTokens, TokenGroups

# Shares (N, rows * columns) in [0, 1] of N regions in the image tokens of a grid.
SharesAt = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class RegionSettings:
    """Use of a region's text.

    strength: factor on attention to it, 0 (left out) to 10; 1 is as strong as the text.
    start, end: fractions of the schedule's time between which it is used, see `guidance`.

    Raises ValueError for values out of range.
    """

    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not (is_number(self.strength) and 0 <= self.strength <= 10):
            raise ValueError(
                f"A region's strength is {self.strength!r}; expected 0 (left out) to 10."
            )
        check_window("A region", self.start, self.end)

    def window(self, sigma_at: SigmaAt = unshifted) -> StepWindow:
        """The steps of a schedule that use it."""
        return StepWindow.between(self.start, self.end, sigma_at) if self.strength > 0 else NEVER


@dataclass(frozen=True)
class ActiveRegions:
    """The regions of a step.

    numbers: of the active ones in the plan. texts: theirs, (1 or B, L, width). groups: of the call.
    """

    numbers: tuple[int, ...]
    texts: tuple[TextStates, ...]
    groups: TokenGroups

    def text_tokens(self, front: int = 0) -> dict[int, slice]:
        """The tokens of each active region's text, after `front` tokens of another text."""
        found = {}
        for number, text in zip(self.numbers, self.texts, strict=True):
            found[number] = slice(front, front := front + text.states.shape[1])
        return found

    def join(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Texts of regions and the text (B, L, width) as one text, with its mask or None."""
        batch = len(states)
        parts = [text.states.to(states).expand(batch, -1, -1) for text in self.texts]
        if mask is not None or any(text.mask is not None for text in self.texts):
            masks = [
                states.new_ones(batch, text.states.shape[1], dtype=torch.bool)
                if text.mask is None
                else text.mask.bool().expand(batch, -1)
                for text in (*self.texts, TextStates(states, mask))
            ]
            mask = torch.cat(masks, dim=1)
        return torch.cat([*parts, states], dim=1), mask


class RegionPlan:
    """The regions of a run.

    texts: of the regions, fused. settings: of each. shares_at: their shares in image tokens.
    text_factor: on attention of image tokens to the text, where regions cover them wholly.
    separate: fraction of the schedule's time up to which image tokens see only image tokens of
        their own region.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        texts: Sequence[TextStates],
        settings: Sequence[RegionSettings],
        shares_at: SharesAt,
        sigma_at: SigmaAt = unshifted,
        *,
        text_factor: float = 1.0,
        separate: float = 0.0,
    ):
        check_region_options(text_factor, separate)
        self.texts, self._settings, self._shares_at = tuple(texts), tuple(settings), shares_at
        self._windows = [each.window(sigma_at) for each in self._settings]
        self._text_factor = text_factor
        self._separate = StepWindow.between(0.0, separate, sigma_at) if separate > 0 else NEVER
        self._active: dict[tuple, ActiveRegions | None] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(text.states.shape[1] for text in self.texts)

    def with_texts(self, texts: Sequence[TextStates]) -> RegionPlan:
        """The same plan with other texts: fused ones, or copies on a device."""
        plan = copy.copy(self)
        plan.texts, plan._active = tuple(texts), {}
        return plan

    def at(
        self,
        sigma: float,
        grid: tuple[int, int],
        device: torch.device,
        cut: Callable[[Tensor], Tensor] | None = None,
    ) -> ActiveRegions | None:
        """The regions of a step that begins at a sigma, or None without any.

        grid: rows and columns of the image's tokens. cut: of shares (N, I) of these, for those of a
        tile; regions that have no part in the tile are left out.
        """
        active = tuple(w.contains(sigma) for w in self._windows)
        separate = self._separate.contains(sigma)
        if cut is not None:  # tiles move from step to step
            return self._regions(active, separate, cut(self._shares_at(*grid)), device)
        key = active, separate, grid, device
        if key not in self._active:
            self._active[key] = self._regions(active, separate, self._shares_at(*grid), device)
        return self._active[key]

    def _regions(self, active, separate, shares: Tensor, device) -> ActiveRegions | None:
        used = (shares > 0).any(dim=1).tolist() if len(shares) else []
        numbers = tuple(n for n, is_active in enumerate(active) if is_active and used[n])
        if not numbers:
            return None
        texts = tuple(self.texts[number] for number in numbers)
        regions = [
            RegionTokens(text.states.shape[1], shares[number], self._settings[number].strength)
            for number, text in zip(numbers, texts, strict=True)
        ]
        groups = TokenGroups(
            shares.shape[1], regions, text_factor=self._text_factor, separate=separate
        )
        return ActiveRegions(numbers, texts, groups.to(device))


def check_region_options(text_factor: float, separate: float) -> None:
    """Raise ValueError for options of `RegionPlan` that are out of range."""
    if not (is_number(text_factor) and 0 <= text_factor <= 10):
        raise ValueError(f"The text's factor in regions is {text_factor!r}; expected 0 to 10.")
    if not (is_number(separate) and 0 <= separate <= 1):
        raise ValueError(
            f"separate is {separate!r}; expected a fraction of the schedule from 0 (never) to 1."
        )
