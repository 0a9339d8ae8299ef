"""Memory of a run, computed before it starts from the sizes of the model and the settings.

The numbers of states are upper bounds of what torch's operations reach on tensors without content,
with an attention that holds no scores (flash); tests/unit/test_train_memory.py counts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from krea2_model import Krea2Transformer, TransformerConfig
from krea2_model.checkpoints.checkpoint import open_checkpoint
from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.checkpoints.quantised_weight import QuantisedWeight
from krea2_model.checkpoints.vae import read_vae
from krea2_model.config import RAW
from krea2_model.memory.activations import vae_bytes
from krea2_model.memory.machine import GB, free_device_bytes
from krea2_model.vae.model import QwenImageVAE

from .config import PretrainConfig, RewardConfig, RunConfig, TrainConfig
from .data.encoders import Encoders
from .data.examples import read_examples
from .data.prompts import read_prompts
from .data.shapes import check_shapes, shape_of
from .data.texts import check_texts
from .encoded import encoded_bytes, read_encoded
from .engine.world import processes
from .settings.sections import BASES, FULL, Adapter, Memory, Ranks, Steps
from .weights.adapters import add_adapters
from .weights.base import base_state, check_turbo, machine_of, stored_as, teacher_state
from .weights.start import Start

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
# States of the encoder's width, a token and a tap, that the text fusion holds where it is trained.
_FUSION_STATES = {"lora": 72, "dora": 94, "lokr": 100, FULL: 136}
# float32 copies of a block's largest matrix that DoRA's norm takes.
_DORA_COPIES = 5
_BITS = {"bf16": 16.0, "fp8": 8.0, "int8": 8.0, "4bit": 4.5}


@dataclass(frozen=True)
class Forecast:
    """Bytes on the device, by part, and in main memory for offloaded blocks and for kept data.

    activations: those of whatever needs most, beside the other parts. vae: of a VAE that stays.
    gathered: of sharded weights while they are in use. traffic: bytes that each process sends for
    a batch and its update. kept: at most, of encoded data in main memory.
    """

    frozen: int
    trained: int
    gradients: int
    optimiser: int
    activations: int
    main_memory: int
    size: str
    vae: int = 0
    gathered: int = 0
    processes: int = 1
    traffic: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        parts = (self.frozen, self.trained, self.gradients, self.optimiser, self.activations)
        return sum(parts) + self.vae + self.gathered + RESERVE

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
                ("gathered", self.gathered),
                ("VAE", self.vae),
                ("reserve", RESERVE),
                ("together", self.total),
            )
            if size or name not in ("VAE", "gathered")
        ]
        if self.main_memory:
            lines.append(f"and {self.main_memory / GB:.2f} GB of main memory for the blocks")
        if self.kept >= 0.005 * GB:
            lines.append(
                f"and up to {self.kept / GB:.2f} GB of main memory for what steps have read "
                "(memory.keep)"
            )
        if self.processes > 1:
            lines.append(
                f"on each of {self.processes} processes, which sends {self.traffic / GB:.2f} GB "
                "for a batch and its update"
            )
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
    teachers: int = 0,
    stored_bits: float = 16.0,
    itemsize: int = 2,
    vae: QwenImageVAE | None = None,
    ranks: Ranks | None = None,
    processes: int = 1,
) -> Forecast:
    """The forecast for pictures of the area side x side, of each process.

    vae: one that stays loaded and decodes pictures of that area between steps, on any device.
    stored_bits: of a value in the file's blocks, for base "as-is". references: pictures of the same
    size beside each. adapter_sets: beside one model, of which one acts at a time. teachers: other
    frozen models, whole in each process. itemsize: bytes of a number in the calculation.
    """
    count, ranks = _count(config, adapter), ranks or Ranks()
    parts = max(1, processes // ranks.copies)  # that the weights of a copy lie in
    trained = adapter_sets * count.trained
    sequence = training.batch * ((1 + references) * (side // 16) ** 2 + text)
    state = sequence * config.hidden_size * itemsize
    layers = config.num_layers
    states = layers + _BLOCK_STATES if memory.checkpointing else layers * _HELD_STATES + 5
    activations = (states + _MORE_STATES.get(adapter.method, 0)) * state
    if adapter.method == "dora":
        activations += _DORA_COPIES * 4 * count.largest
    if adapter.method == FULL or "text" in adapter.targets:
        tokens = training.batch * text * config.num_text_layers * config.text_hidden_dim
        activations += _FUSION_STATES[adapter.method] * tokens * itemsize
    # torch's optimisers take a copy of what is trained for a step, when activations are gone.
    activations = max(activations, 4 * trained // (parts if adapter.method == FULL else 1))
    if vae is not None:
        activations = max(activations, vae_bytes(vae, side**2))
    bits = stored_bits if memory.base == BASES[0] else _BITS[memory.base]
    frozen, host = 0, 0
    if adapter.method != FULL:
        blocks = round(count.inside * bits / 8)
        frozen, host = (count.everything - count.inside) * itemsize, 0
        if memory.offload:
            host = blocks
        else:
            frozen += blocks
        frozen, host = (1 + teachers) * frozen, (1 + teachers) * host
        if bits < 16 or memory.offload:  # a matrix made or copied for its use, twice in backward
            frozen += 2 * count.largest * itemsize
    moments = {"adamw": 8, "muon": 4, "adamw8bit": 2}[training.optimiser]
    averages = 4 * trained if training.average else 0
    result = Forecast(
        frozen,
        4 * trained + averages,
        4 * trained,
        moments * trained,
        round(activations),
        host,
        f"{side} px, batch {training.batch}",
        0 if vae is None else sum(tensor.nbytes for tensor in vae.state_dict().values()),
        processes=processes,
    )
    if processes == 1:
        return result
    if adapter.method == FULL:
        block = 4 * count.inside // layers
        return _whole_model_shared(result, parts, block, layers * state, ranks.tensor)
    if not ranks.shard:
        return replace(result, traffic=_exchanged(result))
    block = 0 if memory.offload else round(count.inside * bits / 8) // layers
    stored = layers * block + (count.everything - count.inside) * itemsize
    return _adapters_shared(result, parts, stored, block)


def _whole_model_shared(
    alone: Forecast, parts: int, block: int, states: int, tensor: int
) -> Forecast:
    """A forecast of a model that is trained by several processes, each with one of so many parts.

    block: bytes of a block's weights. Of these the one in use is there, the next, and a gradient.
    Weights are gathered in the forward and in the backward pass, and gradients are shared out; then
    copies of the model exchange those of their parts. states: bytes of a hidden state of each
    block. With tensor parallelism processes add up two of them in the forward pass, again where it
    is computed again, and in the backward pass.
    """
    copies = alone.processes // parts
    weights = 3 * alone.gradients * (parts - tensor) // (parts * tensor)
    exchanged = 2 * alone.gradients // parts * (copies - 1) // copies
    hidden = 6 * states * 2 * (tensor - 1) // tensor
    return replace(
        alone,
        trained=alone.trained // parts,
        gradients=alone.gradients // parts,
        optimiser=alone.optimiser // parts,
        gathered=3 * block // tensor,
        traffic=weights + exchanged + hidden,
    )


def _adapters_shared(alone: Forecast, parts: int, stored: int, block: int) -> Forecast:
    """A forecast of adapters that several processes train beside a frozen model in so many parts.

    stored: bytes of what is sharded. block: of one block of it, of which the one in use is there
    and the next. Weights are gathered in the forward and in the backward pass.
    """
    return replace(
        alone,
        frozen=alone.frozen - stored + stored // parts,
        gathered=2 * block,
        traffic=_exchanged(alone) + 2 * stored * (parts - 1) // parts,
    )


def _exchanged(alone: Forecast) -> int:
    """Bytes that a process sends of its adapters' gradients."""
    return 2 * alone.gradients * (alone.processes - 1) // alone.processes


