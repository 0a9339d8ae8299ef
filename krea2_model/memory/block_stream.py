"""Blocks that come to the device one after the other while a model runs.

Some blocks are resident: they come at their first call and stay until the stream stops. The
others take turns in two places on the device: while one calculates, the next is copied, on a stream
of its own and from pinned memory where the device is CUDA's. Resident blocks are spread evenly, so
that copies go on while they calculate.

Weights of a block are packed into one run of bytes, and so are one copy. Packs in pinned memory are
kept for the next run as long as the weights are the same; beyond `host_bytes` of them, blocks are
packed anew each time, into two buffers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .device_weights import Weight, new_bytes, weights_of

logger = logging.getLogger(__name__)

# Blocks on the device beside the resident ones: one that calculates and one that comes.
PLACES = 2
# Alignment of tensors in a pack, for any dtype and for fast copies.
_ALIGNMENT = 256


class Lane:
    """Copies to a device that has no streams: each is done when the call returns."""

    pins = False

    def mark(self) -> Any:
        """A point in the device's work."""
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy once the device has come to `after`; the point at which it is done."""
        target.copy_(source)
        return None

    def wait(self, done: Any) -> None:
        """Let the device's further work wait for a copy."""

    def finish(self, done: Any = None) -> None:
        """Wait here for a copy, or for all."""


class CudaLane(Lane):
    """Copies beside the device's work, on a stream of their own."""

    pins = True

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self):
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, target, source, after):
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            done.record(self._stream)
        return done

    def wait(self, done):
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)

    def finish(self, done=None):
        if done is not None:
            done.synchronize()
        else:
            self._stream.synchronize()


