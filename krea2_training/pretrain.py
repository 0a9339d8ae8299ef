"""Train a transformer from nothing, in stages of rising resolution: what `krea2 pretrain` runs.

As Krea's report describes it: rectified flow with velocities; times of a logit-normal distribution,
shifted more at more resolution; a learning rate that warms up, holds and decays, once over all
stages; AdamW, or Muon for what is neither first nor last. Pictures of all stages are encoded
ahead. One state resumes the run in whichever stage it is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from krea2_model import Krea2Transformer, TransformerConfig
from krea2_model.config import RAW

from .config import PretrainConfig
from .data.cache import Batch
from .data.encoders import Encoders
from .data.examples import Example, Order, digest, read_examples, sized
from .data.texts import captions_of, check_texts
from .engine.rates import Rates
from .flow import Noised
from .session import OnStep, Parts, Session
from .train import pictures_loss, prepared
from .weights.base import base_state, machine_of


@dataclass(frozen=True)
class Stage:
    """Steps [begin, end) of a run, with the order of their pictures."""

    begin: int
    end: int
    order: Order
    shift: float | None
    mask: float = 1.0


def pretrain(
    config: PretrainConfig, on_step: OnStep = lambda step, record: None, *, quiet: bool = False
) -> Path:
    """Train as the settings say, or go on where the run's folder ends; returns the file.

    Raises ValueError for data or files that cannot be used, before anything is loaded, and
    TrainingStopped for a loss that is not finite.
    """
    examples = read_examples(config.data)
    stages = stages_of(config, examples)
    encoders = Encoders(config.model, *machine_of(config))
    check_texts(captions_of(examples), config.samples, encoders)
    model = new_transformer(architecture(config), config.training.seed)
    model.variant = RAW.name
    model.preset = replace(RAW, mu=None, size=config.stages.resolution[-1])
    session = Session(config, Parts(model, encoders, ""), quiet=quiet)
    dataset = digest(examples, session.cache.hash_of)
    session.check_run(dataset)
    session.encode([picture for stage in stages for picture in stage.order.pictures])
    parameters = session.make_trainable()
    settings = config.training

    def batch_of(number: int) -> tuple[Batch, Noised]:
        stage = next(stage for stage in stages if number < stage.end * settings.accumulate)
        place = number - stage.begin * settings.accumulate
        return prepared(
            session, stage.order, number, stage.shift,
            place=place, draws=config.stages.draws, mask=stage.mask,
        )  # fmt: skip

    batches = session.ahead(batch_of)

    def loss_of(number: int) -> Tensor:
        return pictures_loss(session, *batches(number), train_text=True)

    factors = config.stages.rate or (1.0,) * len(stages)
    by_stage = tuple((stage.end, rate) for stage, rate in zip(stages, factors, strict=True))
    rates = Rates(settings.steps, settings.warmup, settings.decay, by_stage)
    return session.run(parameters, loss_of, dataset, on_step, rates=rates)


def stages_of(config: PretrainConfig, examples: list[Example]) -> list[Stage]:
    """The stages with their pictures at their sizes; opens each picture's header."""
    ends = list(itertools.accumulate(config.stages.steps))
    found = []
    for index, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        data = replace(config.data, resolution=(config.stages.resolution[index],))
        order = Order(
            sized(examples, data),
            config.stages.batch[index] if config.stages.batch else config.training.batch,
            data.caption_dropout,
            config.training.seed + index,
        )
        shift = config.stages.shift[index] if config.stages.shift else config.training.shift
        mask = config.stages.mask[index] if config.stages.mask else 1.0
        found.append(Stage(begin, end, order, shift, mask))
    return found


def architecture(config: PretrainConfig) -> TransformerConfig:
    """The sizes of the checkpoint that `model.transformer` names; none of its weights are read."""
    found = base_state(config).config
    assert isinstance(found, TransformerConfig)
    return found


def new_transformer(config: TransformerConfig, seed: int = 0) -> Krea2Transformer:
    """A transformer whose blocks change nothing yet: what they add to the residual stream is 0.

    Matrices are random, of variance 1 over their inputs; the velocity is 0 everywhere.
    """
    model = Krea2Transformer(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.endswith("lin.weight"):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            else:
                nn.init.zeros_(parameter)
            is_output = name.endswith(("wo.weight", "down.weight"))
            if is_output or name.startswith(("tproj", "last.linear")):
                nn.init.zeros_(parameter)
    nn.init.constant_(model.txtfusion.projector.weight, 1 / config.num_text_layers)
    for block in model.blocks:
        # Scale, shift and gate before attention, the same before the MLP: open gates.
        table = block.get_parameter("mod.lin.weight").data.view(6, -1)
        table[2] = table[5] = 1.0
    return model
