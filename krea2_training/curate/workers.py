"""A function of many files, on several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

# Files of a task, and tasks ahead of a process: few enough that Ctrl+C is answered soon.
_CHUNK, _AHEAD = 16, 4
# A process takes as long to start as so many pictures take to be read.
_WORTH_A_PROCESS = 64


def each(
    function: Callable[[Path], Result], files: Sequence[Path], workers: int | None = None
) -> Iterator[Result]:
    """The function's results, in the order of the files.

    workers: processes; None is one for each core, and none beside this one for a few files.
    """
    count = min(workers or os.cpu_count() or 1, len(files) // _WORTH_A_PROCESS)
    if count < 2:
        yield from map(function, files)
        return
    # Not forked: a process with threads, such as a progress bar's, cannot be copied safely.
    context = multiprocessing.get_context("spawn")
    chunks = iter([files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)])
    with ProcessPoolExecutor(count, context, _ignore_interrupts) as pool:
        try:
            ahead = [pool.submit(_all, function, one) for one in islice(chunks, count * _AHEAD)]
            while ahead:
                yield from ahead.pop(0).result()
                ahead += [pool.submit(_all, function, one) for one in islice(chunks, 1)]
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave Ctrl+C, which a terminal sends to all processes, to the first one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _all(function: Callable[[Path], Result], files: Iterable[Path]) -> list[Result]:
    return [function(file) for file in files]
