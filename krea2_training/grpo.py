"""GRPO on a rectified flow: learn from scores of the model's own pictures.

Flow-GRPO (Liu and others, 2025, arXiv 2505.05470) turns the sampler's ODE into an SDE that has the
same distribution at every time, so that each step draws from a Gaussian whose likelihood is known.
Of a group of pictures for one prompt, those with scores above the group's mean become likelier, the
others less. Raw is sampled and trained without guidance: what guidance does is learned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from krea2_model.transformer.backend import TORCH_BACKEND, Backend

from .data.cache import Texts
from .weights.roles import BASE, Roles


@dataclass(frozen=True)
class Step:
    """A random step from sigma `now` to `then`: a Gaussian around a mean, of deviation `noise`.

    The model's velocity v splits the latents x into an image x - now v and a noise x + (1 - now) v.
    Part of that noise is replaced by a fresh one of deviation s:

        mean = (1 - then) (x - now v) + sqrt(then^2 - s^2) (x + (1 - now) v)

    so image and noise have the shares that the ODE gives them, at any number of steps. For small
    steps this is the paper's SDE with s = sigma_t sqrt(now - then). With s = 0 it is Euler's step.
    """

    now: float
    then: float
    noise: float = 0.0

    @property
    def factor(self) -> float:
        """The derivative of the mean with respect to the velocity."""
        return self._kept * (1 - self.now) - (1 - self.then) * self.now

    @property
    def _kept(self) -> float:
        """The share of the noise that stays."""
        return math.sqrt(max(0.0, self.then**2 - self.noise**2))

    def mean(self, latents: Tensor, velocity: Tensor) -> Tensor:
        return (1 - self.then + self._kept) * latents + self.factor * velocity

    def log_likelihood(self, after: Tensor, mean: Tensor) -> Tensor:
        """Logarithm of the Gaussian's density, as a mean over a picture's numbers (B,).

        The mean, and not the sum, as in the paper's code: the ratio of two policies is then of one
        size for pictures of every size.
        """
        error = (after - mean).square().flatten(1).mean(1) / (2 * self.noise**2)
        return -error - math.log(self.noise * math.sqrt(2 * math.pi))

    def divergence(self, velocity: Tensor, reference: Tensor) -> Tensor:
        """KL of the step from that of another velocity, as a mean over a picture's numbers (B,)."""
        error = (velocity - reference).square().flatten(1).mean(1)
        return error * self.factor**2 / (2 * self.noise**2)


def random_steps(sigmas: Sequence[float], level: float) -> list[Step]:
    """The steps of a schedule with the paper's noise, `sigma_t = level sqrt(t / (1 - t))`.

    At pure noise, where that is infinite, t is the next sigma. The last step adds no noise.
    """
    steps = []
    for now, then in itertools.pairwise(sigmas):
        time = min(now, sigmas[1])
        noise = level * math.sqrt(time / (1 - time) * (now - then))
        steps.append(Step(now, then, min(noise, then)))
    return steps


@dataclass
class Rollout:
    """A group of G pictures of one prompt, and the random steps that made them.

    texts: the prompt, once; latents (G, 16, h, w) of the pictures. steps: the random ones, with the
    latents (G, 16, h, w) before and after each, and its log-likelihoods (G,) under the policy that
    drew it. advantages (G,) are there once the pictures have been scored.
    """

    texts: Texts
    latents: Tensor
    steps: list[Step] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    likelihoods: list[Tensor] = field(default_factory=list)
    advantages: Tensor | None = None


@dataclass(frozen=True)
class GroupLoss:
    """The loss of one random step for some pictures of a group, and the log's numbers of it (B,).

    divergence from the reference, before it is weighted; clipped: 1 where the gradient is cut.
    """

    loss: Tensor
    divergence: Tensor
    clipped: Tensor


