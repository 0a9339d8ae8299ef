"""A LoRA whose strength moves pictures between two descriptions: what `krea2 slider` runs.

After Gandikota and others, 2023 (Concept Sliders, arXiv 2311.12092), for velocities. At a state x
of the model's own way from noise to a picture of a prompt p, with a positive and a negative wording
of it, the LoRA at strength s = 1 and at s = -1 learns

    v_s(x, p) = v(x, p) + s scale (v(x, positive p) - v(x, negative p)),

where v is the model without it. No pictures are needed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from krea2_model import Krea2Transformer
from krea2_model.config import RAW
from krea2_model.schedule import resolve_mu, sigma_schedule
from krea2_model.transformer.backend import TORCH_BACKEND, Backend
from krea2_model.transformer.patches import token_count

from .config import SliderConfig
from .data.cache import Texts
from .data.prompts import COLUMN, digest_of, in_turn, read_prompts
from .data.texts import worded, worded_prompts, wordings_of
from .engine.loop import Measured
from .flow import generator_of
from .session import OnStep, Session
from .weights.adapters import set_strength
from .weights.base import TrainingBackend

# Of the random numbers, beside those of other purposes.
_SLIDER = 8
# Width to height of the pictures where no setting says it.
_ASPECTS = ((1, 1),)


def slider(
    config: SliderConfig, on_step: OnStep = lambda step, record: None, *, quiet: bool = False
) -> Path:
    """Train as the settings say, or go on where the run's folder ends; returns the LoRA's file.

    Raises ValueError for prompts or files that cannot be used, before anything is loaded, and
    TrainingStopped for a loss that is not finite.
    """
    assert config.prompts.path is not None
    rows = read_prompts(config.prompts.path)
    prompts = [row[COLUMN] for row in rows]
    settings, training = config.slider, config.training
    wordings = wordings_of(settings)
    texts = worded_prompts(rows, config.prompts.path, config.slider)
    session = Session(config, texts=texts, quiet=quiet)
    session.check_run(digest_of(rows))
    session.encode(prompts=[text for _, text in texts])
    parameters = session.make_trainable()
    model, cache, device = session.model, session.cache, session.device
    side = config.prompts.size or (model.preset or RAW).size
    slide = Slide(
        model,
        settings.scale,
        checkpointing=config.memory.checkpointing,
        train_text="text" in config.adapter.targets,
        weight=session.world.shares / training.accumulate,
    )

    def loss_of(number: int) -> Measured:
        generator = generator_of(training.seed, number, _SLIDER)
        chosen = [prompts[i] for i in in_turn(len(prompts), training.batch, number, training.seed)]
        texts = [cache.texts([worded(one, p) for p in chosen], device) for one in wordings]
        random = Random(f"shape {training.seed} {number}")
        width, height = config.prompts.draw_size(side, random, _ASPECTS)
        shape = (training.batch, 16, height // 8, width // 8)
        latents = torch.randn(shape, generator=generator).to(device)
        mu = training.shift
        if mu is None:
            mu = resolve_mu(model.preset or RAW, token_count(latents))
        sigmas = sigma_schedule(settings.steps, mu)
        # To the beginning of one of the steps, the same for all batches of an update: processes
        # that share the weights call the model as often as each other.
        step = number // training.accumulate
        count = 1 + in_turn(settings.steps, 1, step, training.seed)[0]
        latents = slide.walk(latents, sigmas[:count], texts[0])
        return slide.loss(latents, sigmas[count - 1], *texts)

    return session.run(parameters, loss_of, digest_of(rows), on_step)


@contextmanager
def at_strength(model: Krea2Transformer, strength: float) -> Iterator[None]:
    """A model whose adapters have a strength, and then 1 again."""
    set_strength(model, strength)
    try:
        yield
    finally:
        set_strength(model, 1.0)


class Slide:
    """The loss of a model with adapters at strengths 1 and -1.

    weight: as the loop weighs a loss, for the half whose gradients are made here.
    """

    def __init__(
        self,
        model: Krea2Transformer,
        scale: float,
        *,
        checkpointing: bool = True,
        train_text: bool = False,
        weight: float = 1.0,
    ):
        self.model, self.scale = model, scale
        self.checkpointing, self.train_text, self.weight = checkpointing, train_text, weight

    @torch.no_grad()
    def walk(self, latents: Tensor, sigmas: list[float], texts: Texts) -> Tensor:
        """Latents of the model without adapters, from noise (B, 16, h, w) along these sigmas."""
        for now, then in itertools.pairwise(sigmas):
            latents = latents + (then - now) * self._velocity(latents, now, texts, 0.0)
        return latents

    def loss(
        self, latents: Tensor, sigma: float, plain: Texts, positive: Texts, negative: Texts
    ) -> Measured:
        """The loss for latents (B, 16, h, w) at a time; the positive half's gradients are made."""
        with torch.no_grad():
            middle, up, down = (
                self._velocity(latents, sigma, texts, 0.0) for texts in (plain, positive, negative)
            )
            step = self.scale * (up - down)
        contrast = float((step.square().mean() / middle.square().mean()).sqrt())
        first = self._half(latents, sigma, plain, middle + step, 1.0)
        # Here, so that the activations of one half are held at a time.
        (self.weight * first).backward()
        second = self._half(latents, sigma, plain, middle - step, -1.0)
        return Measured(second + first.detach(), {"contrast": contrast})

    def _half(
        self, latents: Tensor, sigma: float, texts: Texts, target: Tensor, strength: float
    ) -> Tensor:
        return 0.5 * (self._velocity(latents, sigma, texts, strength) - target).square().mean()

    def _velocity(self, latents: Tensor, sigma: float, texts: Texts, strength: float) -> Tensor:
        times = latents.new_full((len(latents),), sigma)
        acting = functools.partial(at_strength, self.model, strength)
        # Blocks that are computed again in the backward pass have the same strength there.
        backend: Backend = TrainingBackend(acting) if self.checkpointing else TORCH_BACKEND
        with acting():
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text):
                states = texts.fuse(self.model)
            return self.model(latents, times, states, texts.mask, backend=backend).float()
