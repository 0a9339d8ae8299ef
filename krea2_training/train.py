"""Train an adapter, or a whole transformer, on pictures: what `krea2 train` runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from krea2_model import Krea2Transformer, load_transformer, save_transformer
from krea2_model.checkpoints.transformer_keys import is_norm_or_table
from krea2_model.config import TURBO
from krea2_model.lora.edit_family import AI_TOOLKIT
from krea2_model.memory.plan import check_offload
from krea2_model.replacing import replacing
from krea2_model.transformer.backend import TORCH_BACKEND

from .adapters import add_adapters, file_tensors
from .base import TrainingBackend, checkpoint_file, freeze_base
from .cache import Cache, Encoders
from .config import EDITS, TrainConfig
from .data import Order, digest, read_examples, sized
from .flow import flow_loss, generator_of
from .loop import Run
from .rates import Rates, optimisers_of
from .samples import FULL, Sampler, holding
from .watch import draw_curve, tensorboard

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Of the loss's random numbers, beside those of other purposes.
_NOISE = 1


def train(
    config: TrainConfig, on_step: Callable[[int, dict[str, Any]], None] = lambda step, record: None
) -> Path:
    """Train as the settings say, or go on where the run's folder ends; returns the result's file.

    on_step: called after each step with the line that the log has of it; what it raises ends the
        run, whose state is saved.
    Raises ValueError for data or files that cannot be used, before anything is loaded, and
    TrainingStopped for a loss that is not finite.
    """
    pictures = sized(examples := read_examples(config.data), config.data)
    device = check_offload(config.memory.device, None, None)[0]
    dtype = _dtype(config, device)
    model = load_base(config, dtype)
    encoders = Encoders(config.model, device, dtype)
    encoders.check(model)
    folder = config.output.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    cache = Cache(config.data.cache or folder / "cache", encoders, config.data.references)
    sampler = Sampler(config, cache, device)
    made = cache.fill(pictures, ["", *sampler.prompts] if sampler.prompts else ())
    logger.info("%d pictures; %d encodings made, the others were there.", len(examples), made)
    parameters = make_trainable(model, config, device)
    settings = config.training
    order = Order(pictures, settings.batch, config.data.caption_dropout, settings.seed)
    backend = TrainingBackend() if config.memory.checkpointing else TORCH_BACKEND
    full = config.adapter.method == FULL
    text = "text" in config.adapter.targets or full

    def loss_of(number: int) -> Tensor:
        batch = cache.batch(order.batch(number), order, device)
        # A whole model's weights are float32; adapters are cast where they are used.
        with torch.autocast(device.type, torch.bfloat16, enabled=full and dtype == torch.bfloat16):
            return flow_loss(
                model,
                batch,
                generator_of(settings.seed, number, _NOISE),
                shift=settings.shift,
                spread=settings.spread,
                backend=backend,
                train_text=text,
            )

    result = Result(model, config, digest(examples, cache.hash_of))
    run = Run(
        folder,
        parameters,
        optimisers_of(parameters.items(), settings),
        Rates(settings.steps, settings.warmup, settings.decay),
        accumulate=settings.accumulate,
        clip=settings.clip,
        average=settings.average,
        save_every=config.output.save_every,
        on_save=lambda step: result.write_step(step, run.values()),
        fingerprint=_fingerprint(config, result.dataset),
    )

    watch = tensorboard(folder)

    def after(step: int, record: dict[str, Any]) -> None:
        watch(step, record)
        on_step(step, record)
        if sampler.is_due(step, settings.steps):
            sampler.sample(model, step, run.values())

    run.on_step = after
    if run.resume():
        logger.info("Goes on at step %d of %d.", run.step, settings.steps)
    try:
        run.train(loss_of)
    finally:
        draw_curve(folder)
    return result.write(run.step, run.values(), config.output.path)  # type: ignore[arg-type]


def load_base(config: TrainConfig, dtype: torch.dtype) -> Krea2Transformer:
    """The transformer that is trained on, in main memory; warns where it is a Turbo."""
    file = checkpoint_file(config.model.transformer, "raw")
    full = config.adapter.method == FULL
    model = load_transformer(file, dtype=torch.float32 if full else dtype, keep_quantised=not full)
    if model.variant == TURBO.name:
        logger.warning(
            "%s is a Turbo checkpoint. Train on Raw and run the result on Turbo: training on Turbo "
            "undoes its distillation, and pictures in 8 steps become soft.",
            file.name,
        )
    return model


def make_trainable(
    model: Krea2Transformer, config: TrainConfig, device: torch.device
) -> dict[str, torch.nn.Parameter]:
    """Freeze what is not trained, add adapters, and move all to the device; what is trained."""
    if config.adapter.method == FULL:
        model.requires_grad_(True).to(device)
    else:
        freeze_base(model, config.memory, device)
        add_adapters(model, config.adapter, config.training.seed)
        model.to(device)
    model.train()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Result:
    """The file of what was trained, and those on the way.

    dataset: a hash of the pictures and captions, for the metadata.
    """

    def __init__(self, model: Krea2Transformer, config: TrainConfig, dataset: str):
        self.model, self.config, self.dataset = model, config, dataset

    def write(self, step: int, values: dict[str, Tensor], path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.config.adapter.method == FULL:
            kinds = {n: torch.float32 if is_norm_or_table(n) else torch.bfloat16 for n in values}
            with holding(self.model, {n: t.to(kinds[n]) for n, t in values.items()}):
                save_transformer(self.model, path)
            return path
        with holding(self.model, values):
            tensors = file_tensors(self.model, self.config.output.key_style)
        tensors = {n: t.bfloat16() if t.ndim > 1 else t for n, t in tensors.items()}
        with replacing(path) as partial:
            save_file(tensors, partial, self.metadata(step))
        return path

    def write_step(self, step: int, values: dict[str, Tensor]) -> None:
        """The result so far, in the run's folder; the oldest beyond `keep` are removed."""
        output = self.config.output
        if not output.keep or step >= self.config.training.steps:
            return
        folder = output.run_folder
        assert output.path is not None
        self.write(step, values, folder / f"{output.path.stem}_step{step:06}.safetensors")
        files = sorted(folder.glob(f"{output.path.stem}_step*.safetensors"))
        for old in files[: -output.keep]:
            old.unlink()

    def metadata(self, step: int) -> dict[str, str]:
        """What trainers write, in the names that readers look for."""
        config = self.config
        data, adapter = config.data, config.adapter
        table = {k: v for k, v in config.as_table().items() if k not in ("memory", "samples")}
        metadata = {
            "format": "pt",
            "modelspec.architecture": f"krea2/{adapter.method}",
            "ss_base_model_version": "krea2",
            "ss_network_dim": str(adapter.rank),
            "ss_network_alpha": str(adapter.rank if adapter.alpha is None else adapter.alpha),
            "ss_output_name": config.output.path.stem if config.output.path else "",
            "ss_steps": str(step),
            "krea2.dataset": self.dataset,
            "krea2.training": json.dumps(_without_folders(table)),
        }
        if data.trigger:
            metadata["modelspec.trigger_phrase"] = data.trigger
        if data.references == EDITS[1]:
            metadata["ss_base_model_version"] = "krea2_edit"
        elif data.references == AI_TOOLKIT:
            metadata["training_info"] = json.dumps({"model_kwargs": {"edit": True}})
        return metadata


def _without_folders(table: Any) -> Any:
    """Settings without the folders of this machine, which are nobody's business."""
    if isinstance(table, dict):
        return {name: _without_folders(value) for name, value in table.items()}
    if isinstance(table, str) and ("/" in table or "\\" in table):
        return Path(table).name
    return table


def _fingerprint(config: TrainConfig, dataset: str) -> dict[str, Any]:
    """What has to be the same for a run to be resumed: not its length, nor how it is watched."""
    training = asdict(config.training)
    for name in ("steps", "decay"):
        del training[name]
    data = {"resolution": list(config.data.resolution), "dataset": dataset}
    return {"adapter": asdict(config.adapter), "training": training, "data": data}


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.memory.dtype is not None:
        return _DTYPES[config.memory.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16
