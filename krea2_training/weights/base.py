"""The frozen model: in little memory, and computed again in the backward pass.

A frozen matrix needs no gradient, but autograd would keep every dequantised copy until the backward
pass. `FrozenLinear` keeps none: it makes the matrix again when the gradient of its input is due.
The stored form may be that of the file, 8 or 4 bits, and lie in main memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from krea2_model import load_transformer, nano
from krea2_model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from krea2_model.checkpoints.gguf import GGUFTensor
from krea2_model.checkpoints.loading import PartState
from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.checkpoints.quantised_weight import INT8, SCALE, QuantisedWeight, eight_bits
from krea2_model.checkpoints.transformer import VARIANT_KEY, read_transformer
from krea2_model.config import RAW, TURBO
from krea2_model.memory.plan import check_offload
from krea2_model.nn.attention import attend
from krea2_model.nn.kernels import norm_and_rotate
from krea2_model.nn.partial_attention import attend_partially
from krea2_model.transformer.backend import Backend
from krea2_model.transformer.extensions import AttentionExtensions
from krea2_model.transformer.model import Krea2Transformer
from krea2_model.transformer.modulation import for_blocks
from krea2_model.transformer.token_groups import TokenGroups

from ..config import RunConfig
from ..engine.world import local_device
from ..settings.sections import BASES, NANO, Memory

FP8 = "float8_e4m3fn"
FOUR_BITS = "Q4_0"
_BLOCK = 32  # values of a block of Q4_0
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Floats of the same size, whose bytes hold whole numbers.
_FLOATS = {torch.uint8: torch.float8_e4m3fn, torch.int8: torch.float8_e4m3fn}


class FrozenLinear(nn.Module):
    """A linear layer that is not trained and holds its weight as it is stored.

    offload: the stored tensors stay in main memory, page-locked where there is a GPU, and each use
        copies them to its input's device.
    """

    def __init__(self, stored: QuantisedWeight | Tensor, bias: Tensor | None, offload: bool):
        super().__init__()
        self.form = stored.form if isinstance(stored, QuantisedWeight) else None
        self.out_features, self.in_features = stored.shape
        tensors = (
            dict(stored.tensors) if isinstance(stored, QuantisedWeight) else {"weight": stored}
        )
        self.group = stored.group if isinstance(stored, QuantisedWeight) else None
        self.offload, self._names = offload, tuple(tensors)
        # In a dict of its own, so that moving the model leaves it where it is.
        self._held: dict[str, Tensor] = {}
        self._kinds: dict[str, torch.dtype] = {}
        if offload:
            pin = torch.cuda.is_available()
            for name, tensor in tensors.items():
                tensor = tensor.detach().cpu().contiguous()
                self._held[name] = tensor.pin_memory() if pin else tensor
        else:
            for name, tensor in tensors.items():
                # Parameters, since FSDP shards these; but no single numbers, and only floats.
                self._kinds[name] = tensor.dtype
                if tensor.ndim:
                    held = tensor.detach().view(_FLOATS.get(tensor.dtype, tensor.dtype))
                    parameter = nn.Parameter(held, requires_grad=False)
                    self.register_parameter(f"stored_{name}", parameter)
                else:
                    self.register_buffer(f"stored_{name}", tensor.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def weight_for(self, example: Tensor) -> Tensor:
        """The weight (outputs, inputs) in the dtype and on the device of a tensor."""
        tensors = {}
        for name in self._names:
            if self.offload:
                tensor = self._held[name]
            else:
                tensor = getattr(self, f"stored_{name}").detach().view(self._kinds[name])
            tensors[name] = tensor.to(example.device, non_blocking=True)
        if self.form is None:
            return tensors["weight"].to(example.dtype)
        shape = (self.out_features, self.in_features)
        return QuantisedWeight(self.form, shape, tensors, self.group).dequantise(example.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        result = _FrozenMatmul.apply(hidden, self)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def extra_repr(self) -> str:
        where = ", in main memory" if self.offload else ""
        return f"{self.in_features}, {self.out_features}, {self.form or 'plain'}{where}"


class _FrozenMatmul(torch.autograd.Function):
    """`hidden @ weight.T`, whose backward makes the weight again instead of holding it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(hidden, layer.weight_for(hidden))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient @ ctx.layer.weight_for(gradient), None