class Policy:
    """A model with adapters as a policy; the reference is the model without them.

    clip: most that a step's likelihood may change, as a share, before its gradient is cut; 0 is no
    limit. kl: weight of the divergence from the reference. batch: pictures at once. train_text:
    adapters are in the text fusion too.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        clip: float,
        kl: float,
        batch: int,
        backend: Backend = TORCH_BACKEND,
        train_text: bool = False,
    ):
        self.roles, self.clip, self.kl, self.batch = roles, clip, kl, batch
        self.backend, self.train_text = backend, train_text

    @torch.no_grad()
    def roll_out(
        self,
        texts: Texts,
        noise: Tensor,
        steps: Sequence[Step],
        random: Sequence[int],
        generator: torch.Generator,
    ) -> Rollout:
        """Paint a group of a prompt from noise (G, 16, h, w).

        random: the indices of the steps that draw noise; the others are the ODE's. generator: on
        the CPU, so that every device draws the same noise.
        """
        fused, rollout = texts.fuse(self.roles.model), Rollout(texts, noise)
        for index, step in enumerate(steps):
            step = step if index in random else replace(step, noise=0.0)
            before = rollout.latents
            parts = [self._velocity(part, step, fused) for part in before.split(self.batch)]
            rollout.latents = mean = step.mean(before, torch.cat(parts))
            if step.noise:
                fresh = torch.randn(mean.shape, generator=generator).to(mean)
                rollout.latents = mean + step.noise * fresh
                rollout.steps.append(step)
                rollout.before.append(before)
                rollout.after.append(rollout.latents)
                rollout.likelihoods.append(step.log_likelihood(rollout.latents, mean))
        return rollout

    def losses(self, rollout: Rollout) -> Iterator[GroupLoss]:
        """The losses of a group that has been scored, a step and a batch at a time."""
        assert rollout.advantages is not None
        for step, *tensors in zip(
            rollout.steps, rollout.before, rollout.after, rollout.likelihoods, strict=True
        ):
            parts = (tensor.split(self.batch) for tensor in (*tensors, rollout.advantages))
            for before, after, likelihoods, advantages in zip(*parts, strict=True):
                yield self._loss(step, rollout.texts, before, after, likelihoods, advantages)

    def _loss(
        self,
        step: Step,
        texts: Texts,
        before: Tensor,
        after: Tensor,
        likelihoods: Tensor,
        advantages: Tensor,
    ) -> GroupLoss:
        with torch.set_grad_enabled(self.train_text):
            fused = texts.fuse(self.roles.model)
        velocity = self._velocity(before, step, fused)
        now = step.log_likelihood(after, step.mean(before, velocity))
        loss, clipped = clipped_loss(now - likelihoods, advantages, self.clip)
        divergence = torch.zeros_like(loss)
        if self.kl:
            with torch.no_grad(), self.roles.acting(BASE) as model:
                reference = self._velocity(before, step, texts.fuse(model))
            divergence = step.divergence(velocity, reference)
            loss = loss + self.kl * divergence
        return GroupLoss(loss, divergence.detach(), clipped)

    def _velocity(self, latents: Tensor, step: Step, fused: Tensor) -> Tensor:
        times = latents.new_full((len(latents),), step.now)
        fused = fused.expand(len(latents), -1, -1)
        return self.roles.model(latents, times, fused, backend=self.backend).float()


def clipped_loss(change: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss `-min(A r, A clip(r))` (B,), and 1 where its gradient is cut, else 0.

    change: of the log-likelihood (B,) since the step was drawn, so that the ratio r is its
        exponential.
    """
    ratio = change.exp()
    limited = ratio.clamp(1 - clip, 1 + clip) if clip else ratio
    free, cut = -advantages * ratio, -advantages * limited
    return torch.maximum(free, cut), (cut > free).float().detach()


def advantages_of(
    scores: Sequence[Tensor], weights: Sequence[float], spread: float
) -> Tensor | None:
    """Advantages (G,) of a group: each reward's deviations from its mean, in standard deviations.

    scores: (G,) of each reward. They are weighted after that, so that none counts more for the
    range of its scores. A reward whose standard deviation is at most `spread` says nothing about
    the group; None if that is so for all.
    """
    total, is_dull = torch.zeros_like(scores[0]), True
    for one, weight in zip(scores, weights, strict=True):
        deviation = one.std(correction=0)
        if deviation > spread:
            total += weight * (one - one.mean()) / deviation
            is_dull = False
    return None if is_dull else total / sum(abs(weight) for weight in weights)


def diversity_of(pictures: Tensor) -> float:
    """Root mean square difference of the pixels of two pictures (G, H, W, 3), over all pairs."""
    flat = pictures.flatten(1)
    pairs = itertools.combinations(range(len(flat)), 2)
    return float(torch.stack([(flat[a] - flat[b]).square().mean().sqrt() for a, b in pairs]).mean())
