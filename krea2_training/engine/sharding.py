"""Weights in parts over the processes of a run, by torch's FSDP2 and tensor parallelism.

Each block, and each other part of the model that is called by itself, is gathered when it is
computed and let go after it. Adapters are small: each process has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from krea2_model import Krea2Transformer, TransformerConfig

from .world import World, is_sharded

# torch.distributed is imported where it is used: some builds of torch have none.

# Matrices of a block by what tensor parallelism does: heads and hidden units go to one process
# each, and what they give is summed.
_APART = ("attn.wq", "attn.wk", "attn.wv", "attn.gate", "mlp.gate", "mlp.up")
_JOINED = ("attn.wo", "mlp.down")


def check_tensor_parallel(config: TransformerConfig, tensor: int) -> None:
    """Raise ValueError for a model whose heads cannot be shared out among so many processes."""
    heads, hidden = config.num_key_value_heads, config.intermediate_size
    if heads % tensor or hidden % tensor:
        raise ValueError(
            f"ranks.tensor is {tensor}; expected a divisor of {math.gcd(heads, hidden)}: the "
            f"blocks have {heads} heads of keys and values, and {hidden} hidden units."
        )


def shard(
    model: Krea2Transformer,
    world: World,
    device: torch.device,
    whole: Iterable[nn.Parameter] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Move a model to the devices of all processes, in parts.

    whole: parameters of which each process keeps all, such as adapters. dtype: of the weights from
    then on, a part at a time; None leaves them.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    ignored = set(whole)
    for block in model.blocks:
        block.to(device, dtype)
        if world.tensor is not None:
            # Each process's heads give the norms of queries and keys a part of their gradients.
            ignored |= set(block.get_submodule("attn.qknorm").parameters())
            plan = {name: ColwiseParallel() for name in _APART}
            parallelize_module(
                block, world.tensor, plan | {name: RowwiseParallel() for name in _JOINED}
            )
        _shard(block, world, ignored)
    for name, part in model.named_children():
        if name != "blocks":
            _shard(part.to(device, dtype), world, ignored)
    _shard(model, world, ignored)
    # Called before the model itself, whose call begins and ends a pass otherwise.
    register_fsdp_forward_method(model, "fuse_text")
    register_fsdp_forward_method(model, "cache_references")


def _shard(module: nn.Module, world: World, ignored: set[nn.Parameter]) -> None:
    from torch.distributed.fsdp import fully_shard

    own = {p for p in module.parameters() if p in ignored}
    # A part that stays gathered after a pass would answer with other parameters than the trained.
    fully_shard(module, mesh=world.data, reshard_after_forward=True, ignored_params=own)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients down to a norm, and return the norm they had; `most` 0 only measures.

    They may be sharded over processes, in different ways.
    """
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(mesh_of(parameter), []).append(parameter)
    norms = [
        whole_tensor(get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in groups.values()
    ]
    if not norms:
        return 0.0
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    if most:
        for group in groups.values():
            clip_grads_with_norm_(group, most, norm)
    return float(norm)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all processes ask for it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def mesh_of(tensor: Tensor) -> object:
    """The processes that a tensor is sharded over, None where it is whole."""
    return tensor.device_mesh if is_sharded(tensor) else None


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy all of a value to a tensor that may be sharded."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(tensor.device)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
