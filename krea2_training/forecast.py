"""Memory of a run, computed before it starts from the sizes of the model and the settings.

The numbers of states are upper bounds of what torch's operations reach on tensors without content,
with an attention that holds no scores (flash); tests/unit/test_train_memory.py counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from krea2_model import Krea2Transformer, TransformerConfig
from krea2_model.checkpoints.checkpoint import open_checkpoint
from krea2_model.checkpoints.transformer import read_transformer
from krea2_model.config import RAW
from krea2_model.memory.machine import GB, free_device_bytes
from krea2_model.memory.plan import check_offload

from .adapters import add_adapters
from .base import checkpoint_file
from .config import RunConfig
from .sections import BASES, Adapter, Memory, Steps

# Tokens of a caption that is not read yet: the official length.
TEXT_TOKENS = 512
# Context of CUDA, kernels' work space, fragments of torch's allocator.
RESERVE = 1_200_000_000
# The sizes of cards that forecasts speak of, in GB.
CARDS = (8, 12, 16, 24, 32, 48, 80)

# Hidden states of a sequence that are alive at the peak, in the dtype of the calculation: of one
# block while its gradient is computed, beside one for each block; and of each block that is held.
_BLOCK_STATES, _HELD_STATES = 30, 25
# More of them where adapters mix the hidden state themselves.
_MORE_STATES = {"lokr": 12, "dora": 4}
# float32 copies of a block's largest matrix that DoRA's norm takes.
_DORA_COPIES = 5
_BITS = {"bf16": 16.0, "fp8": 8.0, "int8": 8.0, "4bit": 4.5}


@dataclass(frozen=True)
class Forecast:
    """Bytes on the device, by part, and in main memory for offloaded blocks."""

    frozen: int
    trained: int
    gradients: int
    optimiser: int
    activations: int
    main_memory: int
    size: str

    @property
    def total(self) -> int:
        parts = (self.frozen, self.trained, self.gradients, self.optimiser, self.activations)
        return sum(parts) + RESERVE

    @property
    def card(self) -> int | None:
        """The smallest card of `CARDS` that it fits, in GB."""
        return next((card for card in CARDS if self.total <= card * GB), None)

    def __str__(self) -> str:
        lines = [
            f"{name:12}{size / GB:8.2f} GB"
            for name, size in (
                ("frozen", self.frozen),
                ("trained", self.trained),
                ("gradients", self.gradients),
                ("optimiser", self.optimiser),
                ("activations", self.activations),
                ("reserve", RESERVE),
                ("together", self.total),
            )
        ]
        if self.main_memory:
            lines.append(f"and {self.main_memory / GB:.2f} GB of main memory for the blocks")
        fits = f"fits {self.card} GB" if self.card else f"fits no card of {CARDS[-1]} GB"
        return "\n".join([*lines, f"{fits} at {self.size}"])


def training_memory(
    config: TransformerConfig,
    *,
    adapter: Adapter,
    memory: Memory,
    training: Steps,
    side: int,
    text: int = TEXT_TOKENS,
    references: int = 0,
    adapter_sets: int = 1,
    stored_bits: float = 16.0,
    itemsize: int = 2,
) -> Forecast:
    """The forecast for pictures of the area side x side.

    stored_bits: of a value in the file's blocks, for base "as-is". references: pictures of the same
    size beside each. adapter_sets: beside one model, of which one acts at a time. itemsize: bytes
    of a number in the calculation.
    """
    with torch.device("meta"):
        model = Krea2Transformer(config)
        inside = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
        everything = sum(p.numel() for p in model.parameters())
        largest = max(p.numel() for p in model.blocks.parameters())
        if adapter.method == "full":
            trained = everything
        else:
            add_adapters(model, adapter)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            trained *= adapter_sets
    sequence = training.batch * ((1 + references) * (side // 16) ** 2 + text)
    state = sequence * config.hidden_size * itemsize
    layers = config.num_layers
    states = layers + _BLOCK_STATES if memory.checkpointing else layers * _HELD_STATES + 5
    activations = (states + _MORE_STATES.get(adapter.method, 0)) * state
    if adapter.method == "dora":
        activations += _DORA_COPIES * 4 * largest
    bits = stored_bits if memory.base == BASES[0] else _BITS[memory.base]
    frozen, host = 0, 0
    if adapter.method != "full":
        blocks = round(inside * bits / 8)
        frozen, host = (everything - inside) * itemsize, 0
        if memory.offload:
            host = blocks
        else:
            frozen += blocks
        if bits < 16 or memory.offload:  # a matrix made or copied for its use, twice in backward
            frozen += 2 * largest * itemsize
    moments = {"adamw": 8, "muon": 4, "adamw8bit": 2}[training.optimiser]
    averages = 4 * trained if training.average else 0
    return Forecast(
        frozen,
        4 * trained + averages,
        4 * trained,
        moments * trained,
        round(activations),
        host,
        f"{side} px, batch {training.batch}",
    )


def forecast(config: RunConfig) -> str:
    """The forecast of a run, and what to change where it does not fit."""
    file = checkpoint_file(config.model.transformer, "raw")
    state = read_transformer(open_checkpoint(file, "transformer"))
    blocks = {n: t for n, t in state.tensors.items() if n.startswith("blocks.") and t.ndim == 2}
    values = sum(t.numel() for t in blocks.values())
    size = sum(getattr(t, "data", t).nbytes for t in blocks.values())
    device = check_offload(config.memory.device, None, None)[0]
    itemsize = 4 if config.memory.dtype == "fp32" or device.type == "cpu" else 2
    result = training_memory(
        state.config,  # type: ignore[arg-type]
        adapter=config.adapter,
        memory=config.memory,
        training=config.training,
        side=config.side or (state.preset or RAW).size,
        adapter_sets=config.adapter_sets,
        stored_bits=8 * size / values,
        itemsize=itemsize,
    )
    lines, free = [str(result)], free_device_bytes(device)
    if free is not None and free < result.total:
        lines.append(
            f"{free / GB:.1f} GB are free on {device}. Choose --base 4bit or --offload, a smaller "
            "--resolution, --batch 1, a lower --rank, or --optimiser adamw8bit."
        )
    return "\n".join(lines)
