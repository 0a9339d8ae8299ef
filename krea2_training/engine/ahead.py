"""Data of steps without waiting: read while the step before is computed, and kept in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Gives what a function makes of numbers, and has it make the next one in a thread meanwhile.

    The function depends on its number alone. stride: to the next number. end: which none reaches.
    device: where it makes tensors; on a GPU copies to it do not wait for the step that is computed.
    What was made is held until the next is asked for: work on it has to be finished by then, as it
    is where its loss has been read. What the function raises is raised where its number is asked
    for.
    """

    def __init__(
        self,
        function: Callable[[int], Made],
        end: int,
        stride: int = 1,
        device: torch.device | None = None,
    ):
        self.function, self.end, self.stride = function, end, stride
        is_cuda = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._held: Made | None = None
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._next: tuple[int, Future[Made]] | None = None

    def __call__(self, number: int) -> Made:
        waiting, self._next = self._next, None
        if waiting is not None and waiting[0] == number:
            made = waiting[1].result()
        else:
            # In the same thread, after what it may be making: the function is never run twice.
            made = self._thread.submit(self._make, number).result()
        self._held = made
        following = number + self.stride
        if following < self.end:
            self._next = following, self._thread.submit(self._make, following)
        return made

    def _make(self, number: int) -> Made:
        if self._stream is None:
            return self.function(number)
        with torch.cuda.stream(self._stream):
            made = self.function(number)
        self._stream.synchronize()
        return made


class Kept:
    """Tensors of files by a key, those that were read first, up to a number of bytes."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._kept: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str, read: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was read of a key, or is read now. It is not to be changed."""
        if (kept := self._kept.get(key)) is not None:
            return kept
        tensors = read(key)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.size + size <= self.limit:
            self.size += size
            self._kept[key] = tensors
        return tensors
