"""Style without a LoRA: a picture in the style of others, from any checkpoint.

A style picture is inverted: the flow is followed backwards, from the picture to noise, which gives
its latents at every sigma of the run (as in RF-Solver, arXiv:2411.04746, and FireFlow,
arXiv:2412.07517). At each step these latents pass through the model, and the image attends to the
keys and values of that pass beside its own (as in StyleAligned, arXiv:2312.02133), see
transformer/style_attention.py.

The keys and values of one step are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import counted, is_number, there_are
from ..guidance import NEVER, SigmaAt, StepWindow, check_window, unshifted
from ..lora.in_run import ShareAt
from ..transformer.model import Krea2Transformer
from ..transformer.patches import PATCH, grid_size, token_count
from ..transformer.style_attention import BlockStyle, StyleKeys, StyleRecorder
from ..transformer.text_attention import TextStates
from .tiles import Tile

# A call of the model with a style picture's own text: latents, sigma, and a recorder of its keys
# and values or None -> velocity in float32.
StylePass = Callable[[Tensor, float, StyleRecorder | None], Tensor]

MAX_STRENGTH = 10.0


@dataclass(frozen=True)
class StyleSettings:
    """Use of style pictures.

    strength: factor on the attention of the image to them, 0 (off) to 10; below 1 it scales
        value_statistics too.
    start, end: fractions of the schedule's time between which they act, see `guidance`.
    value_statistics: how far the mean and deviation of the image's values move to theirs, 0 to 1.
    key_scale: factor on their keys, 0.5 to 2: above 1 the image attends more sharply to the parts
        that resemble it.
    first_block, last_block: fractions of the model's depth between which they act.

    The defaults were found with krea2-nano, on cases other than those of its exam.

    Raises ValueError for values out of range.
    """

    strength: float = 1.0
    start: float = 0.0
    end: float = 0.8
    value_statistics: float = 0.7
    key_scale: float = 0.9
    first_block: float = 0.0
    last_block: float = 1.0

    def __post_init__(self):
        for name, low, high in (
            ("strength", 0.0, MAX_STRENGTH),
            ("value_statistics", 0.0, 1.0),
            ("key_scale", 0.5, 2.0),
        ):
            value = getattr(self, name)
            if not (is_number(value) and low <= value <= high):
                raise ValueError(
                    f"A style's {name} is {value!r}; expected a number from {low:g} to {high:g}."
                )
        check_window("A style", self.start, self.end)
        names = "first_block", "last_block"
        depth = self.first_block, self.last_block
        check_window("A style", *depth, names=names, whole="the model's depth")

    @property
    def is_off(self) -> bool:
        return self.strength == 0 or self.start == self.end or self.first_block == self.last_block

    def window(self, sigma_at: SigmaAt = unshifted) -> StepWindow:
        """The steps of a schedule in which they act."""
        return NEVER if self.is_off else StepWindow.between(self.start, self.end, sigma_at)

    def passes(self, sigmas: Sequence[float], sigma_at: SigmaAt) -> tuple[int, int]:
        """Calls of the model for a style picture, and the steps in which it acts.

        sigmas: of a run that ends at 0. The calls are those of the inversion and one a step.
        """
        window = self.window(sigma_at)
        acting = [sigma for sigma in sigmas[:-1] if window.contains(sigma)]
        if not acting:
            return 0, 0
        inverted = sum(sigma <= acting[0] + 1e-6 for sigma in _rising(sigmas))
        return inverted + 1 + len(acting), len(acting)

    def blocks(self, count: int) -> tuple[int, int]:
        """First and end of the blocks in which they act, of a model with so many; at least one."""
        first = min(count - 1, round(self.first_block * count))
        return first, max(first + 1, round(self.last_block * count))


def style_shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Shares of `count` style pictures, with sum 1, by weights; None is one for each.

    Raises ValueError for another number of weights, and for weights that are none.
    """
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(
            f"{there_are(count, 'style picture')} and {counted(len(weights), 'weight')} "
            f"({weights}); expected one weight a picture."
        )
    if not all(is_number(w) and math.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
        raise ValueError(
            f"The weights of the style pictures are {weights}; expected numbers from 0 up, one of "
            "them above 0."
        )
    return [weight / sum(weights) for weight in weights]


class Trajectory:
    """Latents of a picture along the flow, from the picture itself up, computed as needed.

    sigmas: those of the run, in any order. Between them latents lie on a straight line.

    An Euler step of the run from sigma s to a lower r is `x(r) = x(s) + (r - s) v(x(s), s)`, so its
    inverse needs the velocity at the latents that it looks for. These are guessed with the last
    velocity, which is close since the flow is nearly straight: one call of the model a step, and
    two at the first.
    """

    def __init__(self, latents: Tensor, sigmas: Sequence[float]):
        # Sigmas and latents, these on the device of the picture's own.
        self._points: list[tuple[float, Tensor]] = [(0.0, latents.float())]
        self._sigmas = _rising(sigmas)
        self._velocity: Tensor | None = None

    def at(self, sigma: float, evaluate: StylePass) -> Tensor:
        """Latents (B, C, h, w) at a sigma."""
        while self._points[-1][0] < sigma - 1e-6:
            self._extend(sigma, evaluate)
        for (low, before), (high, after) in zip(self._points, self._points[1:], strict=False):
            if sigma <= high:
                return torch.lerp(before, after, max(0.0, (sigma - low) / (high - low)))
        return self._points[-1][1]

    def _extend(self, sigma: float, evaluate: StylePass) -> None:
        """One step of the inversion, to the next of the run's sigmas or to `sigma` beyond them."""
        now, latents = self._points[-1]
        following = next((known for known in self._sigmas if known > now + 1e-6), sigma)
        distance, velocity = following - now, self._velocity
        if velocity is None:
            velocity = evaluate(latents, following, None)
        velocity = evaluate(latents + distance * velocity.to(latents), following, None)
        if not torch.isfinite(velocity).all():
            raise ValueError(
                f"The inversion of the style picture gave NaN or infinite values at sigma "
                f"{following:.4f}. Load the model as bf16 or fp32."
            )
        self._velocity = velocity
        self._points.append((following, latents + distance * velocity.to(latents)))


def _rising(sigmas: Sequence[float]) -> list[float]:
    """Sigmas of an inversion in rising order, with more steps below where a run ends above 0."""
    rising = sorted({float(sigma) for sigma in sigmas if sigma > 0})
    if not rising or min(sigmas) <= 0:
        return rising
    gaps = [high - low for low, high in zip(rising, rising[1:], strict=False)]
    steps = math.ceil(rising[0] / max([*gaps, 0.05]))
    return [rising[0] * step / steps for step in range(1, steps)] + rising


class Inversions:
    """Trajectories that runs with the same model, text and sigmas share, those of the last run."""

    def __init__(self):
        self._last: tuple[object, list[Trajectory]] | None = None

    def get(self, key: object, make: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        """The trajectories for a key, None for ones that no run shares."""
        if key is None:
            return make()
        if self._last is None or self._last[0] != key:
            self._last = key, make()
        return self._last[1]


@dataclass(frozen=True)
class StylePictures:
    """Style pictures of a run: latents (1 or B, C, h, w) of each, normalised, and its share.

    share_at: where in the image they act; None is everywhere.
    inversions: shared by runs, or None.
    """

    latents: Sequence[Tensor]
    shares: Sequence[float]
    share_at: ShareAt | None = None
    inversions: Inversions | None = None


class StyleRun:
    """The style pictures in a run.

    text: of their passes, (1, L, width); L may be 0.
    key: of the model and the text, for `Inversions`.

    `prepare` is called at each step, before the image's calls, and `keys` for each of these.
    """

    def __init__(
        self,
        settings: StyleSettings,
        pictures: StylePictures,
        text: TextStates,
        sigma_at: SigmaAt,
        key: object = None,
    ):
        used = [
            (own, share)
            for own, share in zip(pictures.latents, pictures.shares, strict=True)
            if share > 0
        ]
        self.settings, self.text = settings, text
        self._latents, self._shares = [own for own, _ in used], [share for _, share in used]
        self._share_at, self._key = pictures.share_at, key
        self._inversions = pictures.inversions or Inversions()
        self._window = settings.window(sigma_at)
        self._trajectories: list[Trajectory] | None = None
        # The sigma of a step, and of each picture its keys and values by block.
        self._step: tuple[float, list[dict[int, BlockStyle]]] | None = None

    def acts_at(self, sigma: float) -> bool:
        """True in a step that begins at a sigma."""
        return self._window.contains(sigma)

    def prepare(
        self, sigma: float, sigmas: Sequence[float], layers: int, evaluate: StylePass
    ) -> None:
        """Compute keys and values for a step that begins at a sigma; those before are freed.

        sigmas: of the run. layers: number of the model's blocks.
        """
        if self._step is not None and self._step[0] == sigma:
            return
        self._step = None
        if not self.acts_at(sigma):
            return
        if self._trajectories is None:
            key = None if self._key is None else (self._key, tuple(sigmas))
            self._trajectories = self._inversions.get(
                key, lambda: [Trajectory(own, sigmas) for own in self._latents]
            )
        points = [trajectory.at(sigma, evaluate) for trajectory in self._trajectories]
        self.record(sigma, points, layers, evaluate)

    def record(
        self, sigma: float, points: Sequence[Tensor], layers: int, evaluate: StylePass
    ) -> None:
        """Record the keys and values of each picture's latents (B, C, h, w) at a sigma."""
        recorded = []
        for latents in points:
            text, count = self.text.states.shape[1], token_count(latents)
            recorder = StyleRecorder(text, count, self.settings.blocks(layers))
            evaluate(latents, sigma, recorder)
            recorded.append(recorder.blocks)
        self._step = sigma, recorded

    def keys(
        self,
        sigma: float,
        transformer: Krea2Transformer,
        image: tuple[int, int],
        device: torch.device,
        tile: Tile | None = None,
    ) -> StyleKeys | None:
        """Keys and values for the image's calls of a step; None where no style acts.

        image: rows and columns of its tokens. tile: of it, which the call is for.
        """
        if self._step is None or self._step[0] != sigma:
            return None
        row, column = (0, 0) if tile is None else (tile.rows[0], tile.columns[0])
        settings = self.settings
        within = torch.ones(image[0] * image[1])
        if self._share_at is not None:
            within = self._share_at(*image)
        if tile is not None:
            within = tile.cut_tokens(within, image)
        if not bool((within > 0).any()):
            return None
        # Left of the image: at places of its own, and no further away than tokens of an image of
        # twice the width are from each other.
        shifts = [
            transformer.rotation((0, row, column - grid_size(own, PATCH)[1]), device)
            for own in self._latents
        ]
        factors = [settings.strength * share * within for share in self._shares]
        amount = settings.value_statistics * min(1.0, settings.strength) * within
        return StyleKeys(self._step[1], shifts, settings.key_scale, factors, self._shares, amount)
