"""Guidance that changes along a run: only inside an interval of sigma, with a ramp, rescaled.

Outside the interval the negative is not asked for, which saves its pass. Early steps fix the
composition and late ones the finest grain; guidance does its work in between (Kynkäänniemi et al.,
"Applying Guidance in a Limited Interval", arXiv 2404.07724).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# What the factor on guidance does between the first sigma of the interval and the last.
RAMPS = {
    "constant": lambda done: 1.0,
    "rising": lambda done: done,
    "falling": lambda done: 1.0 - done,
    "hill": lambda done: math.sin(math.pi * done),
}


@dataclass(frozen=True)
class GuidanceSchedule:
    """How much of the guidance counts at a sigma.

    start, end: the sigmas between which it counts, both included, from 1 (noise) to 0 (image).
    ramp: one of `RAMPS`, over the interval.
    rescale: 0 to 1, how far the guided velocity is brought back to the contrast of the
        conditional one, see `rescaled`.
    Raises ValueError for values outside of these.
    """

    start: float = 1.0
    end: float = 0.0
    ramp: str = "constant"
    rescale: float = 0.0

    def __post_init__(self):
        if not 0 <= self.end <= self.start <= 1:
            raise ValueError(
                f"The interval of guidance is start {self.start}, end {self.end}; expected sigmas "
                "with 1 >= start >= end >= 0: 1 is noise, 0 the image."
            )
        if self.ramp not in RAMPS:
            raise ValueError(f"ramp is {self.ramp!r}; expected one of {', '.join(RAMPS)}.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is {self.rescale}; expected 0 (off) to 1.")

    def factor(self, sigma: float) -> float:
        """What guidance is multiplied by at a sigma; 0 needs no negative."""
        # Sigmas are float32 where they come from, ends are typed.
        if not self.end - 1e-6 <= sigma <= self.start + 1e-6:
            return 0.0
        length = self.start - self.end
        done = min(1.0, max(0.0, (self.start - sigma) / length)) if length else 0.5
        return RAMPS[self.ramp](done)


ALWAYS = GuidanceSchedule()


# Two times of a schedule that are this close are one.
_SAME_TIME = 1e-4


def in_window(time: float, first: float, last: float) -> bool:
    """Whether a step that begins at a time lies in a window of a schedule, its last time left out.

    So of windows that meet, one step belongs to just one.
    """
    return last + _SAME_TIME < time <= first + _SAME_TIME


def rescaled(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """The guided velocity with the deviation of the conditional one, mixed in by `amount`.

    Strong guidance inflates contrast; this takes it back (Lin et al., "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", arXiv 2305.08891, section 3.4). Tensors are (B, ...);
    each image has a deviation of its own.
    """
    if amount == 0:
        return guided
    sides = tuple(range(1, guided.ndim))
    ratio = conditional.std(sides, keepdim=True) / guided.std(sides, keepdim=True).clamp_min(1e-12)
    return guided * (1 + amount * (ratio - 1))
