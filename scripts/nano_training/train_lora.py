"""The nano LoRA: outlines on ruled paper, a style learned on Raw that Turbo takes as well."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from krea2_model.transformer.model import Krea2Transformer
from krea2_training.engine.rates import Rates
from krea2_training.samples import holding
from krea2_training.settings.sections import KEY_STYLES, Adapter
from krea2_training.weights.adapters import adapters_of, add_adapters, file_tensors

from .examples import Examples
from .loop import Stage
from .train_raw import CAPTIONS, flow_error

RANK = 8
STEPS = 220
SHARDS = 1
AI_TOOLKIT = KEY_STYLES[0]


def add_lora(model: Krea2Transformer, rank: int) -> tuple[Krea2Transformer, list[nn.Parameter]]:
    """Put a LoRA beside every matrix of a frozen transformer's blocks; the LoRA's parameters."""
    added = add_adapters(model, Adapter(rank=rank))
    return model, [parameter for part in added for parameter in part.parameters(recurse=False)]


def lora_tensors(stage: Stage) -> dict[str, Tensor]:
    """The averaged LoRA by the keys that ai-toolkit writes."""
    with holding(stage.model, stage.values()):
        return file_tensors(adapters_of(stage.model), AI_TOOLKIT)


def train_lora(
    folder: Path, examples: Examples, raw: Krea2Transformer, steps: int = STEPS
) -> dict[str, Tensor]:
    """Train, or go on training; returns the LoRA's tensors. `raw` is changed in place."""
    torch.manual_seed(3)
    model, trained = add_lora(raw, RANK)
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    rates = Rates(steps, warmup=30, decay=0.3)
    stage = Stage("lora", folder, model, [optimiser], rates, decay=0.98)

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"lora {step}")
        examples.grow(SHARDS)
        return flow_error(model, examples.batch(CAPTIONS, random), random).mean()

    stage.train(loss_of_step)
    return lora_tensors(stage)
