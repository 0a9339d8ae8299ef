"""The processes of a run: this one alone, or those that torchrun has started.

What a run computes does not depend on their number. A step's batches are shared out among them, and
gradients are the mean over all, whether torch's FSDP2 shards the trained weights or each process
holds all of them. Tensor parallelism puts several processes on the same batches, each with a part
of every block.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..settings.sections import Ranks

if TYPE_CHECKING:  # some builds of torch have none of it
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# Encoding may take one process hours longer than another. One that dies ends them all at once.
_PATIENCE = timedelta(hours=12)
# Numbers of gradients that are exchanged at once.
_BUCKET = 64_000_000
_COPIES, _DATA, _TENSOR = "copies", "data", "tensor"


class StopTraining(Exception):
    """Raised by a function that is called after each step, to end a run with what it has learned.

    Its state is saved and its result written.
    """


class OtherProcess(RuntimeError):
    """Another process of the run failed; it has said how."""


# What one process raises between steps, all do. The last is the strongest.
_ENDINGS: tuple[type[BaseException], ...] = (StopTraining, KeyboardInterrupt, OtherProcess)


@dataclass(frozen=True)
class World:
    """This process among those of a run.

    index, count: of all processes. share, shares: of the step's batches; with tensor parallelism
    several processes have one share. mesh: (copies, data, tensor), None for one process.
    """

    index: int = 0
    count: int = 1
    share: int = 0
    shares: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and speaks."""
        return self.index == 0

    @property
    def data(self) -> DeviceMesh:
        """The processes over which weights are sharded; (copies, data) where there are copies."""
        assert self.mesh is not None
        return self.mesh[_COPIES, _DATA] if self.mesh.size(0) > 1 else self.mesh[_DATA]

    @property
    def tensor(self) -> DeviceMesh | None:
        """The processes among which blocks are parted, None where they are not."""
        return self.mesh[_TENSOR] if self.mesh is not None and self.count > self.shares else None

    def own(self, count: int) -> range:
        """Which of `count` batches or groups are this process's."""
        return range(self.share, count, self.shares)

    def mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The mean of each number over the shares. All processes have the same names."""
        if self.count == 1:
            return dict(numbers)
        values = torch.tensor([numbers[name] for name in sorted(numbers)], dtype=torch.float64)
        values = self._summed(values) / self.count
        return dict(zip(sorted(numbers), values.tolist(), strict=True))

    def gathered(self, value: Any) -> list[Any]:
        """A value of each share, in order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found[:: self.count // self.shares]

    def synchronise(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make gradients of parameters that are not sharded the mean over the shares.

        One that no process has a gradient of keeps none. With tensor parallelism such parameters
        are norms of which each process has seen its own heads, so that those parts are summed.
        """
        if self.count == 1:
            return
        whole = [parameter for parameter in parameters if not is_sharded(parameter)]
        for bucket in _buckets(whole):
            has = [float(p.grad is not None) for p in bucket]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.reshape(-1) for grad in grads] + [grads[0].new_tensor(has)])
            dist.all_reduce(flat)
            *sums, counts = flat.split([*(grad.numel() for grad in grads), len(bucket)])
            for parameter, total, count in zip(bucket, sums, counts.tolist(), strict=True):
                if count:
                    parameter.grad = total.view_as(parameter) / self.shares

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise in all processes, at the end of the block, an error of any of them.

        For work between collective operations. StopTraining and KeyboardInterrupt are raised as
        they are, other errors as OtherProcess.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as found:
            error = found
        if self.count > 1:
            kinds = [number for number, kind in enumerate(_ENDINGS, 1) if isinstance(error, kind)]
            code = 0 if error is None else (kinds or [len(_ENDINGS)])[0]
            worst = int(self._max(code))
            if worst > code:
                raise _ENDINGS[worst - 1]("Another process of the run ended; it says why.")
        if error is not None:
            raise error

    def _max(self, value: int) -> int:
        if self.count == 1:
            return value
        found = torch.tensor(value, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _summed(self, values: Tensor) -> Tensor:
        values = values.to(self._device)
        dist.all_reduce(values)
        return values.cpu()

    @property
    def _device(self) -> torch.device:
        is_cuda = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


ALONE = World()


def world_of(device: torch.device, ranks: Ranks) -> World:
    """The world that torchrun's environment tells of; begins torch's process group.

    Raises ValueError where the processes cannot be shared out as the settings say.
    """
    count, tensor, copies = processes(), ranks.tensor, ranks.copies
    if count == 1:
        return ALONE
    for name, parts, whole in (
        ("tensor", tensor, count), ("copies", copies, count // tensor),
    ):  # fmt: skip
        if whole % parts:
            raise ValueError(
                f"ranks.{name} is {parts}; expected a divisor of {whole}: torchrun has started "
                f"{count} processes"
                + (f", and ranks.tensor is {tensor}." if whole < count else ".")
            )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    from torch.distributed.device_mesh import init_device_mesh

    index, shares = dist.get_rank(), count // tensor
    shape, names = (copies, shares // copies, tensor), (_COPIES, _DATA, _TENSOR)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return World(index, count, index // tensor, shares, mesh)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """True for a tensor of which this process holds a part."""
    return hasattr(tensor, "placements")


def processes() -> int:
    """How many processes torchrun has started, 1 without it."""
    is_launched = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if is_launched else 1


def is_first() -> bool:
    """True for the process that speaks, before there is a world."""
    return processes() == 1 or os.environ["RANK"] == "0"


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, of those of its machine."""
    if processes() == 1 or device.type != "cuda":
        return device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
