"""Which pictures of a folder are good for training: no duplicates, nothing broken, small or plain.

After the section on data of Krea 2's technical report. Nothing is deleted or moved: the result is a
table, a page to look at, and a list of what is kept. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from krea2_model.checks import counted
from krea2_model.images.picture_files import PICTURES
from krea2_model.replacing import replacing

from ..data.examples import Example, bucket_size, crop_to, read_folder
from .duplicates import near_duplicates, same_files
from .limits import EXACT, NEAR, REASONS, Limits
from .measures import Measures, file_of, measure, thumbnail
from .sheet import write_sheet
from .table import Row, read_measures, write_table
from .workers import Each
from .workers import each as each_by_processes

TABLE, SHEET = "curate.parquet", "curate.html"
_THUMBNAIL = 152  # pixels, as sheet.html shows them
# New pictures after which the table is written: some minutes of work at most are lost.
_SAVE_EVERY = 5000

# Called with the number of pictures that are read, and of all that have to be.
OnPicture = Callable[[int, int], None]


@dataclass(frozen=True)
class Curated:
    """The rows of a folder's pictures, and the files that were written."""

    rows: tuple[Row, ...]
    limits: Limits
    files: tuple[Path, ...] = ()

    def summary(self) -> str:
        """The pictures that go and why, and the buckets that are left at each resolution."""
        kept = [row.measures for row in self.rows if row.kept]
        lines = [f"Kept: {len(kept)} of {counted(len(self.rows), 'picture')}."]
        counts = Counter(reason for row in self.rows for reason in row.reasons)
        lines += [f"  {reason}: {counts[reason]}" for reason in REASONS if counts[reason]]
        for side in self.limits.resolution:
            large = [one for one in kept if self.limits.is_large_enough(one, side)]
            sizes = Counter(bucket_size(one.width, one.height, side) for one in large)
            lines.append(f"{side} px: {len(large)} of them are large enough, by size:")
            lines += [f"  {w} x {h}: {count}" for (w, h), count in sizes.most_common()]
        return "\n".join(lines)


def curate(
    folder: Path,
    limits: Limits | None = None,
    *,
    table: Path | None = None,
    sheet: Path | None = None,
    listing: Path | None = None,
    each: Each = each_by_processes,
    on_picture: OnPicture = lambda done, total: None,
) -> Curated:
    """Measure a folder's pictures, decide which are kept, and write what was found.

    limits: None takes the defaults. table: Parquet; None is curate.parquet in the folder. Files it
        has with the same size and time are not read again. sheet: HTML; None is curate.html there.
    listing: a .jsonl table of what is kept, for training; None writes none.
    each: what reads the files; by default a process of this machine for each core.

    Raises ValueError for a folder without pictures and a table that is not this folder's. What was
    measured is in the table too where an error or Ctrl+C ends the work.
    """
    limits = limits or Limits()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one of pictures.")
    table, sheet = table or folder / TABLE, sheet or folder / SHEET
    _check_names(table, sheet, listing)
    examples = {example.name: example for example in _examples(folder)}
    known = read_measures(table)
    if known and known.keys().isdisjoint(examples):
        raise ValueError(
            f"{table} has {counted(len(known), 'picture')}, and none of them is in {folder}: it is "
            "another folder's. Name another file with --table."
        )
    measured = _measured(folder, list(examples), known, table, each, on_picture)
    curated = Curated(tuple(_decided(examples, measured, limits)), limits)
    write_table(table, curated.rows)

    def thumbnails(names: Sequence[str]) -> dict[str, bytes | None]:
        files = [folder / name for name in names]
        made = each(partial(thumbnail, side=_THUMBNAIL), files)
        return dict(zip(names, made, strict=True))

    write_sheet(sheet, curated.rows, curated.summary(), thumbnails)
    files = [table, sheet]
    if listing is not None:
        _write_list(listing, [examples[row.file] for row in curated.rows if row.kept])
        files.append(listing)
    return Curated(curated.rows, limits, tuple(files))


