"""Many pictures in one run, by weights that are loaded once, with a line of results for each.

Each finished picture is a line of `results.jsonl` in the folder of the pictures; --resume reads it
and skips those whose settings it has. So a run that was stopped goes on where it ended.
"""

from __future__ import annotations

import gc
import json
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..checks import counted
from .errors import explain
from .generate import save
from .jobs import is_disk_full, message_of
from .model_files import Weights
from .progress import Console

if TYPE_CHECKING:
    from .painter import Painter

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Job:
    """A picture to be made: its options, weights, the name it gets, and a digest of its settings.

    row: the number of its row or cell, from 1. place: what to call that in messages. facts: of its
    line of results.
    """

    row: int
    args: Namespace
    weights: Weights
    output: Path
    key: str
    place: str
    facts: dict[str, Any] = field(default_factory=dict)


class Batch:
    """The pictures of `jobs`, painted in their order.

    folder: of the results. kept_texts: encodings of prompts that are kept for later pictures.

    files: of each job, None until it is made. painted, failed: counts of this run.
    """

    def __init__(
        self,
        args: Namespace,
        jobs: Sequence[Job],
        folder: Path,
        console: Console,
        kept_texts: int = 2,
    ):
        self.jobs, self.folder = jobs, folder
        self._args, self._console, self._kept_texts = args, console, kept_texts
        done = _finished(folder / RESULTS) if args.resume else {}
        self.files = [done.get(job.key) for job in jobs]
        self.painted = self.failed = 0
        if made := len(jobs) - self.files.count(None):
            console.note(f"{made} of {counted(len(jobs), 'picture')} made already")

    def paint(self, errors: Sequence[dict[str, Any]] = ()) -> Iterator[Path]:
        """Make the pictures that are not there; yields each file as it is written.

        errors: lines of results for rows that have no job.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        taken: set[Path] = set()
        painters = _Painters(self._args, self._console, self._kept_texts)
        with _open_results(self.folder / RESULTS) as results, painters:
            for line in errors:
                _write(results, **line)
            for index, job in enumerate(self.jobs):
                if self.files[index] is not None:
                    continue
                painters.load(job.weights)
                start = time.monotonic()
                line = {
                    "row": job.row,
                    "key": job.key,
                    **job.facts,
                    "seed": job.args.seed,
                    "prompt": job.args.prompt,
                }
                title = f"{index + 1} of {len(self.jobs)}"
                try:
                    picture = painters.loaded.paint(job.args, title)
                    path = save(
                        picture.image, job.args, picture.results, job.output, taken, self._console
                    )
                except KeyboardInterrupt:
                    made = len(self.jobs) - self.files.count(None)
                    self._console.note(
                        f"{made} of {counted(len(self.jobs), 'picture')} made; --resume makes the "
                        "rest"
                    )
                    raise
                except Exception as error:
                    message = message_of(error, self._args)
                    _write(results, **line, error=message)
                    self.failed += 1
                    if self._args.strict or _stops_all(error):
                        raise
                    self._console.note(f"{job.place}: {message}")
                    continue
                seconds = round(time.monotonic() - start, 2)
                _write(results, **line, file=path.name, seconds=seconds)
                self.files[index] = path
                self.painted += 1
                yield path


class _Painters:
    """The painter of one set of weights at a time."""

    def __init__(self, args: Namespace, console: Console, kept_texts: int):
        self._args, self._console, self._kept_texts = args, console, kept_texts
        self._weights: Weights | None = None
        self._painter: Painter | None = None
        self._texts = ExitStack()

    @property
    def loaded(self) -> Painter:
        """Held by nobody else, so that its weights go when others are loaded."""
        assert self._painter is not None
        return self._painter

    def load(self, weights: Weights) -> None:
        """Load these weights, after those of another painter are dropped."""
        from .painter import Painter

        if self._painter is None or weights != self._weights:
            self.__exit__()
            self._painter = Painter(self._args, weights, self._console)
            self._weights = weights
            self._texts.enter_context(self._painter.keep_texts(self._kept_texts))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._texts.close()
        if self._painter is not None:
            self._painter = None
            gc.collect()  # modules refer to each other in circles


def _finished(path: Path) -> dict[str, Path]:
    """Files of an earlier run that are there, by their keys."""
    found: dict[str, Path] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            file = path.parent / entry["file"]
        except (ValueError, KeyError, TypeError):
            continue  # an error of that run, or a line that a crash has cut
        if file.is_file():
            found[str(entry.get("key"))] = file
    return found


def _open_results(path: Path) -> TextIO:
    """The file to add lines to; one that a crash has cut is ended first."""
    is_cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    results = path.open("a", encoding="utf-8")
    if is_cut:
        results.write("\n")
    return results


def _write(results: TextIO, **line: Any) -> None:
    results.write(json.dumps(line) + "\n")
    results.flush()


def _stops_all(error: Exception) -> bool:
    """True where every other picture would fail too, or where the error is one of the program."""
    return is_disk_full(error) or explain(error) is None
