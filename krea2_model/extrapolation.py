"""Step skipping: the velocity is extrapolated from the last two steps. Faster, and not exact.

Once the composition is settled the velocity changes almost linearly with time, so a line through
two velocities predicts the next one closely. Feature caches reuse the last output instead, which is
off by the whole change.
"""

from __future__ import annotations

import math

from torch import Tensor


class VelocityExtrapolation:
    """Steps that skip the model, and their velocity.

    steps: number of steps of the run.
    every: evaluate the model at one step in so many, after the first fifth of the run; 1 is every
        step.
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
        """True if a step, counted from 0, skips the model; the last never does."""
        late = self._first <= step < self._steps - 1 and len(self._known) == 2
        return late and (step - self._first + 1) % self._every != 0

    def record(self, time: float, velocity: Tensor) -> None:
        """Record the model's velocity at a time; a second one at the same time replaces it."""
        if self._every > 1:
            earlier = [entry for entry in self._known if entry[0] != time]
            self._known = [*earlier[-1:], (time, velocity)]

    def velocity(self, time: float) -> Tensor:
        """The line through the last two velocities, at a time."""
        (earlier, first), (later, second) = self._known
        return second + (time - later) / (later - earlier) * (second - first)
