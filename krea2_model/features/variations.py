"""Neighbours of a picture and ways between two: noise on the sphere, and prompts blended.

Noise of many dimensions lies near a sphere, and the model knows noise from there alone: a plain
average of two seeds' noise has too small a norm and gives a flat picture. So the noise of a
neighbour lies on the arc between them (slerp). Its directions are interpolated by the angle and its
norm in proportion; every such noise is as normal as both are.

Prompts are blended by the velocities that the model predicts for them, in proportion. Encoded
prompts differ in their number of tokens, and a token of one has no partner in the other, so means
of encodings lie where the model was never trained: on krea2-nano a way through them jumps between
two frames by up to twice the distance of its ends, by pictures that neither prompt asks for.
A blend takes a second call of the model a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_type, counted, is_number, is_whole
from ..schedule import check_seed

# Enough to change a picture visibly and keep what it shows.
STRENGTH = 0.3


@dataclass(frozen=True)
class Variation:
    """Noise moved towards that of another seed.

    seed: of the other noise; image i of a batch uses seed + i, or a list has one for each.
    strength: 0 is the picture's own noise and 1 that of the other seed, both to the bit; a number,
        or one for each image.

    Raises ValueError for values out of range.
    """

    seed: int | Sequence[int]
    strength: float | Sequence[float] = STRENGTH

    def __post_init__(self):
        for seed in [self.seed] if is_whole(self.seed) else _list("seed", self.seed):
            check_seed(seed)
        for strength in self._strengths():
            check_share("A variation's strength", strength)

    def _strengths(self) -> list:
        if is_number(self.strength):
            return [self.strength]
        return _list("strength", self.strength)

    def strengths(self, batch: int) -> list[float]:
        """The strength of each image. Raises ValueError for a list of another length."""
        found = self._strengths()
        if is_number(self.strength):
            return found * batch
        if len(found) != batch:
            raise ValueError(
                f"A variation has {counted(len(found), 'strength')}; expected a number, or "
                f"{batch}: one an image."
            )
        return found

    @classmethod
    def of(cls, vary: Variation | Sequence[Variation] | None) -> tuple[Variation, ...]:
        """Variations as an argument gives them. Raises ValueError for anything else."""
        if vary is None:
            return ()
        several = vary if isinstance(vary, (list, tuple)) else (vary,)
        for entry in several:
            check_type("vary", entry, cls, "a Variation, or a list of them")
        return tuple(several)


@dataclass(frozen=True)
class PromptBlend:
    """Another prompt that the picture's own is blended with.

    share: 0 is the picture's prompt alone and 1 the other alone, both to the bit.

    Raises ValueError for values out of range.
    """

    prompt: str
    share: float = 0.5

    def __post_init__(self):
        check_type("A blend's prompt", self.prompt, str, "a text")
        check_share("A blend's share", self.share)


def check_share(name: str, value: object) -> float:
    """A number from 0 to 1. Raises ValueError for anything else."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} is {value!r}; expected 0 (the picture) to 1 (the other).")
    return value


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Between two noises of one shape, along the arc (Shoemake, 1985): 0 is start, 1 is end.

    Both ends are exact, and so are equal ends; the norm goes from one's to the other's.
    """
    if share == 0 or torch.equal(start, end):
        return start
    if share == 1:
        return end
    one, other = start.double(), end.double()
    norms = one.norm(), other.norm()
    if min(norms) == 0:
        raise ValueError(
            "A noise to vary is zero everywhere, so that no way leads from it. Use RandomNoise in "
            "place of DisableNoise."
        )
    one, other = one / norms[0], other / norms[1]
    angle = torch.acos((one * other).sum().clamp(-1, 1))
    sine = torch.sin(angle)
    if sine < 1e-6:  # no arc between them
        return torch.lerp(start, end, share)
    direction = (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / sine
    return (direction * torch.lerp(*norms, share)).to(start.dtype)


def slerp_each(start: Tensor, end: Tensor, shares: Sequence[float]) -> Tensor:
    """`slerp` of each image of batches (B, ...)."""
    return torch.stack([slerp(*each) for each in zip(start, end, shares, strict=True)])


def frame_shares(frames: int) -> list[float]:
    """The shares of a walk's frames, from 0 to 1 in equal steps."""
    if not is_whole(frames) or frames < 2:
        raise ValueError(f"frames is {frames!r}; expected a whole number from 2 up, both ends.")
    return [frame / (frames - 1) for frame in range(frames)]


def _list(name: str, values: object) -> list:
    if isinstance(values, str) or not isinstance(values, Iterable) or not (found := list(values)):
        raise ValueError(f"A variation's {name} is {values!r}; expected a number or a list.")
    return found
