"""Progress and notes on stderr."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Console:
    """Progress bars and notes; quiet: neither."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    def note(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def bar(self, total: int | None, text: str, **options: Any) -> Iterator[tqdm]:
        """A bar whose clock moves between updates too, where a terminal shows it."""
        with tqdm(total=total, desc=text, disable=self.quiet, **options) as bar, _clock(bar):
            yield bar

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A line with a clock for work that has no steps to count."""
        with self.bar(None, text, bar_format="{desc}: {elapsed}"):
            yield


class LogHandler(logging.Handler):
    """Writes log lines above the bars, where others would break them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def _clock(bar: tqdm) -> Iterator[None]:
    if bar.disable or not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
