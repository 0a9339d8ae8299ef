"""Distil Raw into a LoRA for few steps without guidance, by trajectory distribution matching.

After Luo and others, 2025 (arXiv 2503.06674). Three models share one frozen base: the teacher is
the base alone, the student and the fake model are adapters beside it. Or the base is a few-step
checkpoint, from which the student begins, and the teacher is the Raw it was made of. At a time
sigma, with a velocity v, an image is predicted as x0 = x - sigma v. An iteration:

1. The student walks its own steps from noise, without gradients.
2. The fake model learns the flow-matching loss on the student's predictions x0, so that it knows
   the student's distribution. It does so several times.
3. At one of the steps the student predicts again, with gradients. Its x0 is noised anew to a time
   tau in the interval of that step, and moved by

       x0_fake(x_tau) - x0_teacher(x_tau),    over the mean of |x0 - x0_teacher|,

   where the teacher has guidance: cond + g (cond - uncond). This is the gradient of the divergence
   of the student's distribution at tau from the teacher's.

No pictures are needed, only prompts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from krea2_model import Krea2Transformer
from krea2_model.checkpoints.loading import PartState, load_part
from krea2_model.checkpoints.transformer import STEPS_KEY
from krea2_model.config import RAW
from krea2_model.lora.few_steps import few_step_preset
from krea2_model.schedule import sigma_schedule
from krea2_model.transformer.backend import TORCH_BACKEND, Backend

from .config import DistilConfig
from .data.cache import Texts
from .data.prompts import digest_of, in_turn
from .data.regional import joined, read_batches
from .data.shapes import ASPECTS
from .data.texts import prompts_of
from .engine.loop import Measured, update
from .engine.rates import optimisers_of
from .engine.world import ALONE, World
from .flow import generator_of
from .session import OnStep, Session
from .settings.methods import Distil
from .weights.base import TrainingBackend, base_state, check_base, freeze_base, teacher_state
from .weights.roles import BASE, Roles

STUDENT, FAKE, TEACHER = "student", "fake", BASE
# Of the random numbers, beside those of other purposes.
_DISTIL = 2
# The shortest time within an interval, as a share of it: at 0 there is no noise to judge by.
_LEAST_SHARE = 0.02


def distil(
    config: DistilConfig, on_step: OnStep = lambda step, record: None, *, quiet: bool = False
) -> Path:
    """Distil as the settings say, or go on where the run's folder ends; returns the LoRA's file.

    Raises ValueError for prompts or files that cannot be used, before anything is loaded, and
    TrainingStopped for a loss that is not finite.
    """
    assert config.prompts.path is not None
    state, settings = base_state(config), config.distil
    batches = read_batches(config.prompts, state)
    source = None
    if settings.teacher is not None:
        source = teacher_state(settings.teacher, state.config, state.variant)
    texts = [*prompts_of(batches.rows, config.prompts.path), *batches.named]
    session = Session(config, texts=texts, quiet=quiet)
    session.check_run(digest_of(batches.rows))
    model = session.model
    teacher = None if source is None else _load_teacher(source, session)
    session.encode(prompts=batches.texts)
    guidance = settings.guidance
    guidance = ((teacher or model).preset or RAW).guidance if guidance is None else guidance
    session.sampler.preset = few_step_preset(max(settings.steps), model.preset)
    roles = session.make_roles((STUDENT, FAKE))
    if teacher is not None:
        freeze_base(teacher, config.memory, session.device)
    optimisers = {
        role: optimisers_of(roles.parameters(role).items(), config.training)
        for role in (STUDENT, FAKE)
    }
    matching = TrajectoryMatching(
        roles,
        settings,
        guidance,
        optimisers[FAKE],
        seed=config.training.seed,
        checkpointing=config.memory.checkpointing,
        train_text="text" in config.adapter.targets,
        world=session.world,
        teacher=teacher,
    )
    batch, seed = config.training.batch, config.training.seed
    accumulate, begun = config.training.accumulate, dict[int, Batch]()
    side = config.prompts.size or (model.preset or RAW).size
    empty = session.cache.texts([""], session.device)

    def begin(step: int, part: int) -> Batch:
        number = step * accumulate + part
        random = Random(f"dropout {seed} {number}")
        chosen = batches.draw(batch, number, seed)
        prompts = [
            "" if random.random() < settings.dropout else batches.prompts[row] for row in chosen
        ]
        texts = batches.read(chosen, prompts, session.cache, session.device)
        random = Random(f"shape {seed} {number}")
        width, height = config.prompts.draw_size(side, random, ASPECTS)
        return matching.begin(number, (batch, 16, height // 8, width // 8), texts, step)

    def loss_of(number: int) -> Measured:
        step, part = divmod(number, accumulate)
        own = session.world.own(accumulate)
        if part == own[0]:
            # The fake model learns from all batches of a step before the student does.
            begun.clear()
            begun.update((one, begin(step, one)) for one in own)
            matching.follow(list(begun.values()), accumulate)
        return matching.loss(begun[part], empty)

    return session.run(
        roles.parameters(STUDENT) | roles.parameters(FAKE),
        loss_of,
        digest_of(batches.rows),
        on_step,
        optimisers=[*optimisers[STUDENT], *optimisers[FAKE]],
        shipped=roles.adapters[STUDENT],
        metadata={STEPS_KEY: str(max(settings.steps))},
    )


def _load_teacher(state: PartState, session: Session) -> Krea2Transformer:
    """The Raw that is distilled, in main memory. Raises ValueError for one in other bits."""
    teacher = load_part(state, dtype=session.dtype, keep_quantised=True)
    try:
        check_base(teacher, session.config.memory.base)
    except ValueError as error:
        raise ValueError(f"distil.teacher is {state.path}: {error}") from error
    return teacher


@dataclass(frozen=True)
class Walk:
    """A student's way: states and predicted images (K, B, 16, h, w), sigmas (K + 1,)."""

    states: Tensor
    images: Tensor
    sigmas: Tensor