class TrainingBackend(Backend):
    """Runs blocks of which the backward pass computes the activations again, one at a time.

    What stays in memory is a hidden state a block, and one block's activations.
    recomputing: a context for the second computation, where the model may be in another state.
    groups: of tokens that see different keys, see `token_groups`. keeps: True for blocks that keep
        their activations.
    """

    def __init__(
        self,
        recomputing: Callable[[], AbstractContextManager[Any]] = nullcontext,
        groups: TokenGroups | None = None,
        keeps: bool = False,
    ):
        self.recomputing, self.keeps = recomputing, keeps
        self.extensions = None if groups is None else AttentionExtensions(groups=groups)

    def run_blocks(
        self, blocks, hidden, query_slice, vector, rope, mask, split, modulation=None
    ) -> Tensor:
        if self.extensions is not None:
            prepared = self.extensions.prepare(hidden, query_slice, rope, mask, split)
            hidden, query_slice, rope, mask, split = prepared
        by_block, last = for_blocks(modulation, len(blocks)), len(blocks) - 1
        for index, block in enumerate(blocks):
            queries = query_slice if index == last else None
            inputs = (hidden, vector, rope, mask, split, self, queries, by_block[index])
            if torch.is_grad_enabled() and not self.keeps:
                hidden = checkpoint(block, *inputs, use_reentrant=False, context_fn=self._contexts)
            else:
                hidden = block(*inputs)
        return hidden

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        if self.extensions is None:
            return super().attend(query, key, value, norm, rope, mask, query_slice)
        query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        # Attention to parts of the keys has no gradient of its log-sum-exp: masks have.
        partial = None if torch.is_grad_enabled() else attend_partially
        return self.extensions.attend(attend, partial, 0, query, key, value, mask, query_slice)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self.recomputing()


def checkpoint_file(name: str | None, variant: str) -> Path:
    """The file that a setting names; "nano" is the built-in model's of a variant."""
    return nano.TRANSFORMERS[variant] if name == NANO else Path(str(name))