def lane_for(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else Lane()


class _Piece(NamedTuple):
    """A weight of a block, the tensor that holds it in main memory, and its place in the pack."""

    weight: Weight
    original: Tensor
    version: int
    start: int

    @property
    def identity(self) -> tuple:
        """The same as long as the weight has the same numbers."""
        return self.weight.key, self.original.data_ptr(), self.original.shape, self.version

    def view(self, pack: Tensor) -> Tensor:
        count = self.original.numel() * self.original.element_size()
        part = pack[self.start : self.start + count]
        return part.view(self.original.dtype).view(self.original.shape)


def pack_layout(block: nn.Module) -> tuple[list[_Piece], int]:
    """The place of each weight of a block in its pack, and the bytes of the pack."""
    pieces, end = [], 0
    for weight in weights_of([block]):
        tensor = weight.tensor
        pieces.append(_Piece(weight, tensor, weight.version, end))
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return pieces, end


def pack_bytes(block: nn.Module) -> int:
    return pack_layout(block)[1]


@dataclass
class _Buffer:
    """A run of bytes, which block is in it, and the points at which it came and was used."""

    memory: Tensor
    block: int | None = None
    came: Any = None
    used: Any = None
    in_use: bool = False


class BlockStream:
    """Streams blocks to a device from `start` to `stop`.

    resident: number of blocks that stay on the device in between.
    host_bytes: of packs that are kept in (pinned) main memory; 0 packs anew each time.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        resident: int = 0,
        host_bytes: int = 0,
    ):
        self.blocks, self.device = list(blocks), device
        self.host_bytes = host_bytes
        self._lane = lane_for(device)
        self._packs: dict[int, tuple[list[_Piece], Tensor]] = {}
        self._handles: list[Any] = []
        self._layouts: list[list[_Piece]] = []
        self._staying: dict[int, _Buffer] = {}
        self._places: list[_Buffer] = []
        self._staging: list[_Buffer] = []
        self.resident = resident

    @property
    def resident(self) -> int:
        return len(self.blocks) - len(self.streamed)

    @resident.setter
    def resident(self, count: int) -> None:
        total = len(self.blocks)
        moving = max(0, total - count)
        if moving <= PLACES:  # they would never make room for others
            moving = 0
        self.streamed = [(2 * turn + 1) * total // (2 * moving) for turn in range(moving)]

    def start(self) -> None:
        """Prepare to stream; the first call of a block brings it."""
        layouts = [pack_layout(block) for block in self.blocks]
        self._layouts = [pieces for pieces, _ in layouts]
        self._sizes = [size for _, size in layouts]
        self._following = dict(
            zip(self.streamed, self.streamed[1:] + self.streamed[:1], strict=True)
        )
        self._drop_stale_packs()
        for index, block in enumerate(self.blocks):
            self._handles += [
                block.register_forward_pre_hook(functools.partial(self._before, index)),
                block.register_forward_hook(functools.partial(self._after, index)),
            ]

    def stop(self) -> None:
        """Restore every weight to the one in main memory, and free the device."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._lane.finish()
        for index in range(len(self._layouts)):
            self._put(index, None)
        self._layouts, self._staying, self._places, self._staging = [], {}, [], []

    def _before(self, index: int, block: nn.Module, arguments: Any) -> None:
        if index not in self._following:
            if index not in self._staying:
                buffer = self._new_buffer(self._sizes[index])
                self._fill(buffer, index)
                self._lane.wait(buffer.came)
                self._put(index, buffer.memory)
                self._staying[index] = buffer
            return
        place = self._place_of(index) or self._bring(index)
        self._lane.wait(place.came)
        self._put(index, place.memory)
        place.in_use = True

    def _after(self, index: int, block: nn.Module, arguments: Any, result: Any) -> None:
        if index not in self._following:
            return
        self._put(index, None)
        place = self._place_of(index)
        assert place is not None
        place.in_use, place.used = False, self._lane.mark()
        # Only now, with this block's work already on its way: packing keeps the host busy.
        following = self._following[index]
        if self._place_of(following) is None:
            self._bring(following)

    def _place_of(self, index: int) -> _Buffer | None:
        return next((place for place in self._places if place.block == index), None)

    def _bring(self, index: int) -> _Buffer:
        """Start to copy a streamed block to the place that was used the longest ago."""
        if len(self._places) < PLACES:
            place = self._new_buffer(max(self._sizes[at] for at in self.streamed))
        else:
            place = next(place for place in self._places if not place.in_use)
            self._places.remove(place)
        self._places.append(place)
        place.block = None
        self._fill(place, index)
        return place

    def _new_buffer(self, size: int) -> _Buffer:
        return _Buffer(new_bytes(size, self.device), used=self._lane.mark())

    def _fill(self, buffer: _Buffer, index: int) -> None:
        size = self._sizes[index]
        pack = self._cached_pack(index)
        if pack is not None:
            buffer.came = self._lane.copy(buffer.memory[:size], pack, buffer.used)
        else:
            if len(self._staging) < PLACES:
                staging = _Buffer(self._host_memory(max(self._sizes)))
            else:
                staging = self._staging.pop(0)
                self._lane.finish(staging.came)
            self._staging.append(staging)
            self._pack(index, staging.memory)
            source = staging.memory[:size]
            buffer.came = staging.came = self._lane.copy(buffer.memory[:size], source, buffer.used)
        buffer.block = index

    def _cached_pack(self, index: int) -> Tensor | None:
        """The pack of a streamed block in main memory, made if there is room, else None."""
        if index in self._packs:
            return self._packs[index][1]
        held = sum(len(pack) for _, pack in self._packs.values())
        if index not in self._following or held + self._sizes[index] > self.host_bytes:
            return None
        pack = self._host_memory(self._sizes[index])
        self._pack(index, pack)
        self._packs[index] = (self._layouts[index], pack)
        return pack

    def _host_memory(self, size: int) -> Tensor:
        cpu = torch.device("cpu")
        if self._lane.pins:
            try:
                return new_bytes(size, cpu, pinned=True)
            except RuntimeError as error:
                logger.info("No pinned memory (%s); copies to the device are slower.", error)
        return new_bytes(size, cpu)

    def _pack(self, index: int, memory: Tensor) -> None:
        for piece in self._layouts[index]:
            piece.view(memory).copy_(piece.original)

    def _drop_stale_packs(self) -> None:
        """Drop packs of weights that are others by now, and of blocks that no longer stream."""
        for index, (pieces, _) in list(self._packs.items()):
            before, now = (
                [piece.identity for piece in layout] for layout in (pieces, self._layouts[index])
            )
            if index not in self._following or before != now:
                del self._packs[index]

    def _put(self, index: int, memory: Tensor | None) -> None:
        """Point a block's weights to a pack on the device, or back to main memory."""
        for piece in self._layouts[index]:
            piece.weight.put(piece.original if memory is None else piece.view(memory))