@dataclass(frozen=True)
class _Count:
    """Numbers of a model: of the blocks' matrices, of all, of the largest, and of those trained."""

    inside: int
    everything: int
    largest: int
    trained: int


@lru_cache(maxsize=16)
def _count(config: TransformerConfig, adapter: Adapter) -> _Count:
    with torch.device("meta"):
        model = Krea2Transformer(config)
        blocks = [p.numel() for p in model.blocks.parameters() if p.ndim == 2]
        everything = trained = sum(p.numel() for p in model.parameters())
        if adapter.method != FULL:
            add_adapters(model, adapter)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _Count(sum(blocks), everything, max(blocks), trained)


def run_memory(
    config: RunConfig,
    sizes: TransformerConfig,
    *,
    side: int,
    stored_bits: float,
    device: torch.device,
) -> Forecast:
    """The forecast of the stage of a run that needs most.

    side: of the pictures' area, where the settings say none. stored_bits: of a value in the blocks.
    """
    itemsize = 4 if config.memory.dtype == "fp32" or device.type == "cpu" else 2
    vae = None
    if isinstance(config, RewardConfig):
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        vae = _vae_without_content(config, device, dtype)
    stages, references = [], _most_references(config)
    for own, batch in config.batches:
        largest = own or side
        if isinstance(config, RewardConfig):
            largest = _largest_side(config, largest)
        stages.append(
            training_memory(
                sizes,
                adapter=config.adapter,
                memory=config.memory,
                training=replace(config.training, batch=batch),
                side=largest,
                references=references,
                adapter_sets=config.adapter_sets,
                teachers=int(config.teacher is not None),
                stored_bits=stored_bits,
                itemsize=itemsize,
                vae=vae,
                ranks=config.ranks,
                processes=processes(),
            )
        )
    return max(stages, key=lambda stage: stage.total)


