"""Torch's operators that move data, and the bytes they read and write."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "zeros", "scalar_tensor")


class Counter(TorchDispatchMode):
    """Operators that move data, and the bytes they read and write."""

    def __init__(self):
        super().__init__()
        self.operators, self.traffic = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name not in ALLOCATIONS and not is_view(function, arguments, result):
            self.operators.append(name)
            given = {k: v for k, v in (options or {}).items() if k != "out"}
            tensors = list(flat((arguments, given)))
            self.traffic += sum(tensor_bytes(tensor) for tensor in tensors)
            self.traffic += sum(tensor_bytes(tensor) for tensor in flat(result))
            if function._schema.is_mutable and not returns(function):
                self.traffic += sum(map(tensor_bytes, mutated(function, arguments)))
        return result


def is_view(function, arguments, result) -> bool:
    """Whether nothing was moved: the result lies where an argument lies, which did not change."""
    if function._schema.is_mutable:
        return False
    places = {tensor.untyped_storage().data_ptr() for tensor in flat(arguments)}
    results = list(flat(result))
    return bool(results) and all(t.untyped_storage().data_ptr() in places for t in results)


def returns(function) -> bool:
    return len(function._schema.returns) > 0


def mutated(function, arguments):
    for argument, value in zip(function._schema.arguments, arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from flat(value)


def flat(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))


def tensor_bytes(tensor) -> int:
    """Bytes that are there: a broadcast dimension is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
