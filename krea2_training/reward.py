"""Train an adapter on scores of its own pictures: what `krea2 reward` runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from krea2_model.config import RAW
from krea2_model.schedule import resolve_mu, sigma_schedule
from krea2_model.transformer.patches import token_count

from .config import RewardConfig
from .data.prompts import COLUMN, Row, Selection, digest_of
from .data.shapes import Ratio, shape_of
from .data.texts import prompts_of
from .encoded import reward_rows
from .engine.loop import Measured, update
from .engine.rates import optimisers_of
from .flow import generator_of
from .grpo import Policy, Rollout, Step, advantages_of, diversity_of, random_steps
from .rewards import Reward
from .session import OnStep, Session
from .weights.roles import Roles

# Of the random numbers, beside those of other purposes.
_ROLLOUT, _GROUP = 3, 5
# Width to height of pictures where neither a row nor a setting says it.
_SQUARE = (1.0, 1.0)


def reward(
    config: RewardConfig, on_step: OnStep = lambda step, record: None, *, quiet: bool = False
) -> Path:
    """Train as the settings say, or go on where the run's folder ends; returns the result's file.

    Raises ValueError for prompts, rewards or files that cannot be used, before anything is loaded,
    and TrainingStopped for a loss that is not finite.
    """
    assert config.prompts.path is not None
    rows = reward_rows(config)
    rewards = [Reward(name) for name in config.reward.rewards]
    texts = prompts_of(rows, config.prompts.path)
    session = Session(config, texts=texts, quiet=quiet)
    session.check_run(digest_of(rows))
    session.encode(prompts=[row[COLUMN] for row in rows])
    learner = Learner(config, session, session.make_roles(("policy",)), rows, rewards)
    return session.run(
        learner.parameters,
        learner.loss,
        digest_of(rows),
        on_step,
        optimisers=learner.optimisers,
        accumulate=session.world.shares,  # a loss of each process's groups
        prepare=learner.prepare,
        notes=learner.selection.notes,
    )


@dataclass
class Scored:
    """A step's groups with differences, those of this process, and the numbers of the log.

    groups: by their place among all of the step that have differences. owners: the share of the
    process that has the group at each place. idle: a group to compute without learning from it.
    """

    groups: dict[int, Rollout]
    owners: list[int]
    idle: Rollout
    numbers: dict[str, float]


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
        self.world = session.world
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
        self.preset = session.model.preset or RAW
        self.side = config.prompts.size or self.preset.size
        self.ratios = config.prompts.ratios or [_SQUARE]

    def prepare(self, number: int) -> None:
        """Paint and score this process's groups of a step."""
        generator = generator_of(self.training.seed, number, _ROLLOUT)
        # The last step adds no noise.
        order = torch.randperm(self.settings.rollout_steps - 1, generator=generator)
        noisy = order[: self.settings.random_steps].tolist()
        chosen = self.selection.choose(self.settings.groups)
        groups: dict[int, Rollout] = {}
        found: dict[str, list[float]] = {}
        for place in self.world.own(len(chosen)):
            index = number * len(chosen) + place
            of_group = generator_of(self.training.seed, index, _GROUP)
            ratio = Random(f"shape {self.training.seed} {index}").choice(self.ratios)
            group, numbers = self._group(self.rows[chosen[place]], ratio, noisy, of_group)
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
            groups[place] = group
        self.mine = groups
        self.chosen = chosen
        self.found = {name: sum(values) / len(values) for name, values in found.items()}

    def _share(self) -> Scored:
        """What all processes have found; they ask for it together."""
        own = [place for place, group in self.mine.items() if group.advantages is not None]
        gathered = self.world.gathered(own)
        owner_of = {place: share for share, places in enumerate(gathered) for place in places}
        places = sorted(owner_of)
        dull = [index for place, index in enumerate(self.chosen) if place not in owner_of]
        self.selection.advance(dull)
        numbers = self.world.mean(self.found)
        idle = next(iter(self.mine.values()))
        if idle.advantages is None:
            idle = replace(idle, advantages=torch.zeros_like(idle.likelihoods[0]))
        return Scored(
            {places.index(place): self.mine[place] for place in own},
            [owner_of[place] for place in places],
            idle,
            {**numbers, "dropped": len(dull) / len(self.chosen)},
        )

    def loss(self, number: int) -> Measured:
        """The mean loss of the step's groups; its gradients, and updates before the last, are made.

        The last update is the loop's.
        """
        scored, settings = self._share(), self.settings
        count = len(scored.owners)
        updates = min(settings.updates, count)
        total, numbers = 0.0, {"kl": 0.0, "clipped": 0.0}
        for first in range(updates):
            if first:
                # Of the updates between those of the loop, for other groups of the same pictures.
                update(
                    self.parameters.values(), self.optimisers, self.training.clip, total,
                    world=self.world,
                )  # fmt: skip
            part = range(first, count, updates)
            pictures = len(part) * settings.group_size * settings.random_steps
            # Losses and gradients become the mean over the shares.
            weight = self.world.shares / pictures
            own = [scored.groups[place] for place in part if place in scored.groups]
            for group in own:
                for one in self.policy.losses(group):
                    (one.loss.sum() * weight).backward()
                    share = weight / updates
                    total += share * float(one.loss.detach().sum())
                    numbers["kl"] += share * float(one.divergence.sum())
                    numbers["clipped"] += share * float(one.clipped.sum())
            # Sharded weights are gathered by all processes at once, so each calls as often.
            most = max(Counter(scored.owners[place] for place in part).values())
            for _ in range(most - len(own)):
                for one in self.policy.losses(scored.idle):
                    (one.loss.sum() * 0).backward()
        return Measured(torch.tensor(total), {**scored.numbers, **numbers})

    def _group(
        self, row: Row, ratio: Ratio, noisy: Sequence[int], generator: torch.Generator
    ) -> tuple[Rollout, dict[str, float]]:
        """A group of a prompt, with its advantages, and its numbers for the log.

        ratio: of the pictures' sides, where the row names none. noisy: the steps that draw noise.
        """
        device = self.session.device
        texts = self.session.cache.texts([row[COLUMN]], device)
        width, height = shape_of(row, self.side, ratio)
        shape = (self.settings.group_size, 16, height // 8, width // 8)
        noise = torch.randn(shape, generator=generator).to(device)
        group = self.policy.roll_out(texts, noise, self._steps_for(noise), noisy, generator)
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

    def _steps_for(self, latents: Tensor) -> list[Step]:
        """The steps of a rollout of latents (G, 16, h, w)."""
        mu = self.training.shift
        if mu is None:
            mu = resolve_mu(self.preset, token_count(latents))
        return random_steps(sigma_schedule(self.settings.rollout_steps, mu), self.settings.noise)

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        """Pictures (G, H, W, 3) in [0, 1]."""
        images = torch.cat([self.vae.decode(one[None]) for one in latents]).float().cpu()
        return (images / 2 + 0.5).clamp(0, 1).movedim(1, -1).contiguous()
