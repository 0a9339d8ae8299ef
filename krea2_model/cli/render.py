"""`krea2 render`: a picture of every row of a file, by weights that are loaded once."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..checks import counted
from ..images.contact_sheet import contact_sheet
from ..images.output_files import check_outputs, numbered, save_image, to_picture
from .batch import RESULTS, Batch, Job
from .checks import check_folder, check_folders, check_machine
from .errors import Failure, UsageError
from .jobs import check_name, check_row, key_of, message_of, pictures_of_row
from .model_files import Weights, take_from_models
from .progress import Console
from .rendering import check_plain
from .table import Row, read_rows

# Pictures of a sheet that are at most this large on it.
_CELL = 512


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
    check_folders(args, [row.args for row in rows if row.args is not None])
    checked: set[str] = set()
    for row in rows:
        _check_row(row, checked)
    bad = [row for row in rows if row.error]
    for row in bad:
        console.note(f"row {row.number}: {row.error}")
    if bad and (args.strict or len(bad) == len(rows)):
        raise UsageError(
            f"{len(bad)} of {counted(len(rows), 'row')} of {args.table} with errors; row "
            f"{bad[0].number}: {bad[0].error}"
        )
    weights = check_machine(args)
    batch = Batch(args, [job for row in rows for job in _jobs(row, weights)], args.output, console)
    yield from batch.paint([{"row": row.number, "error": row.error} for row in bad])
    made = zip(batch.jobs, batch.files, strict=True)
    files = [(file, job.args.prompt) for job, file in made if file is not None]
    if args.grid is not None and files and (batch.painted or not args.grid.exists()):
        yield _save_sheet(args, files)
    if failed := batch.failed + len(bad):
        raise Failure(
            f"{failed} of {counted(len(batch.jobs) + len(bad), 'picture')} not made; "
            f"{args.output / RESULTS} says why. Mend the rows and add --resume."
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


def _jobs(row: Row, weights: Weights) -> Iterator[Job]:
    if row.args is None or row.error:
        return
    folder, name = row.args.output, getattr(row.args, "row_output", None)
    output = folder / (name or f"{row.number:04d}.{row.args.format}")
    for one in pictures_of_row(row.args):
        yield Job(row.number, one, weights, output, key_of(one), f"row {row.number}")


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
