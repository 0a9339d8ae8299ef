"""The parts that a run of every command has, and the run itself.

A command reads its data, opens a session, has pictures and prompts encoded, makes its loss, and
calls `Session.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from krea2_model import Krea2Transformer
from krea2_model.checkpoints.loading import PartState, load_part
from krea2_model.checkpoints.quantised import is_quantised
from krea2_model.checkpoints.transformer_keys import is_norm_or_table
from krea2_model.config import RAW, TURBO
from krea2_model.lora.few_steps import few_step_preset
from krea2_model.transformer.backend import TORCH_BACKEND, Backend

from .config import RunConfig
from .data.cache import Cache, OnEncoding
from .data.encoders import Encoders, file_fingerprint
from .data.examples import Sized
from .data.texts import Named, check_texts
from .engine.ahead import Ahead, Made
from .engine.loop import Loss, Run, check_state
from .engine.rates import Rates, check_optimiser, optimisers_of
from .engine.sharding import check_tensor_parallel, shard
from .engine.watch import draw_curve, tensorboard
from .engine.world import StopTraining, world_of
from .forecast import shortage
from .samples import Sampler
from .settings.sections import FULL
from .validation import Validator
from .weights.adapters import AnyAdapter, adapters_of, add_adapters
from .weights.base import (
    TrainingBackend,
    base_state,
    check_base,
    check_turbo,
    checkpoint_file,
    freeze_base,
    machine_of,
    teacher_file,
)
from .weights.results import Result
from .weights.roles import Roles
from .weights.start import START, Start

logger = logging.getLogger(__name__)

# A section of how a run is watched, beside those of `RunConfig`.
_WATCHING = "validation"
# In a state's description of its run, and in the section of `krea2 distil`.
TEACHER = "teacher"

# Of a file or a model that is trained on.
ON_TURBO = (
    "is a Turbo checkpoint. Train on Raw and run the result on Turbo: training on Turbo undoes its "
    "distillation, and pictures in 8 steps become soft."
)

# Called after each step with the line that the log has of it.
OnStep = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Parts:
    """A model and encoders of a host's own, in place of the files of `config.model`.

    name: a hash that tells the model from another one; a resumed run has to share it.
    """

    model: Krea2Transformer
    encoders: Encoders
    name: str


class Session:
    """Model, encoders, cache and samples of a run. Raises ValueError for files that do not fit.

    texts: that the run will encode, which are refused before anything is loaded. quiet: no bars
    while it encodes. The model is in main memory until `make_trainable` or `make_roles` moves it.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Parts | None = None,
        texts: Iterable[Named] = (),
        *,
        quiet: bool = False,
    ):
        self.config, self.folder, self.quiet = config, config.output.run_folder, quiet
        self.device, self.dtype = machine_of(config)
        self.is_full = config.adapter.method == FULL
        self.world = world_of(self.device, config.ranks)
        config.check_shares(self.world.shares)
        check_optimiser(config.training)
        if parts is None:
            state = read_base(config)
            sizes, encoders = state.config, Encoders(config.model, *machine_of(config))
        else:
            sizes, encoders = parts.model.config, parts.encoders
        self.start = Start(config, sizes)
        teacher = config.teacher
        self._teacher = None if teacher is None else file_fingerprint(teacher_file(teacher))
        check_texts(texts, config.samples, encoders)
        encoders.check(sizes)
        if config.samples.turbo is not None and not self.is_full:
            check_turbo(config.samples.turbo, sizes)
        check_tensor_parallel(sizes, config.ranks.tensor)
        if parts is None:
            base = checkpoint_file(config.model.transformer, RAW.name)
            parts = Parts(load_base(state, config, self.dtype), encoders, file_fingerprint(base))
        self.model, self.model_name = parts.model, parts.name
        if not self.is_full:
            check_base(self.model, config.memory.base)
        if warning := shortage(config, self.model, self.device):
            logger.warning("%s", warning)
        assert config.output.path is not None
        for folder in (config.output.path.parent, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.cache = Cache(config.cache, encoders, config.references, config.memory.keep)
        self.sampler = Sampler(config, self.cache, self.device, self.world)
        if (steps := self.start.steps) is not None:
            self.sampler.preset = few_step_preset(steps, self.model.preset)

    def check_run(self, dataset: str) -> None:
        """Raise ValueError where the folder has a run with other settings, or other data."""
        check_state(self.folder, self._fingerprint(dataset))

    def encode(
        self,
        pictures: Sequence[Sized] = (),
        prompts: Sequence[str] = (),
        on_encoding: OnEncoding = lambda made, of: None,
    ) -> None:
        """Have pictures with their captions, other prompts, and those of the samples in the cache.

        The empty prompt comes with any.
        """
        prompts = [*prompts, *self.sampler.prompts]
        prompts = ["", *prompts] if prompts else ()
        with self.world.together():
            made = self.cache.fill(pictures, prompts, on_encoding, self.world, self.quiet)
        logger.info("%d encodings made, the others were there.", made)

    def make_trainable(self) -> dict[str, nn.Parameter]:
        """Freeze what is not trained, add adapters, move all to the device; what is trained."""
        if self.is_full:
            self.model.requires_grad_(True)
        else:
            self._freeze()
            add_adapters(self.model, self.config.adapter, self.config.training.seed)
            self.start.fill(adapters_of(self.model))
        self._place()
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def make_roles(self, names: Sequence[str]) -> Roles:
        """Freeze the model, give it adapters for several roles, and move all to the device.

        The first role begins as `adapter.start`, the others at zero.
        """
        self._freeze()
        roles = Roles(self.model, self.config.adapter, names, self.config.training.seed)
        self.start.fill(roles.adapters[names[0]])
        self._place()
        return roles

    def _freeze(self) -> None:
        # What is sharded is moved a part at a time: a device need not hold all of it.
        device = torch.device("cpu") if self._is_sharded else self.device
        freeze_base(self.model, self.config.memory, device)

    def _place(self) -> None:
        """Move the model to the device, in parts where it is sharded."""
        dtype = torch.float32 if self.is_full else None
        if self._is_sharded:
            adapters = (
                () if self.is_full else (p for p in self.model.parameters() if p.requires_grad)
            )
            shard(self.model, self.world, self.device, adapters, dtype)
            if not self.is_full:
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(self.device)
        else:
            self.model.to(self.device, dtype)
        self.model.train()

    @property
    def _is_sharded(self) -> bool:
        return self.world.count > 1 and (self.is_full or self.config.ranks.shard)

    @property
    def backend(self) -> Backend:
        """How blocks are computed: with their activations again in the backward pass, or held."""
        return TrainingBackend() if self.config.memory.checkpointing else TORCH_BACKEND

    def ahead(self, function: Callable[[int], Made]) -> Ahead[Made]:
        """What a function makes of the numbers of this process's batches, a batch ahead."""
        settings = self.config.training
        end = settings.steps * settings.accumulate
        return Ahead(function, end, self.world.shares, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """A whole model's weights are float32; adapters are cast where they are used."""
        enabled = self.is_full and self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def run(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss_of: Loss,
        dataset: str,
        on_step: OnStep,
        *,
        optimisers: list[torch.optim.Optimizer] | None = None,
        rates: Rates | None = None,
        shipped: Mapping[str, AnyAdapter] | None = None,
        metadata: Mapping[str, str] | None = None,
        accumulate: int | None = None,
        prepare: Callable[[int], None] = lambda step: None,
        notes: dict[str, Any] | None = None,
        validator: Validator | None = None,
    ) -> Path:
        """Train, or go on where the folder's state ends; returns the result's file.

        dataset: a hash of what is learned from. optimisers, rates, accumulate: None are those of
        the settings.
        shipped, metadata: see `Result`. prepare, notes: see `Run`.
        Raises TrainingStopped for a loss that is not finite.
        """
        config, settings = self.config, self.config.training
        usage = self.start.usage
        result = Result(self.model, config, dataset, shipped, metadata, self.world, usage)
        run = Run(
            self.folder,
            parameters,
            optimisers or optimisers_of(parameters.items(), settings),
            rates or Rates(settings.steps, settings.warmup, settings.decay),
            accumulate=accumulate or settings.accumulate,
            clip=settings.clip,
            average=settings.average,
            save_every=config.output.save_every,
            on_save=lambda step: result.write_step(step, run.values()),
            prepare=prepare,
            fingerprint=self._fingerprint(dataset),
            notes=self.start.noted({} if notes is None else notes),
            world=self.world,
        )
        watch = tensorboard(self.folder) if self.world.is_first else _unseen

        def after(step: int, record: dict[str, Any]) -> None:
            watch(step, record)
            on_step(step, record)

        def sample(step: int) -> None:
            if self.sampler.is_due(step, settings.steps):
                self.sampler.sample(self.model, step, run.values())

        def measure(step: int) -> Mapping[str, float]:
            if validator is None or not validator.is_due(step):
                return {}
            with self.autocast():
                return validator.measure(self.model, run.values())

        run.on_step, run.after_step, run.measure = after, sample, measure
        if run.resume():
            logger.info("Goes on at step %d of %d.", run.step, settings.steps)
        try:
            run.train(loss_of)
        except StopTraining:
            logger.info("Stopped at step %d of %d.", run.step, settings.steps)
        finally:
            if self.world.is_first:
                draw_curve(self.folder)
        assert config.output.path is not None
        return result.write(run.step, run.values(), config.output.path)

    def _fingerprint(self, dataset: str) -> dict[str, Any]:
        """What a resumed run has to share: not its length, nor how it is watched."""
        training = asdict(self.config.training)
        for name in ("steps", "decay"):
            del training[name]
        table = self.config.as_table()
        shared = RunConfig.sections()
        own = {
            # The dataset's hash and the teacher's stand for files; the cache may lie anywhere.
            name: {k: v for k, v in table[name].items() if k not in ("path", "cache", TEACHER)}
            for name in self.config.sections()
            if name not in (*shared, _WATCHING)
        }
        model = {"model": self.model_name} if self.model_name else {}
        adapter = asdict(self.config.adapter)
        del adapter["start"]  # its content counts, not its place
        files = {"dataset": dataset, START: self.start.digest, TEACHER: self._teacher}
        return {"adapter": adapter, "training": training, **files, **own, **model}


def read_base(config: RunConfig) -> PartState:
    """The transformer that is trained on, from its header; warns where it is a Turbo."""
    state = base_state(config)
    if state.variant == TURBO.name and config.teacher is None:
        logger.warning("%s %s", state.path.name, ON_TURBO)
    return state


def load_base(state: PartState, config: RunConfig, dtype: torch.dtype) -> Krea2Transformer:
    """The transformer that is trained on, in main memory."""
    if config.adapter.method == FULL:
        # Mapped from the file where it holds one dtype, and float32 once on the device.
        return load_part(state, dtype=_one_dtype(state.tensors) or torch.float32)
    return load_part(state, dtype=dtype, keep_quantised=True)


def _one_dtype(tensors: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of a file's matrices and biases, None where it has several or is quantised."""
    if any(map(is_quantised, tensors.values())):  # tensors of GGUF have no dtype
        return None
    found = {t.dtype for name, t in tensors.items() if not is_norm_or_table(name)}
    return found.pop() if len(found) == 1 else None


def _unseen(step: int, record: dict[str, Any]) -> None:
    """In place of a watch."""
