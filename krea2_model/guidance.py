"""Windows of a run, and guidance that changes along it: only in a window, with a ramp, rescaled.

`start` and `end` mean one thing everywhere, ComfyUI's: parts of the schedule's own time, before its
shift, from 0 (noise) to 1 (image). They count from where a whole run begins, so one at denoise 0.6
begins at 0.4 and does half of its steps before 0.7. Sigmas are called sigma.

Outside the interval the negative is not asked for, which saves its pass. Early steps fix the
composition and late ones the finest grain; guidance does its work in between (Kynkäänniemi et al.,
"Applying Guidance in a Limited Interval", arXiv 2404.07724).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# The sigma at a part of a schedule's time; ComfyUI's models call it percent_to_sigma.
SigmaAt = Callable[[float], float]

# What the factor on guidance does between the start of the window and its end.
RAMPS = {
    "constant": lambda done: 1.0,
    "rising": lambda done: done,
    "falling": lambda done: 1.0 - done,
    "hill": lambda done: math.sin(math.pi * done),
}


# Two sigmas that are this close are one: they are float32 where they come from.
_SAME_SIGMA = 1e-6


def unshifted(part: float) -> float:
    """The sigma at a part of the time of a schedule without a shift."""
    return 1.0 - part


def in_window(sigma: float, first: float, last: float) -> bool:
    """Whether a step that begins at a sigma lies between two, the last of them left out.

    So of windows that meet, one step belongs to just one.
    """
    return last + _SAME_SIGMA < sigma <= first + _SAME_SIGMA


def part_at(sigma: float, sigma_at: SigmaAt) -> float:
    """The part of a schedule's time at which it has a sigma: the inverse of `sigma_at`.

    By halving, so that it serves every schedule that a node may give a model.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_at(middle) > sigma else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class GuidanceSchedule:
    """How much of the guidance counts at a sigma.

    start, end: the parts of the schedule's time between which it counts, 0 (noise) to 1 (image). A
        step that begins at the end is outside.
    ramp: one of `RAMPS`, over the window, in time.
    rescale: 0 to 1, how far the guided velocity is brought back to the contrast of the
        conditional one, see `rescaled`.
    Raises ValueError for values outside of these.
    """

    start: float = 0.0
    end: float = 1.0
    ramp: str = "constant"
    rescale: float = 0.0

    def __post_init__(self):
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"The window of guidance is start {self.start}, end {self.end}; expected parts of "
                "the schedule's time with 0 <= start <= end <= 1: 0 is noise, 1 the image. For a "
                "sigma take 1 - unshift_time(sigma, mu)."
            )
        if self.ramp not in RAMPS:
            raise ValueError(f"ramp is {self.ramp!r}; expected one of {', '.join(RAMPS)}.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is {self.rescale}; expected 0 (off) to 1.")

    def factor(self, sigma: float, sigma_at: SigmaAt = unshifted) -> float:
        """What guidance is multiplied by at a sigma of a schedule; 0 needs no negative."""
        if not in_window(sigma, sigma_at(self.start), sigma_at(self.end)):
            return 0.0
        done = (part_at(sigma, sigma_at) - self.start) / (self.end - self.start)
        return RAMPS[self.ramp](min(1.0, max(0.0, done)))


ALWAYS = GuidanceSchedule()


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
