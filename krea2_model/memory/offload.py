"""Parts of a pipeline on a device: all of them always, in turn, or block by block.

A part lies in main memory (mapped from its file, where nobody changed it) and is on the device only
within `Offload.use`. Whatever ends that, an error or a cancelled run too, it leaves nothing there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..checkpoints.quantised_layers import quantisation_of
from ..config import RAW
from ..text.encoder import Qwen3VLTextEncoder
from ..transformer.model import Krea2Transformer
from ..vae.model import QwenImageVAE
from .activations import WRITING_BYTES, activations
from .block_stream import BlockStream, pack_bytes
from .device_weights import Copies, Weight, bytes_of, weights_of
from .machine import GB, empty_cache, free_device_bytes, free_host_bytes
from .plan import (
    ENCODER,
    NONE,
    RESERVE,
    TRANSFORMER,
    VAE,
    PartSize,
    Plan,
    check_offload,
    peak_of,
    plan_for,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Part:
    """A part that takes its turn on the device.

    name: what messages call it.
    blocks: modules of it that may stream, in the order in which they run.
    brief: modules of it that are needed for one call of a run; where blocks stream, they are on the
        device for that call only.
    forget: frees what the module caches on the device.
    """

    name: str
    module: nn.Module
    blocks: Sequence[nn.Module] = ()
    brief: Sequence[nn.Module] = ()
    forget: Callable[[], None] = lambda: None
    depth: int = field(default=0, init=False)

    def weights(self, streams: bool) -> list[Weight]:
        """All weights; of a streamed part, those outside of `blocks` and `brief`."""
        apart = {w.key for w in weights_of([*self.blocks, *self.brief])} if streams else set()
        return [weight for weight in weights_of([self.module]) if weight.key not in apart]

    def size(self, activations: int) -> PartSize:
        return PartSize(
            self.name,
            bytes_of([self.module]),
            activations,
            tuple(map(pack_bytes, self.blocks)),
            bytes_of(self.brief),
            quantisation_of(self.module),
        )


# Bytes of activations of each part, by its name.
Activations = Callable[[], dict[str, int]]


class Offload:
    """Moves the parts of a pipeline to the device and back.

    mode, max_memory: as `check_offload` takes them; max_memory in GB, None for all that is free.
    default: activations of a run that nobody announced with `prepare`.
    """

    def __init__(
        self,
        device: torch.device,
        mode: str,
        max_memory: float | None,
        parts: Sequence[Part],
        default: Activations,
    ):
        if mode != NONE and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.mode, self._max_memory, self._default = mode, max_memory, default
        self._parts = {part.name: part for part in parts}
        self._copies = {part.name: Copies(device) for part in parts}
        self._streams: dict[str, BlockStream] = {}
        self._brief: list[tuple[Any, Copies]] = []
        self._said = ""
        # Bytes to leave free since a run was out of memory, and whether the last one was.
        self._spare, self._ran_out = 0, False
        self.plan: Plan | None = None

    @property
    def in_use(self) -> bool:
        return any(part.depth for part in self._parts.values())

    def before_change(self, what: str) -> None:
        """Move the weights to main memory before they are changed.

        Raises ValueError during a run, whose copies of the weights would stay as they are.
        """
        if self.in_use:
            raise ValueError(
                f"{what} was called during a run, while copies of the weights are in use; call it "
                "between runs, or choose offload 'none'."
            )
        if self.mode != NONE:
            self.take_away()

    @property
    def streams(self) -> bool:
        """True if the transformer's blocks are copied to the device at each of its calls."""
        return self.plan is not None and TRANSFORMER in self.plan.resident

    def has_room(self, activations: dict[str, int], instead_of: dict[str, int]) -> bool:
        """True if a run with more activations has the same plan as `instead_of`."""
        budget = self._budget()
        if self.mode == NONE:  # the weights are there already
            return budget is None or activations[TRANSFORMER] + RESERVE <= budget
        plans = [self._plan_for(each, budget) for each in (activations, instead_of)]
        return plans[0].mode == plans[1].mode and not plans[0].lacking

    def forecast(self, activations: dict[str, int]) -> tuple[Plan, int, int | None]:
        """The plan of a run, its peak on the device, and the bytes that there are, in bytes.

        Nothing is moved. None for the bytes of a device whose memory is main memory.
        """
        budget = self._budget()
        sizes = self._sizes(activations)
        if self.mode == NONE and budget is not None:  # the weights are there already
            budget += sum(part.weights for part in sizes)
        plan = plan_for(self.mode, sizes, budget)
        return plan, peak_of(plan, sizes), budget

    def prepare(self, activations: dict[str, int]) -> None:
        """Plan a run by the bytes of activations of each part, and log the plan."""
        if self.mode == NONE or self.in_use:  # in use: a run within a run
            return
        budget = self._budget()
        plan = self._plan_for(activations, budget)
        if self.plan is not None and self.plan.mode == NONE != plan.mode:
            self.take_away()
        self.plan, self._ran_out = plan, False
        free = "" if budget is None else f", {budget / GB:.1f} GB free"
        said = f"device {self.device}{free}: {plan.text}"
        if plan.text != self._said:
            logger.info("%s", said)
        if plan.lacking:
            logger.warning(
                "This run needs about %.1f GB of device memory more than there is; choose a "
                "smaller size or quantised files.",
                plan.lacking / GB,
            )
        self._said = plan.text

    @contextmanager
    def use(self, name: str, *beside: nn.Module) -> Iterator[None]:
        """Move a part, and modules that go with it, to the device while the context lasts.

        Parts in use already stay as they are.
        """
        if self.mode == NONE:
            yield
            return
        if self.plan is None:
            self.prepare(self._default())
        part = self._parts[name]
        part.depth += 1
        try:
            if part.depth == 1:
                self._bring(part)
            if self._moves:
                self._copies[name].make(weights_of(beside))
            yield
        except torch.OutOfMemoryError:
            # The next run leaves more memory free.
            self._spare, self._ran_out = self._spare + GB, True
            raise
        finally:
            part.depth -= 1
            if not part.depth:
                self._leave(part)

    def take_away(self) -> None:
        """Remove everything from the device."""
        for part in self._parts.values():
            self._remove(part)
        empty_cache(self.device)

    def _plan_for(self, activations: dict[str, int], budget: int | None) -> Plan:
        return plan_for(self.mode, self._sizes(activations), budget)

    def _sizes(self, activations: dict[str, int]) -> list[PartSize]:
        return [part.size(activations[part.name]) for part in self._parts.values()]

    def _budget(self) -> int | None:
        free = free_device_bytes(self.device)
        if free is not None:
            held = (copies.bytes for copies in self._copies.values())
            free += sum(held)
            free = max(0, free - self._spare)
        limit = None if self._max_memory is None else round(self._max_memory * GB)
        return min((each for each in (free, limit) if each is not None), default=None)

    @property
    def _moves(self) -> bool:
        """True if the plan copies weights: not where all stay in main memory."""
        return self.plan is not None and not (self.plan.mode == NONE and self.device.type == "cpu")

    def _bring(self, part: Part) -> None:
        if not self._moves:
            return
        assert self.plan is not None
        streams = part.name in self.plan.resident
        self._copies[part.name].make(part.weights(streams))
        if not streams:
            return
        for module in part.brief:
            copies = Copies(self.device)
            handles = (
                module.register_forward_pre_hook(
                    lambda module, arguments, copies=copies: copies.make(weights_of([module]))
                ),
                module.register_forward_hook(
                    lambda module, arguments, result, copies=copies: copies.remove()
                ),
            )
            self._brief.append((handles, copies))
        stream = self._streams.get(part.name)
        if stream is None:
            # Half of what is free stays with the system, for the files of other parts.
            stream = BlockStream(part.blocks, self.device, host_bytes=free_host_bytes() // 2)
            self._streams[part.name] = stream
        stream.resident = self.plan.resident[part.name]
        stream.start()

    def _leave(self, part: Part) -> None:
        if self.plan is not None and self.plan.mode == NONE and not self._ran_out:
            return
        for each in self._parts.values():
            if each is part or (self._ran_out and not each.depth):
                self._remove(each)
        empty_cache(self.device)

    def _remove(self, part: Part) -> None:
        if part.name in self._streams:
            self._streams[part.name].stop()
        if part.brief:
            for handles, copies in self._brief:
                for handle in handles:
                    handle.remove()
                copies.remove()
            self._brief.clear()
        self._copies[part.name].remove()
        part.forget()


def offload_parts(
    transformer: Krea2Transformer,
    text_encoder: Qwen3VLTextEncoder,
    vae: QwenImageVAE,
    device: str | torch.device,
    offload: str | None,
    max_memory: float | None,
) -> Offload:
    """The parts of a pipeline under an `Offload`, see `check_offload`."""
    target, mode = check_offload(device, offload, max_memory)
    size = (transformer.preset or RAW).size

    def default() -> dict[str, int]:
        return activations(transformer, text_encoder, vae, batch=1, image=(size // 16) ** 2)

    brief = (transformer.txtfusion, transformer.txtmlp)
    parts = (
        _encoder_part(text_encoder),
        Part(TRANSFORMER, transformer, tuple(transformer.blocks), brief, transformer.forget_tables),
        Part(VAE, vae),
    )
    return Offload(target, mode, max_memory, parts, default)


def offload_encoder(
    text_encoder: Qwen3VLTextEncoder,
    device: str | torch.device,
    offload: str | None,
    max_memory: float | None,
) -> Offload:
    """A text encoder alone, that writes, under an `Offload`."""
    target, mode = check_offload(device, offload, max_memory)
    parts = (_encoder_part(text_encoder),)
    return Offload(target, mode, max_memory, parts, lambda: {ENCODER: WRITING_BYTES})


def _encoder_part(text_encoder: Qwen3VLTextEncoder) -> Part:
    return Part(ENCODER, text_encoder, tuple(text_encoder.layers))
