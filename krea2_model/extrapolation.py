"""Steps without the model: their velocity is drawn on from the two steps before. Not exact.

Once a picture has taken shape the velocity changes almost evenly with time, so the line through two
of them meets the next one closely. What leaves out steps by reusing the last output, as feature
caches do, is off by the whole change instead.
"""

from __future__ import annotations

import math

from torch import Tensor


class VelocityExtrapolation:
    """Says which steps of a run may do without the model, and what the velocity is there.

    steps: how many the run has.
    every: one step in so many asks the model, after the first fifth of them; 1 is every step.
    """

    def __init__(self, steps: int, every: int):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"evaluate_every is {every!r}; expected a whole number from 1 (every step) up."
            )
        self._steps, self._every = steps, every
        # Composition is decided in the first steps, and a line needs two points.
        self._first = max(2, math.ceil(steps / 5))
        self._known: list[tuple[float, Tensor]] = []

    def should_skip(self, step: int) -> bool:
        """Whether a step, counted from 0, is to do without the model; the last never is."""
        late = self._first <= step < self._steps - 1 and len(self._known) == 2
        return late and (step - self._first + 1) % self._every != 0

    def record(self, time: float, velocity: Tensor) -> None:
        """Keep what the model said at a time; the last word counts where it is asked again."""
        if self._every > 1:
            earlier = [entry for entry in self._known if entry[0] != time]
            self._known = [*earlier[-1:], (time, velocity)]

    def velocity(self, time: float) -> Tensor:
        """The line through the last two velocities, at a time."""
        (before, first), (now, second) = self._known
        return second + (time - now) / (now - before) * (second - first)
