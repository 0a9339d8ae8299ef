"""Train an adapter on scores of its own pictures: what `krea2 reward` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from krea2_model.config import RAW
from krea2_model.schedule import resolve_mu, sigma_schedule
from krea2_model.transformer.patches import token_count

from .config import RewardConfig
from .flow import generator_of
from .grpo import Policy, Rollout, Step, advantages_of, diversity_of, random_steps
from .loop import Measured, update
from .prompts import COLUMN, Row, Selection, digest_of, read_prompts
from .rates import optimisers_of
from .rewards import Reward
from .roles import Roles
from .session import OnStep, Session

# Of the random numbers, beside those of other purposes.
_ROLLOUT = 3


def reward(config: RewardConfig, on_step: OnStep = lambda step, record: None) -> Path:
    """Train as the settings say, or go on where the run's folder ends; returns the result's file.

    Raises ValueError for prompts, rewards or files that cannot be used, before anything is loaded,
    and TrainingStopped for a loss that is not finite.
    """
    assert config.prompts.path is not None
    rows = read_prompts(config.prompts.path)
    if config.reward.groups > len(rows):
        raise ValueError(
            f"reward.groups is {config.reward.groups}; expected at most {len(rows)}, the prompts "
            f"of {config.prompts.path}."
        )
    rewards = [Reward(name) for name in config.reward.rewards]
    session = Session(config)
    session.encode(prompts=[row[COLUMN] for row in rows])
    learner = Learner(config, session, session.make_roles(("policy",)), rows, rewards)
    return session.run(
        learner.parameters,
        learner.loss,
        digest_of(rows),
        on_step,
        optimisers=learner.optimisers,
        prepare=learner.prepare,
        notes=learner.selection.notes,
    )


@dataclass
class Scored:
    """The pictures of a step: groups with differences, and the numbers of the log."""

    groups: list[Rollout] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)


class Learner:
    """The steps of a run: paint and score groups, then learn from their differences."""

    def __init__(
        self,
        config: RewardConfig,
        session: Session,
        roles: Roles,
        rows: Sequence[Row],
        rewards: Sequence[Reward],
    ):
        self.session, self.rows, self.rewards = session, rows, rewards
        self.settings, self.training = config.reward, config.training
        self.weights = self.settings.weights or (1.0,) * len(rewards)
        self.selection = Selection(len(rows), self.training.seed, self.settings.rest)
        self.parameters = roles.parameters("policy")
        self.optimisers = optimisers_of(self.parameters.items(), self.training)
        self.vae = session.cache.encoders.vae()
        self.policy = Policy(
            roles,
            clip=self.settings.clip,
            kl=self.settings.kl,
            batch=self.training.batch,
            backend=session.backend,
            train_text="text" in config.adapter.targets,
        )
        preset = session.model.preset or RAW
        side = (config.prompts.size or preset.size) // 8
        self.shape = (self.settings.group_size, 16, side, side)
        mu = self.training.shift
        if mu is None:
            mu = resolve_mu(preset, token_count(torch.empty(self.shape, device="meta")))
        self.steps = random_steps(
            sigma_schedule(self.settings.rollout_steps, mu), self.settings.noise
        )

    def prepare(self, number: int) -> None:
        """Paint and score the groups of a step."""
        generator = generator_of(self.training.seed, number, _ROLLOUT)
        # The last step adds no noise.
        order = torch.randperm(len(self.steps) - 1, generator=generator)
        random = order[: self.settings.random_steps].tolist()
        scored, dull = Scored(), []
        found: dict[str, list[float]] = {}
        for index in self.selection.choose(self.settings.groups):
            group, numbers = self._group(self.rows[index], self.steps, random, generator)
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
            if group.advantages is None:
                dull.append(index)
            else:
                scored.groups.append(group)
        scored.numbers = {name: sum(values) / len(values) for name, values in found.items()}
        scored.numbers["dropped"] = len(dull) / self.settings.groups
        self.selection.advance(dull)
        self.scored = scored

    def loss(self, number: int) -> Measured:
        """The mean loss of the step's groups; its gradients, and updates before the last, are made.

        The last update is the loop's.
        """
        groups, updates = self.scored.groups, self.settings.updates
        parts = [part for first in range(updates) if (part := groups[first::updates])]
        total, numbers = 0.0, {"kl": 0.0, "clipped": 0.0}
        for place, part in enumerate(parts):
            if place:
                # Of the updates between those of the loop, for other groups of the same pictures.
                update(self.parameters.values(), self.optimisers, self.training.clip, total)
            pictures = len(part) * self.settings.group_size * self.settings.random_steps
            for group in part:
                for one in self.policy.losses(group):
                    (one.loss.sum() / pictures).backward()
                    share = 1 / (pictures * len(parts))
                    total += share * float(one.loss.detach().sum())
                    numbers["kl"] += share * float(one.divergence.sum())
                    numbers["clipped"] += share * float(one.clipped.sum())
        return Measured(torch.tensor(total), {**self.scored.numbers, **numbers})

    def _group(
        self, row: Row, steps: Sequence[Step], random: Sequence[int], generator: torch.Generator
    ) -> tuple[Rollout, dict[str, float]]:
        """A group of a prompt, with its advantages, and its numbers for the log."""
        device = self.session.device
        texts = self.session.cache.texts([row[COLUMN]], device)
        noise = torch.randn(self.shape, generator=generator).to(device)
        group = self.policy.roll_out(texts, noise, steps, random, generator)
        pictures = self._decoded(group.latents)
        scores = [
            torch.from_numpy(score(pictures.numpy(), [row] * len(pictures)))
            for score in self.rewards
        ]
        advantages = advantages_of(scores, self.weights, self.settings.spread)
        if advantages is not None:
            group.advantages = advantages.float().to(device)
        means = [float(one.mean()) for one in scores]
        total = sum(abs(weight) for weight in self.weights)
        numbers = {
            "reward": sum(w * mean for w, mean in zip(self.weights, means, strict=True)) / total,
            "diversity": diversity_of(pictures),
        }
        if len(means) > 1:
            names = (f"reward {reward.name}" for reward in self.rewards)
            numbers |= dict(zip(names, means, strict=True))
        return group, numbers

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        """Pictures (G, H, W, 3) in [0, 1]."""
        images = torch.cat([self.vae.decode(one[None]) for one in latents]).float().cpu()
        return (images / 2 + 0.5).clamp(0, 1).movedim(1, -1).contiguous()
