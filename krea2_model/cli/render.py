"""`krea2 render`: a picture of every row of a file, by weights that are loaded once.

Each finished picture is a line of `results.jsonl` in the folder of the pictures; --resume reads it
and skips those whose settings it has. So a run that was stopped goes on where it ended.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from ..images.contact_sheet import contact_sheet
from ..images.output_files import check_outputs, numbered, save_image, to_picture
from .checks import check_folder, check_machine
from .errors import Failure, UsageError, explain
from .generate import save
from .jobs import check_name, check_row, is_disk_full, key_of, message_of, pictures_of_row
from .model_files import take_from_models
from .progress import Console
from .rendering import check_plain
from .table import Row, read_rows

RESULTS = "results.jsonl"
# Pictures of a sheet that are at most this large on it.
_CELL = 512


@dataclass
class Job:
    """A picture to be made: its row, options, the name it gets, and a digest of its settings."""

    row: int
    args: Namespace
    output: Path
    key: str


def render(args: Namespace) -> Iterator[Path]:
    """Make the pictures; yields each file as it is written, and the sheet at the end.

    Raises Failure at the end where rows had errors, and at once with --strict.
    """
    console = Console(args.quiet)
    check_plain(args)
    take_from_models(args)
    check_folder(args.output)
    if args.grid is not None:
        check_outputs([args.grid])
    rows = read_rows(args.table, args)
    checked: set[str] = set()
    for row in rows:
        _check_row(row, checked)
    bad = [row for row in rows if row.error]
    for row in bad:
        console.note(f"row {row.number}: {row.error}")
    if bad and (args.strict or len(bad) == len(rows)):
        raise UsageError(
            f"{len(bad)} of {len(rows)} rows of {args.table} have errors; row {bad[0].number}: "
            f"{bad[0].error}"
        )
    weights = check_machine(args)
    jobs = [job for row in rows for job in _jobs(row)]
    done = _finished(args.output / RESULTS) if args.resume else {}
    args.output.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, str]] = []
    failed = len(bad)
    with _open_results(args.output / RESULTS) as results:
        for row in bad:
            _write(results, row=row.number, error=row.error)
        left = [job for job in jobs if job.key not in done]
        if len(left) < len(jobs):
            console.note(f"{len(jobs) - len(left)} of {len(jobs)} pictures are made already")
        painter = None
        if left:
            from .painter import Painter

            painter = Painter(args, weights, console)
        taken: set[Path] = set()
        for number, job in enumerate(jobs, 1):
            if job.key in done:
                files.append((done[job.key], job.args.prompt))
                continue
            assert painter is not None
            start = time.monotonic()
            line = {
                "row": job.row,
                "key": job.key,
                "seed": job.args.seed,
                "prompt": job.args.prompt,
            }
            try:
                picture = painter.paint(job.args, f"{number} of {len(jobs)}")
                path = save(picture.image, job.args, picture.results, job.output, taken, console)
            except KeyboardInterrupt:
                console.note(
                    f"{number - 1} of {len(jobs)} pictures are made; --resume makes the rest"
                )
                raise
            except Exception as error:
                message = message_of(error, args)
                _write(results, **line, error=message)
                failed += 1
                if args.strict or _stops_all(error):
                    raise
                console.note(f"row {job.row}: {message}")
                continue
            seconds = round(time.monotonic() - start, 2)
            _write(results, **line, file=path.name, seconds=seconds)
            files.append((path, job.args.prompt))
            yield path
    if args.grid is not None and files and (left or not args.grid.exists()):
        yield _save_sheet(args, files)
    if failed:
        raise Failure(
            f"{failed} of {len(jobs) + len(bad)} pictures were not made; {args.output / RESULTS} "
            "says why. Mend the rows and add --resume."
        )


def _check_row(row: Row, checked: set[str]) -> None:
    """Check the options and files of a row; the same for several rows is checked once."""
    if row.args is None:
        return
    try:
        check_row(row.args, checked)
        if name := getattr(row.args, "row_output", None):
            check_name(name)
            check_outputs([row.args.output / name])
    except ValueError as error:
        row.error = message_of(error, row.args)


def _jobs(row: Row) -> Iterator[Job]:
    if row.args is None or row.error:
        return
    folder, name = row.args.output, getattr(row.args, "row_output", None)
    output = folder / (name or f"{row.number:04d}.{row.args.format}")
    for one in pictures_of_row(row.args):
        yield Job(row.number, one, output, key_of(one))


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


def _write(results, **line: Any) -> None:
    results.write(json.dumps(line) + "\n")
    results.flush()


def _stops_all(error: Exception) -> bool:
    """True where every other row would fail too, or where the error is one of the program."""
    return is_disk_full(error) or explain(error) is None


def _save_sheet(args: Namespace, files: list[tuple[Path, str]]) -> Path:
    pictures = []
    for path, _ in files:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
            pictures.append(np.asarray(small, dtype=np.float32) / 255)
    (target,) = numbered(args.grid, 1, args.force)
    sheet = contact_sheet(pictures, [prompt for _, prompt in files], cell=_CELL)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_image(to_picture(sheet), target)
    return target
