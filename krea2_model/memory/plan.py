"""The plan of a pipeline's parts: together on a device, in turn, or block by block.

- "none": all parts stay on the device.
- "parts": text encoder, transformer and VAE take turns, each as a whole.
- "blocks": likewise, and a part that does not fit comes block by block, with as many blocks
  resident as there is room for.
- "auto": the first of these that fits into the device's free memory.

Activations are estimated from the sizes of a run, see `activations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..devices import find_device
from .block_stream import PLACES
from .machine import GB

# The parts, as messages call them.
ENCODER, TRANSFORMER, VAE = "encoder", "transformer", "VAE"

AUTO, NONE, PARTS, BLOCKS = "auto", "none", "parts", "blocks"
OFFLOADS = (AUTO, NONE, PARTS, BLOCKS)

# For libraries' workspaces, and memory that is free in pieces too small to use.
RESERVE = 400_000_000


@dataclass(frozen=True)
class PartSize:
    """Bytes of a part: all its weights, its blocks, its `brief` modules, its activations.

    kind: the format of its weights, for messages; empty where they are plain.
    """

    name: str
    weights: int
    activations: int
    blocks: tuple[int, ...] = ()
    brief: int = 0
    kind: str = ""

    @property
    def whole(self) -> int:
        return self.weights + self.activations + RESERVE

    def streaming(self, resident: int) -> int:
        """Bytes at the peak where so many blocks are resident and the others stream."""
        largest = max(self.blocks)
        return self.whole - sum(self.blocks) - self.brief + (resident + PLACES) * largest

    def __str__(self) -> str:
        return f"{self.name} {self.weights / GB:.1f} GB{f' {self.kind}' if self.kind else ''}"


@dataclass(frozen=True)
class Plan:
    """The placement of parts.

    mode: NONE, PARTS or BLOCKS.
    resident: number of blocks that stay on the device while a streamed part runs, by part.
    text: the plan in words.
    lacking: bytes that the device lacks for it, 0 where it fits.
    """

    mode: str
    resident: dict[str, int]
    text: str
    lacking: int = 0


def check_offload(
    device: str | torch.device, offload: str | None, max_memory: float | None
) -> tuple[torch.device, str]:
    """The device by its name, and one of `OFFLOADS`.

    offload None is "auto" where the device is, or where max_memory (GB) is given, else "none".
    Raises ValueError for other words, and for a limit that is no number or has no use.
    """
    if offload not in (None, *OFFLOADS):
        raise ValueError(f"offload is {offload!r}; expected one of {', '.join(OFFLOADS)}.")
    if max_memory is not None:
        number = isinstance(max_memory, (int, float)) and not isinstance(max_memory, bool)
        if not number or not 0 < max_memory < math.inf:
            raise ValueError(f"max_memory is {max_memory!r}; expected GB above 0, such as 12.")
        if offload == NONE:
            raise ValueError(
                f"max_memory is {max_memory}, and offload 'none' keeps every part on the device; "
                "use offload 'auto', 'parts' or 'blocks'."
            )
    chooses = device == AUTO or max_memory is not None
    return find_device(device), offload or (AUTO if chooses else NONE)


def plan_for(offload: str, parts: Sequence[PartSize], budget: int | None) -> Plan:
    """The plan for parts and so many bytes of the device.

    budget: None where the device's memory is main memory. Then everything stays, unless it is asked
        to move, and of blocks as few as possible are on the device.
    """
    mode = offload
    if mode == AUTO:
        mode = next(mode for mode in (NONE, PARTS, BLOCKS) if _fits(mode, parts, budget))
    listed = ", ".join(map(str, parts))
    if mode == NONE:
        together = sum(part.weights for part in parts) + max(p.activations for p in parts)
        missing = 0 if budget is None else together + RESERVE - budget
        return Plan(NONE, {}, f"offload none ({listed}, all at once)", max(0, missing))
    if mode == PARTS:
        missing = 0 if budget is None else max(part.whole for part in parts) - budget
        return Plan(PARTS, {}, f"offload parts ({listed} in turn)", max(0, missing))
    resident, words, missing = {}, [], 0
    for part in parts:
        if not part.blocks or (budget is not None and part.whole <= budget):
            words.append(str(part))
            missing = max(missing, part.whole - budget if budget is not None else 0)
            continue
        room = 0 if budget is None else budget - part.streaming(0)
        count = max(0, min(len(part.blocks), room // max(part.blocks)))
        resident[part.name] = count
        words.append(f"{part} with {count} of {len(part.blocks)} blocks resident")
        missing = max(missing, -room)
    return Plan(BLOCKS, resident, f"offload blocks ({', '.join(words)} in turn)", missing)


def peak_of(plan: Plan, parts: Sequence[PartSize]) -> int:
    """Bytes on the device at most while parts run by a plan, without `RESERVE`."""
    if plan.mode == NONE:
        return sum(part.weights for part in parts) + max(part.activations for part in parts)
    peaks = []
    for part in parts:
        resident = plan.resident.get(part.name)
        peaks.append(part.whole if resident is None else part.streaming(resident))
    return max(peaks) - RESERVE


def _fits(mode: str, parts: Sequence[PartSize], budget: int | None) -> bool:
    if mode == BLOCKS or budget is None:
        return True
    if mode == PARTS:
        return max(part.whole for part in parts) <= budget
    most = max(part.activations for part in parts)
    return sum(part.weights for part in parts) + most + RESERVE <= budget
