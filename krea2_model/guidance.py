"""Step windows, and guidance that changes along a run: in a window, with a ramp, rescaled.

`start` and `end` mean one thing everywhere, as in ComfyUI: fractions of the schedule's time, before
its shift, from 0 (noise) to 1 (image). They count from the start of a whole run, so a run at
denoise 0.6 begins at 0.4 and does half of its steps before 0.7. Sigmas are called sigma.

Outside the window the negative prompt is not evaluated. Early steps fix the composition and late
ones the finest grain; guidance does its work in between (Kynkäänniemi et al., "Applying Guidance in
a Limited Interval", arXiv 2404.07724).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

from .checks import is_number

# The sigma at a fraction of a schedule's time; ComfyUI's models call it percent_to_sigma.
SigmaAt = Callable[[float], float]

# The factor on guidance by the fraction of the window that has passed.
RAMPS = {
    "constant": lambda passed: 1.0,
    "rising": lambda passed: passed,
    "falling": lambda passed: 1.0 - passed,
    "hill": lambda passed: math.sin(math.pi * passed),
}

# Two sigmas that are this close are one: they come from float32.
_SAME_SIGMA = 1e-6


def unshifted(fraction: float) -> float:
    """The sigma at a fraction of the time of a schedule without a shift."""
    return 1.0 - fraction


class StepWindow(NamedTuple):
    """The steps that begin at sigmas from `first` down to `last`, `last` excluded.

    So of two windows that meet, a step belongs to one.
    """

    first: float
    last: float

    @classmethod
    def between(cls, start: float, end: float, sigma_at: SigmaAt = unshifted) -> StepWindow:
        """The window between two fractions of a schedule's time."""
        return cls(float(sigma_at(start)), float(sigma_at(end)))

    def contains(self, sigma: float) -> bool:
        """True for a step that begins at this sigma."""
        return self.last + _SAME_SIGMA < sigma <= self.first + _SAME_SIGMA


def check_window(
    what: str,
    start: float,
    end: float,
    *,
    names: tuple[str, str] = ("start", "end"),
    whole: str = "the schedule",
) -> None:
    """Raise ValueError unless start and end are fractions of a whole, in this order."""
    if is_number(start) and is_number(end) and 0 <= start <= end <= 1:
        return
    first, last = names
    raise ValueError(
        f"{what} has {first} {start!r} and {last} {end!r}; expected fractions of {whole} with "
        f"0 <= {first} <= {last} <= 1."
    )


ALL_STEPS, NEVER = StepWindow(math.inf, -1.0), StepWindow(0.0, 0.0)


def fraction_at(sigma: float, sigma_at: SigmaAt) -> float:
    """The fraction of a schedule's time at which it has a sigma: the inverse of `sigma_at`.

    By bisection, which works for any schedule that a node gives a model.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_at(middle) > sigma else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class GuidanceSchedule:
    """A factor on guidance that depends on sigma.

    start, end: fractions of the schedule's time between which guidance is on, 0 (noise) to 1
        (image). A step that begins at the end is outside.
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
        if not (is_number(self.start) and is_number(self.end)) or not (
            0 <= self.start <= self.end <= 1
        ):
            raise ValueError(
                f"Guidance has start {self.start!r} and end {self.end!r}; expected fractions of "
                "the schedule's time with 0 <= start <= end <= 1: 0 is noise, 1 the image. For a "
                "sigma take 1 - unshift_time(sigma, mu)."
            )
        if self.ramp not in RAMPS:
            raise ValueError(f"ramp is {self.ramp!r}; expected one of {', '.join(RAMPS)}.")
        if not (is_number(self.rescale) and 0 <= self.rescale <= 1):
            raise ValueError(f"rescale is {self.rescale!r}; expected 0 (off) to 1.")

    def factor(self, sigma: float, sigma_at: SigmaAt = unshifted) -> float:
        """The factor on guidance at a sigma of a schedule; at 0 no negative is needed."""
        if not StepWindow.between(self.start, self.end, sigma_at).contains(sigma):
            return 0.0
        passed = (fraction_at(sigma, sigma_at) - self.start) / (self.end - self.start)
        return RAMPS[self.ramp](min(1.0, max(0.0, passed)))


ALWAYS = GuidanceSchedule()


def rescaled(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """The guided velocity with the deviation of the conditional one, mixed in by `amount`.

    Strong guidance inflates contrast; this takes it back (Lin et al., "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", arXiv 2305.08891, section 3.4). Tensors are (B, ...);
    each image has its own deviation.
    """
    if amount == 0:
        return guided
    sides = tuple(range(1, guided.ndim))
    ratio = conditional.std(sides, keepdim=True) / guided.std(sides, keepdim=True).clamp_min(1e-12)
    return guided * (1 + amount * (ratio - 1))
