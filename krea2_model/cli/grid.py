"""`krea2 grid`: the values of one to three options against each other, on one labelled sheet."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from PIL import Image

from ..checks import counted
from ..images.grid_sheet import Place, check_counts, grid_sheet, small_copy
from ..images.output_files import check_outputs, image_format, numbered, save_image
from .axes import Axis, Cell, cells_of, read_axes
from .batch import RESULTS, Batch, Job
from .checks import check_folder, check_folders, check_machine
from .errors import Failure, UsageError
from .generate import named_options, pictures_of
from .jobs import check_row, key_of, message_of
from .model_files import Weights, take_from_models
from .picture_options import WEIGHTS
from .progress import Console

# Encodings of prompts that are kept: those of a grid come again with every LoRA.
_KEPT_TEXTS = 64


def grid(args: Namespace, typed: list[str]) -> Iterator[Path]:
    """Make the pictures of all cells; yields each file as it is written, and the sheet at the end.

    The sheet is written with the pictures that there are when the run is stopped, too.
    typed: the words of the command line, which name options for all cells.
    """
    console = Console(args.quiet)
    named = named_options(typed, "grid")
    args.prompt, args.seeds = args.prompt or "", None
    if args.images != 1:
        raise UsageError(
            f"--images is {args.images}; a grid has a picture in each cell. Leave it out, and take "
            "seeds as an axis: --z seed=1-4."
        )
    axes = read_axes({"x": args.x, "y": args.y, "z": args.z}, args, sorted(named), args.max_cells)
    if not any(axis.name in ("model", "transformer") for axis in axes):
        take_from_models(args)
    image_format(args.output)
    (sheet,) = numbered(args.output, 1, args.force or args.resume)
    folder = sheet.with_suffix("")
    check_outputs([sheet])
    check_counts(*_counts(axes))
    check_folder(folder)
    cells = list(cells_of(axes, args))
    check_folders(args, [cell.args for cell in cells])
    jobs = _jobs(cells, folder, args.format)
    batch = Batch(args, _in_order(list(jobs.values())), folder, console, _KEPT_TEXTS)
    try:
        yield from batch.paint()
    finally:
        files = {job.key: file for job, file in zip(batch.jobs, batch.files, strict=True) if file}
        made = {cell.place: files[key] for cell, key in _keys(cells) if key in files}
        if made:
            _save_sheet(sheet, axes, made)
            if len(made) < len(cells):
                console.note(f"{sheet} has {len(made)} of {len(cells)} cells")
    if made:
        yield sheet
    if batch.failed:
        raise Failure(
            f"{batch.failed} of {counted(len(batch.jobs), 'picture')} not made; "
            f"{folder / RESULTS} says why. --resume makes them."
        )


def _counts(axes: Sequence[Axis]) -> tuple[int, int, int]:
    """Columns, rows and blocks of the sheet."""
    counts = {axis.letter: len(axis.values) for axis in axes}
    return counts.get("x", 1), counts.get("y", 1), counts.get("z", 1)


def _keys(cells: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
    for cell in cells:
        (one,) = pictures_of(cell.args)
        yield cell, key_of(one)


def _jobs(cells: Sequence[Cell], folder: Path, ending: str) -> dict[str, Job]:
    """The checked pictures of cells by their keys; cells that are the same have one."""
    checked: set[str] = set()
    jobs: dict[str, Job] = {}
    weights: dict[tuple, Weights] = {}
    for number, cell in enumerate(cells, 1):
        place = ", ".join(cell.labels)
        try:
            check_row(cell.args, checked)
            names = tuple(str(getattr(cell.args, name)) for name in WEIGHTS)
            if names not in weights:
                weights[names] = check_machine(cell.args)
        except ValueError as error:
            message = message_of(error, cell.args)
            raise UsageError(f"The cell of {place}: {message}") from error
        (one,) = pictures_of(cell.args)
        output = folder / f"{number:04d}{_slug(cell.labels)}.{ending}"
        key = key_of(one)
        facts = {"cell": place}
        jobs.setdefault(key, Job(number, one, weights[names], output, key, place, facts))
    return jobs


def _in_order(jobs: list[Job]) -> list[Job]:
    """Jobs with the same weights after each other, of these the same LoRAs, then prompts."""
    ranks: list[dict[Any, int]] = [{}, {}, {}]

    def rank(job: Job) -> tuple[int, ...]:
        args = job.args
        groups = (astuple(job.weights), tuple(args.lora), (args.prompt, args.negative))
        found = [
            seen.setdefault(group, len(seen)) for seen, group in zip(ranks, groups, strict=True)
        ]
        return (*found, job.row)

    return sorted(jobs, key=rank)


def _slug(labels: Sequence[str]) -> str:
    """Labels as the end of a file's name that every system takes; nothing where none can be."""
    words = (re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")[:40] for label in labels)
    return "".join(f"-{word.strip('-.')}" for word in words if word)


def _save_sheet(path: Path, axes: Sequence[Axis], files: dict[tuple[int, ...], Path]) -> None:
    labels = {axis.letter: axis.labels for axis in axes}
    pictures: dict[Place, Image.Image] = {}
    for place, file in files.items():
        with Image.open(file) as image:
            small = small_copy(image, *_counts(axes))
        at = {axis.letter: index for axis, index in zip(axes, place, strict=True)}
        pictures[at.get("x", 0), at.get("y", 0), at.get("z", 0)] = small
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(grid_sheet(pictures, *(labels.get(letter, ("",)) for letter in "xyz")), path)
