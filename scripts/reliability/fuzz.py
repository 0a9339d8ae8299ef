"""Files of any content: structures of real ones, changed at random, through every reader.

    python scripts/reliability/fuzz.py --cases 20000 --seed 1

Each must load, or be refused by the pack's own error, in little time and memory. The first that
does not stops the run with its kind and seed, which make the same case again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# At the end: in a process with ComfyUI, `nodes` has to stay ComfyUI's.
sys.path += [str(Path(__file__).resolve().parents[number]) for number in (1, 2)]

# Some of torch's functions import it at their first call, 120 MB for which no file is to blame.
import torch._dynamo  # noqa: E402, F401

import krea2_model  # noqa: E402
from krea2_model import CheckpointError  # noqa: E402
from reliability.fuzz_cases import CASES  # noqa: E402
from reliability.fuzz_sources import Sources  # noqa: E402

MOST_SECONDS = 2.0
# Of the file and of what was loaded; below that, what the allocator keeps hides the rest.
MOST_MEMORY, LEAST_MEMORY = 1.2, 24e6

_OURS = str(Path(krea2_model.__file__).parent)


class Fault(AssertionError):
    """A case that ended in another error, or took too long or too much memory."""


def run(folder: Path, kinds: list[str], count: int, seed: int = 0) -> dict[str, Counter]:
    """Try `count` cases of each kind. Returns how many were accepted and refused.

    Raises Fault at the first that is neither.
    """
    sources = Sources(folder)
    counts = {kind: Counter() for kind in kinds}
    for kind in kinds:
        for number in range(count):
            case = f"{kind}, seed {seed}, case {number}"
            counts[kind][_try(CASES[kind], sources, random.Random(case), case)] += 1
    return counts


def _try(make: Callable, sources: Sources, dice: random.Random, case: str) -> str:
    size, read = make(sources, dice)
    gc.collect(0)
    loaded = 0
    started = time.process_time()
    with _PeakMemory() as memory:
        try:
            loaded = read() or 0
            outcome = "accepted"
        except Exception as error:
            if not _is_own(error):
                raise Fault(f"{case} ends in {type(error).__name__}: {error}") from error
            if len(str(error)) > 2000:
                raise Fault(f"{case} has a message of {len(str(error))} characters") from error
            outcome = "refused"
    seconds, peak = time.process_time() - started, memory.grown
    if seconds > MOST_SECONDS:
        raise Fault(f"{case} ({outcome}) takes {seconds:.1f} s")
    if peak > LEAST_MEMORY + MOST_MEMORY * (size + loaded):
        raise Fault(f"{case} ({outcome}) takes {peak / 1e6:.0f} MB for {size / 1e6:.2f} MB")
    return outcome


def _is_own(error: Exception) -> bool:
    """Whether an error was raised on purpose by the pack."""
    if isinstance(error, CheckpointError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return type(error) is ValueError and last.filename.startswith(_OURS)


class _PeakMemory:
    """How far this process's memory rises within the context, where Linux tells.

    By the kernel's highest mark, which is set back before; where that is not allowed, by looking
    every millisecond.
    """

    def __enter__(self) -> _PeakMemory:
        _give_back()
        self.has_mark = _reset_mark()
        self.before = self.highest = _memory("VmHWM" if self.has_mark else "VmRSS")
        if not self.has_mark:
            self._done = threading.Event()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        if self.has_mark:
            self.highest = _memory("VmHWM")
        else:
            self._done.set()
            self._watcher.join()

    @property
    def grown(self) -> int:
        return self.highest - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.highest = max(self.highest, _memory("VmRSS"))


def _give_back() -> None:
    """Hand what the C library keeps for later back, which would hide what is taken next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_mark() -> bool:
    """Set the highest mark of memory back to what is there now; whether that worked."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return _memory("VmHWM") <= _memory("VmRSS") + LEAST_MEMORY
    return False


def _memory(kind: str) -> int:
    """Bytes of "VmHWM", the most so far, or "VmRSS", those of now; 0 on other systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024
    return 0


def figures(count: int, seed: int = 1) -> str:
    """What a long run found, in words, with `count` cases of each kind."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="krea2-fuzz-") as folder:
        counts = run(Path(folder), list(CASES), count, seed)
    total = sum(counts.values(), Counter())
    lines = [
        f"{total.total():,} files, made from real ones by changing their structure at random (seed "
        f"{seed}), in {time.monotonic() - started:.0f} s: {total['refused']:,} were refused by the "
        f"pack's own error, {total['accepted']:,} were accepted. None ended in another error, took "
        f"over {MOST_SECONDS:g} s, or more memory than {LEAST_MEMORY / 1e6:g} MB and "
        f"{MOST_MEMORY:g} times the file and what was loaded of it."
    ]
    for kind, found in counts.items():
        lines.append(
            f"- {kind}: {found.total():,} tried, {found['refused']:,} refused, "
            f"{found['accepted']:,} accepted"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="of each kind (default: 2000)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(figures(options.cases, options.seed))


if __name__ == "__main__":
    main()