def shortage(config: RunConfig, model: Krea2Transformer, device: torch.device) -> str:
    """What to change where a run of a loaded model will not fit a device; empty where it does."""
    if free_device_bytes(device) is None:
        return ""
    layers = [
        layer for layer in model.blocks.modules() if isinstance(layer, (nn.Linear, QuantisedLinear))
    ]
    stored = [stored_as(layer, BASES[0]) for layer in layers]
    tensors = (
        tensor
        for one in stored
        for tensor in (one.tensors.values() if isinstance(one, QuantisedWeight) else (one,))
    )
    bits = 8 * sum(tensor.nbytes for tensor in tensors)
    values = sum(math.prod(one.shape) for one in stored)
    side = (model.preset or RAW).size
    result = run_memory(config, model.config, side=side, stored_bits=bits / values, device=device)
    return lacking(result, device)


def lacking(result: Forecast, device: torch.device) -> str:
    """What to change where a run does not fit the free memory of a device; empty where it does."""
    free = free_device_bytes(device)
    if free is None or free >= result.total:
        return ""
    return (
        f"The run needs about {result.total / GB:.1f} GB, and {free / GB:.1f} GB are free on "
        f"{device}. Choose base 4bit or offload, a smaller resolution, batch 1, a lower rank, or "
        "optimiser adamw8bit."
    )


def forecast(config: RunConfig) -> str:
    """The forecast of a run, and what to change where it does not fit."""
    state = base_state(config)
    # What a run refuses is refused here too.
    Start(config, state.config)
    if config.teacher is not None:
        teacher_state(config.teacher, state.config, state.variant)
    if config.samples.turbo is not None and config.adapter.method != FULL:
        check_turbo(config.samples.turbo, state.config)
    device, dtype = machine_of(config)
    encoded = read_encoded(config, state)
    check_texts(encoded.texts, config.samples, Encoders(config.model, device, dtype))
    blocks = {n: t for n, t in state.tensors.items() if n.startswith("blocks.") and t.ndim == 2}
    values = sum(t.numel() for t in blocks.values())
    size = sum(getattr(t, "data", t).nbytes for t in blocks.values())
    result = run_memory(
        config,
        state.config,
        side=(state.preset or RAW).size,
        stored_bits=8 * size / values,
        device=device,
    )
    most = encoded_bytes(encoded, config, state.config, dtype.itemsize)
    result = replace(result, kept=min(round(config.memory.keep * 1e9), most))
    return "\n".join(filter(None, (str(result), lacking(result, device))))


def _largest_side(config: RewardConfig, side: int) -> int:
    """Side of a square of the area of the largest picture of the prompts."""
    assert config.prompts.path is not None
    rows = read_prompts(config.prompts.path)
    check_shapes(rows, config.prompts.path)
    ratios = config.prompts.ratios or [(1.0, 1.0)]
    return math.isqrt(max(math.prod(shape_of(row, side, one)) for row in rows for one in ratios))


def _most_references(config: RunConfig) -> int:
    """References of the picture that has most; each is counted at the picture's size."""
    if not isinstance(config, (TrainConfig, PretrainConfig)) or config.data.path is None:
        return 0
    try:
        return max(len(example.references) for example in read_examples(config.data))
    except ValueError:  # which the run says when it reads its data
        return 0


def _vae_without_content(
    config: RunConfig, device: torch.device, dtype: torch.dtype
) -> QwenImageVAE:
    """The run's VAE by the header of its file."""
    path = Encoders(config.model, device, dtype).vae_path
    state = read_vae(open_checkpoint(path, "vae"))
    return QwenImageVAE(state.config, device="meta", dtype=dtype)
