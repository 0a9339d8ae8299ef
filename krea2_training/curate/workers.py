"""A function of many files, on several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

Result = TypeVar("Result")
Task = TypeVar("Task")

# Files of a task, and tasks ahead of a process: few enough that Ctrl+C is answered soon.
CHUNK, AHEAD = 16, 4
# A process takes as long to start as so many pictures take to be read.
_WORTH_A_PROCESS = 64


class Each(Protocol):
    """The results of a function of many files, in their order."""

    def __call__(
        self, function: Callable[[Path], Result], files: Sequence[Path], /
    ) -> Iterator[Result]: ...


def each(
    function: Callable[[Path], Result], files: Sequence[Path], workers: int | None = None
) -> Iterator[Result]:
    """The function's results, in the order of the files, from processes of this machine.

    workers: processes; None is one for each core, and none beside this one for a few files.
    """
    count = min(workers or os.cpu_count() or 1, len(files) // _WORTH_A_PROCESS)
    if count < 2:
        yield from map(function, files)
        return
    # Not forked: a process with threads, such as a progress bar's, cannot be copied safely.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _ignore_interrupts) as pool:
        try:
            every = partial(all_of, function)
            for future in ahead_of(partial(pool.submit, every), files, count * AHEAD):
                yield from future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def ahead_of(
    submit: Callable[[Sequence[Path]], Task], files: Sequence[Path], most: int
) -> Iterator[Task]:
    """Tasks of the files in their order; so many are submitted before their turn at most."""
    chunks = iter([files[start : start + CHUNK] for start in range(0, len(files), CHUNK)])
    ahead = deque(map(submit, islice(chunks, most)))
    while ahead:
        yield ahead.popleft()
        ahead.extend(map(submit, islice(chunks, 1)))


def all_of(function: Callable[[Path], Result], files: Iterable[Path]) -> list[Result]:
    return [function(file) for file in files]


def _ignore_interrupts() -> None:
    """Leave Ctrl+C, which a terminal sends to all processes, to the first one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
