"""The nano LoRA: outlines on ruled paper, a style learned on Raw that Turbo takes as well."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from krea2_model.transformer.model import Krea2Transformer

from .examples import Examples
from .loop import Run, Schedule
from .train_raw import CAPTIONS, flow_error

RANK = 8
STEPS = 220
SHARDS = 1


class LoraLinear(nn.Module):
    """A frozen layer plus a trained low-rank update, `up(down(x))`, that begins at 0."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) + self.up(self.down(hidden))


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Put a LoRA beside every matrix of a frozen transformer's blocks."""
    model.requires_grad_(False)
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), attribute, LoraLinear(module, rank))
    return model


def lora_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA by the keys that ai-toolkit writes; without alpha, so the scale is 1."""
    parts = {".down.weight": "lora_A", ".up.weight": "lora_B"}
    tensors = {}
    for name, tensor in state.items():
        for ending, part in parts.items():
            if name.endswith(ending) and _is_lora(name, state):
                key = f"diffusion_model.{name.removesuffix(ending)}.{part}.weight"
                tensors[key] = tensor.cpu().contiguous()
    return tensors


def _is_lora(name: str, state: dict[str, Tensor]) -> bool:
    # The MLP has a layer called "down" too; beside a LoRA stands the layer that it changes.
    return f"{name.rsplit('.', 2)[0]}.layer.weight" in state


def train_lora(
    folder: Path, examples: Examples, raw: Krea2Transformer, steps: int = STEPS
) -> dict[str, Tensor]:
    """Train, or go on training; returns the LoRA's tensors. `raw` is changed in place."""
    torch.manual_seed(3)
    model = add_lora(raw, RANK)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run("lora", folder, model, [optimiser], Schedule(steps, warmup=30), decay=0.98)

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"lora {step}")
        examples.grow(SHARDS)
        return flow_error(model, examples.batch(CAPTIONS, random), random).mean()

    run.train(loss_of_step)
    return lora_tensors(run.averaged_state())
