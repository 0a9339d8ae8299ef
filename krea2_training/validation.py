"""The loss of pictures that are not trained on, with noise and times that stay the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from krea2_model import Krea2Transformer
from krea2_model.checks import counted

from .config import TrainConfig
from .data.cache import Cache
from .data.examples import Draw, Example, Order, Sized, read_examples
from .flow import flow_loss, generator_of
from .samples import holding
from .settings.checks import check

# Its name in the log.
LOSS = "validation loss"
# Of random numbers, beside those of other purposes.
_VALIDATION = 6


def hold_out(
    examples: Sequence[Example], config: TrainConfig
) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those to validate with: some of the former, or others.

    Raises ValueError for a folder without use, and a share that leaves none of either.
    """
    settings = config.validation
    if settings.path is not None:
        data = replace(config.data, path=settings.path)
        return list(examples), read_examples(data, setting="validation.path")
    if not settings.share:
        return list(examples), []
    count = round(settings.share * len(examples))
    check(
        0 < count < len(examples), "validation.share", settings.share,
        f"a share that is at least one of {counted(len(examples), 'picture')}, and not all",
    )  # fmt: skip
    chosen = set(Random(f"validation {config.training.seed}").sample(range(len(examples)), count))
    parts: tuple[list[Example], list[Example]] = [], []
    for index, example in enumerate(examples):
        parts[index in chosen].append(example)
    return parts


class Validator:
    """Pictures whose loss is measured on the way, each at several times at once.

    They have to be in the cache before the first measurement.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: Cache,
        device: torch.device,
        pictures: Sequence[Sized],
    ):
        self.settings, self.training = config.validation, config.training
        self.cache, self.device = cache, device
        self.order = Order(pictures, 1, 0.0, 0)

    def is_due(self, step: int) -> bool:
        first_or_last = step in (1, self.training.steps)
        return bool(self.order.pictures) and (first_or_last or step % self.settings.every == 0)

    def measure(self, model: Krea2Transformer, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss of the pictures with the values as weights, by its name in the log."""
        with holding(model, values):
            losses = [self._loss(model, index) for index in range(len(self.order.pictures))]
        return {LOSS: sum(losses) / len(losses)}

    @torch.no_grad()
    def _loss(self, model: Krea2Transformer, index: int) -> float:
        """The loss of a picture with its first caption."""
        caption = self.order.pictures[index].example.captions[0] or None
        draws = [Draw(index, caption)] * self.settings.draws
        loss = flow_loss(
            model,
            self.cache.batch(draws, self.order, self.device),
            generator_of(0, index, _VALIDATION),
            shift=self.training.shift,
            spread=self.training.spread,
        )
        return float(loss)
