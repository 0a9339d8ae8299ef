"""Learn from pairs of pictures which one is preferred: direct preference optimisation on the flow.

After Wallace and others, 2023 (Diffusion-DPO, arXiv 2311.12908). A picture's likelihood is bounded
by its flow error e = |v(x_t, t) - (noise - x)|^2; the reference r is the error of the same model
without the adapters. With the winner w and the loser l at one time and with one noise:

    margin = (e_w - r_w) - (e_l - r_l)
    loss   = -log sigmoid(-beta margin) + hold beta max(0, e_w - r_w)

The first term alone asks for a margin only, and gets it by making both pictures less likely, the
loser more so: the model drifts. The second one holds the winner's likelihood up (as Pal and others,
2024, arXiv 2402.13228, do for language). The log has the drift: how far velocities are from the
reference's, as a share of their size.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_model.transformer.backend import TORCH_BACKEND, Backend
from krea2_model.transformer.model import Krea2Transformer

from .config import PreferConfig
from .data.cache import Batch, Texts
from .data.examples import Order, digest
from .data.pairs import read_pairs
from .data.texts import captions_of
from .engine.loop import Measured
from .flow import generator_of, noised, predict
from .session import OnStep, Session
from .settings.methods import Prefer
from .weights.adapters import set_strength

# Of the random numbers, beside those of other purposes.
_PREFER = 4


def prefer(
    config: PreferConfig, on_step: OnStep = lambda step, record: None, *, quiet: bool = False
) -> Path:
    """Learn as the settings say, or go on where the run's folder ends; returns the LoRA's file.

    Raises ValueError for pairs or files that cannot be used, before anything is loaded, and
    TrainingStopped for a loss that is not finite.
    """
    pairs = read_pairs(config.pairs)
    session = Session(config, texts=captions_of(pair.chosen.example for pair in pairs), quiet=quiet)
    pictures = [picture for pair in pairs for picture in (pair.chosen, pair.rejected)]
    dataset = digest([picture.example for picture in pictures], session.cache.hash_of)
    session.check_run(dataset)
    session.encode(pictures)
    parameters = session.make_trainable()
    settings = config.training
    order = Order([pair.chosen for pair in pairs], settings.batch, 0.0, settings.seed)
    cache, device = session.cache, session.device

    def loss_of(number: int) -> Measured:
        draws = order.batch(number)
        winner = cache.batch(draws, order, device)
        return preference_loss(
            session.model,
            winner.latents,
            cache.latents([pairs[draw.index].rejected for draw in draws], device),
            Texts(winner.taps, winner.mask),
            generator_of(settings.seed, number, _PREFER),
            config.prefer,
            shift=settings.shift,
            spread=settings.spread,
            backend=session.backend,
            train_text="text" in config.adapter.targets,
        )

    return session.run(parameters, loss_of, dataset, on_step)


def preference_loss(
    model: Krea2Transformer,
    winner: Tensor,
    loser: Tensor,
    texts: Texts,
    generator: torch.Generator,
    settings: Prefer,
    *,
    shift: float | None = None,
    spread: float = 1.0,
    backend: Backend = TORCH_BACKEND,
    train_text: bool = False,
) -> Measured:
    """The loss of pairs of latents (B, 16, h, w), and what the log says of them.

    model: with adapters, which are off for the reference.
    """
    noise = noised(winner, generator, shift, spread, model.config.patch_size)
    # The same noise and times for both: what differs is the picture.
    other = (noise.velocity + winner) - loser
    mixed = loser + noise.times[:, None, None, None] * other
    latents, times = torch.cat((noise.latents, mixed)), noise.times.repeat(2)
    velocity = torch.cat((noise.velocity, other))
    twice = texts.twice()
    batch = Batch(latents, twice.taps, twice.mask)
    with torch.no_grad():
        set_strength(model, 0.0)
        try:
            reference = predict(model, latents, times, batch)
        finally:
            set_strength(model, 1.0)
    predicted = predict(model, latents, times, batch, backend=backend, train_text=train_text)
    # How much worse than the reference each picture is, (2, B).
    worse = (_errors(predicted, velocity) - _errors(reference, velocity)).view(2, -1)
    margin = worse[0] - worse[1]
    loss = F.softplus(settings.beta * margin) + settings.hold * settings.beta * worse[0].relu()
    drift = (predicted.detach() - reference).square().mean() / reference.square().mean()
    numbers = {
        "pairs right": float((margin < 0).float().mean()),
        "winner's error": float(worse[0].detach().mean()),
        "drift": float(drift),
    }
    return Measured(loss.mean(), numbers)


def _errors(predicted: Tensor, velocity: Tensor) -> Tensor:
    return (predicted - velocity).square().mean(dim=(1, 2, 3))