@dataclass
class Batch:
    """A batch of a step: its prompts, the student's way, and the random numbers that are left.

    fake_losses: of the fake model's updates, for the log.
    """

    texts: Texts
    walk: Walk
    generator: torch.Generator
    fake_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Chosen:
    """A step of the way for each picture: latents and images (B, 16, h, w), the step's times (B,).

    tau: times (B,) in the steps' intervals; noise (B, 16, h, w) for them.
    """

    latents: Tensor
    images: Tensor
    times: Tensor
    tau: Tensor
    noise: Tensor


class TrajectoryMatching:
    """The student's loss of a step, after the fake model's updates.

    guidance: of the teacher, in Krea's convention. optimisers: of the fake model. teacher: None is
    the roles' base.
    """

    def __init__(
        self,
        roles: Roles,
        settings: Distil,
        guidance: float,
        optimisers: Sequence[torch.optim.Optimizer],
        *,
        seed: int = 0,
        checkpointing: bool = True,
        train_text: bool = False,
        world: World = ALONE,
        teacher: Krea2Transformer | None = None,
    ):
        self.teacher = teacher
        self.roles, self.settings, self.guidance, self.world = roles, settings, guidance, world
        self.optimisers, self.seed, self.checkpointing = optimisers, seed, checkpointing
        self.train_text = train_text
        self.schedules = [sigma_schedule(steps, settings.mu) for steps in settings.steps]
        self._fake = list(roles.parameters(FAKE).values())

    def begin(self, number: int, shape: Sequence[int], texts: Texts, step: int) -> Batch:
        """A batch, by its number in the run, for latents of a shape (B, 16, h, w).

        step: of the run. All of its batches have one schedule: processes that share the weights
            call the model as often as each other.
        """
        generator = generator_of(self.seed, number, _DISTIL)
        schedule = self.schedules[in_turn(len(self.schedules), 1, step, self.seed)[0]]
        noise = torch.randn(tuple(shape), generator=generator).to(texts.taps.device)
        return Batch(texts, self._walk(noise, schedule, texts), generator)

    def follow(self, batches: Sequence[Batch], accumulate: int) -> None:
        """Update the fake model on the student's predictions.

        batches: this process's, of `accumulate` that each update takes the mean over.
        """
        for _ in range(self.settings.fake_updates):
            for batch in batches:
                loss = self._fake_loss(self._choose(batch.walk, batch.generator), batch.texts)
                (loss * (self.world.shares / accumulate)).backward()
                batch.fake_losses.append(float(loss.detach()))
            mean = sum(batch.fake_losses[-1] for batch in batches) / len(batches)
            mean = self.world.mean({"loss": mean})["loss"]
            update(
                self._fake, self.optimisers, 1.0, mean, "The loss of the fake model",
                world=self.world,
            )  # fmt: skip

    def loss(self, batch: Batch, empty: Texts) -> Measured:
        """The student's loss of a batch."""
        chosen = self._choose(batch.walk, batch.generator)
        velocity = self._velocity(STUDENT, chosen.latents, chosen.times, batch.texts)
        image = chosen.latents - _spread(chosen.times) * velocity
        direction = self._direction(image.detach(), chosen, batch.texts, empty)
        # Half of the squared distance to a fixed target has the direction as its gradient.
        loss = 0.5 * (image - (image - direction).detach()).square().mean()
        fake = batch.fake_losses
        return Measured(loss, {"fake loss": sum(fake) / len(fake)})

    @torch.no_grad()
    def _walk(self, latents: Tensor, schedule: Sequence[float], texts: Texts) -> Walk:
        """The student's latents at the beginning of each step, and its predictions of the image."""
        states, images = [], []
        for now, then in itertools.pairwise(schedule):
            times = latents.new_full((len(latents),), now)
            velocity = self._velocity(STUDENT, latents, times, texts)
            states.append(latents)
            images.append(latents - now * velocity)
            latents = latents + (then - now) * velocity
        return Walk(torch.stack(states), torch.stack(images), torch.tensor(schedule))

    def _choose(self, walk: Walk, generator: torch.Generator) -> Chosen:
        """A step for each picture, with a time in its interval and noise."""
        steps, count = walk.states.shape[:2]
        index = torch.tensor(_below(steps, count, generator))
        share = _LEAST_SHARE + (1 - _LEAST_SHARE) * torch.rand(count, generator=generator)
        now, then = walk.sigmas[index], walk.sigmas[index + 1]
        noise = torch.randn(walk.states.shape[1:], generator=generator)
        device, rows = walk.states.device, torch.arange(count)
        return Chosen(
            walk.states[index, rows],
            walk.images[index, rows],
            now.to(device),
            (then + (now - then) * share).to(device),
            noise.to(device),
        )

    def _fake_loss(self, chosen: Chosen, texts: Texts) -> Tensor:
        image, noise, tau = chosen.images, chosen.noise, chosen.tau
        noisy = torch.lerp(image, noise, _spread(tau))
        velocity = self._velocity(FAKE, noisy, tau, texts)
        return (velocity - (noise - image)).square().mean()

    @torch.no_grad()
    def _direction(self, image: Tensor, chosen: Chosen, texts: Texts, empty: Texts) -> Tensor:
        """Where a predicted image should not go: towards the fake model, from the teacher."""
        tau, times = chosen.tau, _spread(chosen.tau)
        noisy = torch.lerp(image, chosen.noise, times)
        fake = noisy - times * self._velocity(FAKE, noisy, tau, texts)
        conditional = self._velocity(TEACHER, noisy, tau, texts)
        if self.guidance:
            unconditional = self._velocity(TEACHER, noisy, tau, empty.repeated(len(image)))
            conditional = conditional + self.guidance * (conditional - unconditional)
        teacher = noisy - times * conditional
        scale = (image - teacher).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-4)
        return (fake - teacher) / scale

    def _velocity(self, role: str, latents: Tensor, times: Tensor, texts: Texts) -> Tensor:
        other = self.teacher if role == TEACHER else None
        with self.roles.acting(role) if other is None else nullcontext(other) as model:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text):
                states, mask, groups = joined(texts, model, latents)
            backend: Backend = TORCH_BACKEND
            if self.checkpointing or groups is not None:
                # Blocks that are computed again in the backward pass are in the same role there.
                acting = functools.partial(self.roles.acting, role)
                backend = TrainingBackend(acting, groups, keeps=not self.checkpointing)
            return model(latents, times, states, mask, backend=backend).float()


def _spread(times: Tensor) -> Tensor:
    """Times (B,) as they multiply latents."""
    return times[:, None, None, None]


def _below(limit: int, count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(limit, (count,), generator=generator).tolist()
