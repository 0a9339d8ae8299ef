"""Prompts to learn from, without pictures: what distillation, rewards and preferences paint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from krea2_model.checks import counted

from ..settings.checks import check, check_side
from .examples import bucket_size, read_folder, some_of
from .shapes import EXPECTED_ASPECT, Ratio, parse_aspect
from .tables import TABLES, read_rows, read_text

COLUMN = "prompt"
REGIONS = "regions"

# A prompt, at `COLUMN`, with the other columns of its table's row; regions are in `regional`.
Row = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """Prompts, and the size of the pictures that are painted for them.

    path: a text file with a prompt a line; a .jsonl, .csv or .parquet table with a column prompt;
        or a folder of pictures, whose captions are the prompts.
    size: side of a square of the pictures' area, in pixels; None is the model's own.
    aspects: width to height of the pictures, such as "3:4", of which one is drawn each time; none
        are those of the command.
    """

    path: Path | None = None
    size: int | None = None
    aspects: tuple[str, ...] = ()

    def __post_init__(self):
        expected = "a text file of prompts, a table, or a folder of captioned pictures"
        check(self.path is not None, "prompts.path", self.path, expected)
        if self.size is not None:
            check_side("prompts.size", self.size)
        ok = None not in map(parse_aspect, self.aspects)
        check(ok, "prompts.aspects", list(self.aspects), EXPECTED_ASPECT)

    @property
    def ratios(self) -> list[Ratio]:
        """The aspects as numbers."""
        return [ratio for aspect in self.aspects if (ratio := parse_aspect(aspect)) is not None]

    def sizes(self, side: int, default: Sequence[Ratio]) -> list[tuple[int, int]]:
        """All that `draw_size` draws."""
        return list(dict.fromkeys(bucket_size(*one, side) for one in self.ratios or default))

    def draw_size(self, side: int, random: Random, default: Sequence[Ratio]) -> tuple[int, int]:
        """Width and height in pixels of a batch, of the area side x side.

        default: width to height, each as frequent, where the settings name none.
        """
        return bucket_size(*random.choice(self.ratios or default), side)


def read_prompts(path: Path, regions: bool = False) -> list[Row]:
    """The rows of a file, each with its prompt and what else its row holds.

    regions: True where regions are painted: a row with some may have no prompt, and one prompt
    comes with several. A caption that several pictures of a folder share comes once. Raises
    ValueError for a file without prompts, rows without one, prompts that a file has twice, and
    regions where none are painted.
    """
    if path.is_dir():
        return _captions(path)
    if not path.is_file():
        raise ValueError(
            f"prompts.path is {path}, which is not there; expected a text file with a prompt a "
            "line, a .jsonl, .csv or .parquet table, or a folder of captioned pictures."
        )
    if path.suffix.lower() in TABLES:
        numbered = enumerate(read_rows(path), start=1)
        rows = [_stripped(row, number, path, regions) for number, row in numbered]
    else:
        lines = (line.strip() for line in read_text(path).splitlines())
        rows = [{COLUMN: line} for line in lines if line]
    if not rows:
        raise ValueError(f"{path} holds no prompts; expected at least one.")
    counts = Counter(
        (row[COLUMN], json.dumps(regions and row.get(REGIONS) or "", default=str)) for row in rows
    )
    twice = [f"{prompt!r}" for (prompt, _), count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"{path} has {counted(len(twice), 'prompt')} more than once: {some_of(twice)}. Remove "
            "the repetitions: they would count more than the others."
        )
    return rows


def has_regions(row: Row) -> bool:
    """True unless a row's cell of regions is empty, as a table of any kind has it."""
    cell = row.get(REGIONS)
    return cell.strip() not in ("", "[]") if isinstance(cell, str) else cell not in (None, [])


def digest_of(rows: Sequence[Row]) -> str:
    """A hash of prompts and their other columns, for the metadata of what was trained on them."""
    text = json.dumps(list(rows), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def in_turn(count: int, batch: int, number: int, seed: int) -> list[int]:
    """The indices of a batch by its number, from 0: all of `count`, shuffled anew each time round.

    Each batch can be computed by itself, so a run resumes anywhere.
    """
    places = range(number * batch, (number + 1) * batch)
    return [_round(count, place // count, seed)[place % count] for place in places]


class Selection:
    """Prompts in turn, where one that taught nothing is passed over for a while.

    rest: how many times. notes: JSON values of where the selection is, to resume from.
    """

    def __init__(self, count: int, seed: int, rest: int):
        self.count, self.seed, self.rest = count, seed, rest
        self.notes: dict[str, Any] = {"place": 0, "resting": {}}

    def choose(self, batch: int) -> list[int]:
        """The indices of the next prompts; `advance` says what became of them."""
        place, resting = self.notes["place"], dict(self.notes["resting"])
        chosen: list[int] = []
        while len(chosen) < batch:
            index = in_turn(self.count, 1, place, self.seed)[0]
            place += 1
            turns = resting.pop(str(index), 0)
            if turns > 1:
                resting[str(index)] = turns - 1
            if not turns:
                chosen.append(index)
        self._next = {"place": place, "resting": resting}
        return chosen

    def advance(self, dull: Iterable[int]) -> None:
        """Go on after the chosen prompts, of which some were dull."""
        self.notes.update(self._next)
        if self.rest:
            self.notes["resting"] |= {str(index): self.rest for index in dull}


@lru_cache(maxsize=2)
def _round(count: int, number: int, seed: int) -> list[int]:
    return Random(f"prompts {seed} {number}").sample(range(count), count)


def _captions(folder: Path) -> list[Row]:
    examples = read_folder(folder)
    if not examples:
        raise ValueError(f"{folder} holds no pictures, whose captions would be the prompts.")
    bare = [one.name for one in examples if not one.captions]
    if bare:
        raise ValueError(
            f"{len(bare)} of {counted(len(examples), 'picture')} without a caption: "
            f"{some_of(bare)}. Write one beside each ({Path(bare[0]).stem}.txt), or give a text "
            "file of prompts."
        )
    return [{COLUMN: text} for text in dict.fromkeys(c for one in examples for c in one.captions)]


def _stripped(row: Row, number: int, path: Path, regions: bool) -> Row:
    if COLUMN not in row:
        columns = ", ".join(str(name) for name in row)
        raise ValueError(f"{path.name}, row {number} has no column {COLUMN}; it has {columns}.")
    if not regions and has_regions(row):
        raise ValueError(
            f"{path.name}, row {number} has {REGIONS}, which this command does not paint (krea2 "
            "distil does); expected prompts of whole pictures. Leave the column empty, or give it "
            "another name where it is for rewards."
        )
    prompt = row[COLUMN]
    # These say what is in the picture.
    if regions and prompt in (None, "") and has_regions(row):
        return {**row, COLUMN: ""}
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"{path.name}, row {number}: {COLUMN} is {str(prompt)[:60]!r}; expected a text."
        )
    return {**row, COLUMN: prompt.strip()}
