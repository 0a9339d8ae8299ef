"""The most memory that tensors take together while some code runs, on any device and on meta."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """The most bytes of tensors made inside that are alive together."""

    def __init__(self):
        super().__init__()
        self.most, self._sizes = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in args:
            self._note(tensor, made_inside=False)
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self._note(tensor, made_inside=True)
        self.most = max(self.most, sum(self._sizes.values()))
        return out

    def _note(self, tensor, made_inside: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata  # on meta no storage has an address
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes() if made_inside else 0
            weakref.finalize(storage, self._sizes.pop, key, None)