def _check_names(table: Path, sheet: Path, listing: Path | None) -> None:
    for name, path, kinds in (
        ("table", table, (".parquet",)),
        ("sheet", sheet, (".html", ".htm")),
        ("list", listing, (".jsonl",)),
    ):
        if path is not None and path.suffix.lower() not in kinds:
            raise ValueError(f"{name} is {path}; expected a {kinds[0]} file.")
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name} is {path}, whose folder is not there; make it first.")


def _examples(folder: Path) -> list[Example]:
    """The pictures of a folder, named with forward slashes; masks and references are none."""
    examples = [replace(one, name=Path(one.name).as_posix()) for one in read_folder(folder)]
    if not examples:
        kinds = ", ".join(sorted(PICTURES))
        raise ValueError(f"{folder} holds no pictures; expected at least one of {kinds}.")
    return examples


def _measured(
    folder: Path,
    names: Sequence[str],
    known: dict[str, Measures],
    table: Path,
    each: Each,
    on_picture: OnPicture,
) -> dict[str, Measures]:
    """The measures of all files, those that the table has as they were."""
    found = {
        name: known[name]
        for name in names
        if name in known and known[name].file == file_of(folder / name)
    }
    new = [name for name in names if name not in found]

    def save() -> None:
        write_table(table, [Row(name, found[name]) for name in names if name in found])

    try:
        results = each(measure, [folder / name for name in new])
        for done, (name, measures) in enumerate(zip(new, results, strict=True), start=1):
            found[name] = measures
            if done % _SAVE_EVERY == 0:
                save()
            on_picture(done, len(new))
    except BaseException:
        save()
        raise
    return found


def _decided(
    examples: dict[str, Example], measured: dict[str, Measures], limits: Limits
) -> list[Row]:
    """A row for each picture, in the order of the names."""
    reasons = {name: limits.reasons(measured[name]) for name in examples}
    # The best first: of duplicates the one with a caption, the largest, the least compressed.
    good = sorted(
        (name for name in examples if not reasons[name]),
        key=lambda name: (
            not examples[name].captions,
            -measured[name].width * measured[name].height,
            -measured[name].size,
            name,
        ),
    )
    duplicates: dict[str, str] = {}
    same = same_files([measured[name] for name in good])
    for index, of in same.items():
        duplicates[good[index]] = good[of]
        reasons[good[index]] = (EXACT,)
    left = [name for name in good if name not in duplicates]
    near = near_duplicates([measured[name] for name in left], limits.distance, limits.colour)
    for index, of in near.items():
        duplicates[left[index]] = left[of]
        reasons[left[index]] = (NEAR,)
    # A file equal to one that is a near duplicate itself stands beside the picture that is kept.
    final = {name: duplicates.get(of, of) for name, of in duplicates.items()}
    return [
        Row(
            name, measured[name], not reasons[name], reasons[name], final.get(name),
            *(_buckets(measured[name], limits) if not reasons[name] else ()),
        )
        for name in examples
    ]  # fmt: skip


def _buckets(
    one: Measures, limits: Limits
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int, int], ...]]:
    """The buckets of a picture that is kept, and its crops there."""
    large = [side for side in limits.resolution if limits.is_large_enough(one, side)]
    sizes = [bucket_size(one.width, one.height, side) for side in large]
    names = tuple(f"{width} x {height}" for width, height in sizes)
    return names, tuple(crop_to(one.width, one.height, size) for size in sizes)


def _write_list(path: Path, examples: Sequence[Example]) -> None:
    with replacing(path) as partial:
        lines = (json.dumps(_listed(one, path.parent), ensure_ascii=False) for one in examples)
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _listed(example: Example, folder: Path) -> dict[str, object]:
    """A row that training reads, with paths relative to the list's folder."""
    row: dict[str, object] = {"image": _relative(example.image, folder)}
    if example.captions:
        several = len(example.captions) > 1
        row["captions" if several else "caption"] = (
            list(example.captions) if several else example.captions[0]
        )
    if example.mask is not None:
        row["mask"] = _relative(example.mask, folder)
    if example.references:
        row["references"] = [_relative(one, folder) for one in example.references]
    return row


def _relative(path: Path | bytes, folder: Path) -> str:
    assert isinstance(path, Path), "pictures of a folder are files"
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return path.resolve().as_posix()
