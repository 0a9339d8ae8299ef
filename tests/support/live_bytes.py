"""Memory by counting: the bytes of tensors that are alive, also of those without content."""

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make on a device; `peak` is the most at a time."""

    def __init__(self, device="cpu"):
        super().__init__()
        self._device = device
        self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __enter__(self):
        gc.collect()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        for tensor in _tensors((*arguments, *(options or {}).values())):
            self._known.add(tensor.untyped_storage())  # made by others
        result = function(*arguments, **(options or {}))
        for tensor in _tensors((result,)):
            if tensor.device.type == self._device:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, count):
        self.live -= count
