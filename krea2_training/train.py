"""Train an adapter, or a whole transformer, on pictures: what `krea2 train` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from krea2_model.lora.edit_family import family_header

from .config import TrainConfig
from .data.cache import Batch, OnEncoding, family_of
from .data.examples import Example, Order, digest, read_examples, sized
from .data.texts import captions_of
from .encoded import prior_pictures
from .engine.loop import Measured
from .flow import Noised, flow_errors, generator_of, noised, predict
from .session import OnStep, Parts, Session
from .validation import Validator, hold_out

# Of random numbers, beside those of other purposes: the loss, and that of prior pictures.
_NOISE, _PRIOR = 1, 7


def train(
    config: TrainConfig,
    on_step: OnStep = lambda step, record: None,
    *,
    on_encoding: OnEncoding = lambda made, of: None,
    parts: Callable[[], Parts] | None = None,
    examples: Sequence[Example] | None = None,
    quiet: bool = False,
) -> Path:
    """Train as the settings say, or go on where the run's folder ends; returns the result's file.

    on_step: called after each step with the line that the log has of it; what it raises ends the
        run, whose state is saved. StopTraining writes the result too.
    on_encoding: called after each picture and caption that is encoded.
    parts, examples: model and encoders, and pictures, of a host's own, in place of those that
        `config.model` and `config.data` name. parts is called once the data has been read.
    quiet: no bars while pictures and captions are encoded.
    Raises ValueError for data or files that cannot be used, before anything is loaded, and
    TrainingStopped for a loss that is not finite.
    """
    examples = read_examples(config.data) if examples is None else examples
    examples, held_out = hold_out(examples, config)
    pictures = sized(examples, config.data)
    seen = sized(held_out, replace(config.data, repeats=1))
    prior = prior_pictures(config)
    known = list(dict.fromkeys(one.example for one in prior))
    texts = captions_of([*examples, *held_out, *known])
    session = Session(config, None if parts is None else parts(), texts, quiet=quiet)
    dataset = digest([*examples, *known], session.cache.hash_of)
    session.check_run(dataset)
    session.encode([*pictures, *seen, *prior], on_encoding=on_encoding)
    # Pictures with references make an edit LoRA, of the first family if the settings name none.
    edits = any(example.references for example in examples)
    family = family_of(config.data.references) if edits else None
    metadata = {} if family is None else family_header(family)
    session.start.warn(family)
    parameters = session.make_trainable()
    settings = config.training
    order = Order(pictures, settings.batch, config.data.caption_dropout, settings.seed)
    train_text = "text" in config.adapter.targets or session.is_full
    others = Order(prior, settings.batch, config.data.caption_dropout, settings.seed + 1)
    # As the loop weighs the loss that it is given.
    weight = config.prior.weight * session.world.shares / settings.accumulate

    own_batch = session.ahead(lambda number: prepared(session, order, number, settings.shift))
    prior_batch = session.ahead(
        lambda number: prepared(session, others, number, settings.shift, _PRIOR)
    )

    def loss_of(number: int) -> Measured:
        numbers = {}
        if prior:
            loss = pictures_loss(session, *prior_batch(number), train_text)
            # Here, so that activations of one batch are held at a time.
            (weight * loss).backward()
            numbers["prior loss"] = float(loss.detach())
        loss = pictures_loss(session, *own_batch(number), train_text)
        return Measured(loss, numbers)

    validator = Validator(config, session.cache, session.device, seen)
    return session.run(
        parameters, loss_of, dataset, on_step, metadata=metadata, validator=validator
    )


def prepared(
    session: Session,
    order: Order,
    number: int,
    shift: float | None,
    purpose: int = _NOISE,
    place: int | None = None,
    draws: int = 1,
    mask: float = 1.0,
) -> tuple[Batch, Noised]:
    """A batch of an order's pictures, with the noise of its number in the run.

    place: of the batch in the order; None is its number. draws: of noise for each picture.
    mask: how far the pictures' masks weigh the loss, from 0 to 1.
    """
    settings = session.config.training
    drawn = order.batch(number if place is None else place)
    batch = session.cache.batch(drawn, order, session.device)
    if batch.weights is not None:
        weights = torch.lerp(torch.ones_like(batch.weights), batch.weights, mask)
        batch.weights = weights.repeat_interleave(draws, 0) if mask else None
    generator = generator_of(settings.seed, number, purpose)
    patch = session.model.config.patch_size
    latents = batch.latents.repeat_interleave(draws, 0)
    return batch, noised(latents, generator, shift, settings.spread, patch)


def pictures_loss(session: Session, batch: Batch, noise: Noised, train_text: bool) -> Tensor:
    """The flow loss of what `prepared` gives."""
    with session.autocast():
        velocity = predict(
            session.model, noise.latents, noise.times, batch,
            backend=session.backend, train_text=train_text,
        )  # fmt: skip
        return flow_errors(velocity, noise, batch.weights).mean()