def machine_of(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """The device of a run, and the dtype of its calculation."""
    device = local_device(check_offload(config.memory.device, None, None)[0])
    if config.memory.dtype is not None:
        return device, _DTYPES[config.memory.dtype]
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def base_state(config: RunConfig) -> PartState:
    """The model that a run trains on, from its header."""
    name = config.model.transformer
    return _named_state("model.transformer", str(name), checkpoint_file(name, RAW.name))


def teacher_file(name: str) -> Path:
    """The file that `distil.teacher` names."""
    # The built-in one's name on the command line, beside that of settings.
    return checkpoint_file(NANO if name == f"{NANO}-{RAW.name}" else name, RAW.name)


def check_turbo(name: str, sizes: Any) -> None:
    """Raise ValueError for a Turbo of samples that cannot take what is trained, by its header."""
    file = checkpoint_file(name, TURBO.name)
    if _named_state("samples.turbo", name, file).config != sizes:
        raise ValueError(
            f"samples.turbo is {file}, which has other sizes than the model that is trained. Name "
            "a Turbo of the same model, or leave it out."
        )


def _named_state(setting: str, name: str, file: Path) -> PartState:
    """A transformer that a setting names, from its header."""
    try:
        return read_transformer(open_checkpoint(file, "transformer"))
    except ValueError as error:
        raise ValueError(f"{setting} is {name!r}. {error}") from error


def teacher_state(name: str, sizes: Any, variant: str | None) -> PartState:
    """The Raw that a few-step model is refined by, from its header.

    sizes, variant: of that model. Raises ValueError for a file that is no Raw of it, and for a
    model that is a Raw itself.
    """
    file = teacher_file(name)
    state = _named_state("distil.teacher", name, file)
    if state.config != sizes:
        raise ValueError(
            f"distil.teacher is {file}, which has other sizes than the model that the student "
            "begins from. Name the Raw that it was made of."
        )
    if state.variant == TURBO.name:
        raise ValueError(f"distil.teacher is {file}, a Turbo checkpoint; expected the Raw.")
    if variant == RAW.name:
        raise ValueError(
            "distil.teacher is for a few-step checkpoint, and model.transformer is a Raw, which is "
            "its own teacher. Leave the teacher out, or name the Turbo as the model."
        )
    return state


def base_of_tensors(
    tensors: Mapping[str, Tensor | tuple[Tensor, str, tuple[int, ...]]],
    dtype: torch.dtype,
    variant: str | None,
) -> Krea2Transformer:
    """The model of a host's tensors, which it shares where their dtype allows it.

    tensors: as a file has them, by official names; a weight of GGUF is its blocks, their format and
        the shape of the values. variant: "raw", "turbo", or None.
    """
    own = {n: GGUFTensor(*t) if isinstance(t, tuple) else t for n, t in tensors.items()}
    metadata = {VARIANT_KEY: variant} if variant else {}
    checkpoint = Checkpoint(Path("model"), own, metadata)
    return load_transformer(checkpoint, dtype=dtype, keep_quantised=True)


def freeze_base(
    model: Krea2Transformer,
    memory: Memory,
    device: torch.device,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Freeze a model, hold the blocks' matrices as `memory` says, and move it to a device.

    The matrices are quantised and moved one at a time, so that a card never holds the plain model.
    Raises ValueError for a base that the file's own format cannot become.
    """
    check_base(model, memory.base)
    model.requires_grad_(False)
    for index, block in enumerate(model.blocks):
        for path, layer in list(block.named_modules()):
            if isinstance(layer, (nn.Linear, QuantisedLinear)):
                parent, _, name = path.rpartition(".")
                stored = stored_as(layer, memory.base)
                frozen = FrozenLinear(
                    _to(stored, device, memory.offload), layer.bias, memory.offload
                )
                block.get_submodule(parent)._modules[name] = frozen
        block.to(device)
        progress(f"blocks.{index}")
    model.to(device)


def check_base(model: Krea2Transformer, base: str) -> None:
    """Raise ValueError where a model's blocks are quantised, and `base` is another quantisation."""
    if base in (BASES[0], "bf16"):
        return
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, QuantisedLinear):
            raise ValueError(
                f"memory.base is {base}, but the file holds blocks.{name} as {layer.form}: "
                "quantising twice would add the errors of both. Choose base as-is, or give the "
                "bf16 file."
            )


def stored_as(layer: nn.Linear | QuantisedLinear, base: str) -> QuantisedWeight | Tensor:
    """A layer's weight in one of `BASES`."""
    if base == BASES[0]:
        return layer.stored if isinstance(layer, QuantisedLinear) else layer.weight.detach()
    if base == "bf16":
        return layer.weight.detach().bfloat16()
    weight = layer.weight.detach()
    if base == "4bit":
        return four_bits(weight)
    values, scale = eight_bits(weight.float(), base == "fp8")
    form = FP8 if base == "fp8" else INT8
    return QuantisedWeight(form, tuple(weight.shape), {"weight": values, SCALE: scale})


def four_bits(weight: Tensor) -> QuantisedWeight:
    """A matrix in GGUF's Q4_0: blocks of 32 values with a scale of 16 bits, 4.5 bits a value."""
    rows, columns = weight.shape
    if columns % _BLOCK:
        raise ValueError(
            f"A matrix has {columns} columns; 4 bits need a multiple of {_BLOCK}. Choose fp8."
        )
    blocks = weight.float().reshape(-1, _BLOCK)
    # The value of the largest size becomes -8, of the levels from -8 to 7.
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (largest / -8).half()
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    levels = (blocks * inverse + 8.5).floor().clamp(0, 15).to(torch.uint8)
    low, high = levels.chunk(2, dim=1)
    packed = torch.cat((scale.view(torch.uint8), low | high << 4), dim=1)
    return QuantisedWeight(FOUR_BITS, (rows, columns), {"weight": packed.reshape(rows, -1)})


def _to(
    stored: QuantisedWeight | Tensor, device: torch.device, offload: bool
) -> QuantisedWeight | Tensor:
    if offload:
        return stored
    if isinstance(stored, Tensor):
        return stored.to(device)
    tensors = {name: tensor.to(device) for name, tensor in stored.tensors.items()}
    return QuantisedWeight(stored.form, stored.shape, tensors, stored.group)
