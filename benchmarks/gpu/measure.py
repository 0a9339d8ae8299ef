"""Times by events, peaks of memory, errors: how the sections measure."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PAIRS = 7
GB = 1e9


def has_gpu() -> bool:
    return torch.cuda.is_available()


def wait() -> None:
    if has_gpu():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], launches: int = 1) -> float:
    """Of one call, by events around `launches` of them; on a CPU by its clock."""
    if not has_gpu():
        started = time.perf_counter()
        for _ in range(launches):
            call()
        return 1e3 * (time.perf_counter() - started) / launches
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / launches


def median_milliseconds(call: Callable[[], Any], launches: int = 20, repeats: int = 3) -> float:
    call()
    if not has_gpu():  # where the numbers say nothing, one is enough
        launches = repeats = 1
    return statistics.median(milliseconds(call, launches) for _ in range(repeats))


def in_turns(
    calls: dict[str, Callable[[], Any]], pairs: int = PAIRS, warm: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each call, all of them once a turn, every second turn in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm, pairs):
        names = list(calls) if turn % 2 else list(calls)[::-1]
        for name in names:
            spent = milliseconds(calls[name])
            if turn >= 0:
                times[name].append(spent)
    return times


def compared(times: dict[str, list[float]], ours: str = "ours") -> dict[str, Any]:
    """Medians of all, and for each peer its time over ours by turns: median, least, most."""
    row: dict[str, Any] = {f"{n}_ms": statistics.median(spent) for n, spent in times.items()}
    for peer, spent in times.items():
        if peer != ours:
            ratios = [theirs / own for theirs, own in zip(spent, times[ours], strict=True)]
            row[f"{peer}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def host_milliseconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Until a call returns, the device not waited for: the work of Python and of launching."""
    if not has_gpu():
        repeats = 1
    spent = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        call()
        spent.append(1e3 * (time.perf_counter() - started))
        wait()
    return statistics.median(spent)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that torch held on the device during a call, beyond what it held before."""
    if not has_gpu():
        call()
        return 0
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait()
    return torch.cuda.max_memory_allocated() - before


def free_bytes() -> int:
    """Of the card, torch's own reserve given back first."""
    if not has_gpu():
        return 0
    gc.collect()
    wait()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def host_bytes() -> int:
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss


def error_of(value: Tensor, reference: Tensor) -> float:
    """`||value - reference|| / ||reference||` in float64; infinite where anything is not finite."""
    if value.shape != reference.shape:
        raise ValueError(f"The result is {tuple(value.shape)}, not {tuple(reference.shape)}.")
    value, reference = value.double(), reference.to(value.device).double()
    if not bool(torch.isfinite(value).all() and torch.isfinite(reference).all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm())
