"""Train an adapter, or a whole transformer, on pictures: what `krea2 train` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .cache import OnEncoding
from .config import TrainConfig
from .data import Draw, Example, Order, digest, read_examples, sized
from .flow import flow_loss, generator_of
from .session import OnStep, Parts, Session

# Of the loss's random numbers, beside those of other purposes.
_NOISE = 1


def train(
    config: TrainConfig,
    on_step: OnStep = lambda step, record: None,
    *,
    on_encoding: OnEncoding = lambda made, of: None,
    parts: Callable[[], Parts] | None = None,
    examples: Sequence[Example] | None = None,
) -> Path:
    """Train as the settings say, or go on where the run's folder ends; returns the result's file.

    on_step: called after each step with the line that the log has of it; what it raises ends the
        run, whose state is saved. StopTraining writes the result too.
    on_encoding: called after each picture and caption that is encoded.
    parts, examples: model and encoders, and pictures, of a host's own, in place of those that
        `config.model` and `config.data` name. parts is called once the data has been read.
    Raises ValueError for data or files that cannot be used, before anything is loaded, and
    TrainingStopped for a loss that is not finite.
    """
    examples = read_examples(config.data) if examples is None else examples
    pictures = sized(examples, config.data)
    session = Session(config, None if parts is None else parts())
    dataset = digest(examples, session.cache.hash_of)
    session.check_run(dataset)
    session.encode(pictures, on_encoding=on_encoding)
    parameters = session.make_trainable()
    settings = config.training
    order = Order(pictures, settings.batch, config.data.caption_dropout, settings.seed)
    train_text = "text" in config.adapter.targets or session.is_full

    def loss_of(number: int) -> Tensor:
        draws = order.batch(number)
        return pictures_loss(session, draws, order, number, settings.shift, train_text)

    return session.run(parameters, loss_of, dataset, on_step)


def pictures_loss(
    session: Session,
    draws: Sequence[Draw],
    order: Order,
    number: int,
    shift: float | None,
    train_text: bool,
) -> Tensor:
    """The flow loss of a batch of an order's pictures, with the noise of its number in the run."""
    settings = session.config.training
    batch = session.cache.batch(draws, order, session.device)
    with session.autocast():
        return flow_loss(
            session.model,
            batch,
            generator_of(settings.seed, number, _NOISE),
            shift=shift,
            spread=settings.spread,
            backend=session.backend,
            train_text=train_text,
        )
