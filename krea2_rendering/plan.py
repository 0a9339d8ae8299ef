"""The jobs of a table: read once, checked, without those that are made, in chunks for workers."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from krea2_model.checks import by_count
from krea2_model.cli.errors import UsageError
from krea2_model.cli.jobs import check_name, digest_of, message_of, pictures_of_row
from krea2_model.cli.picture_options import PICTURES
from krea2_model.cli.settings import settings_of
from krea2_model.cli.table import COLUMNS, options_of_row
from krea2_model.images.output_files import image_format
from krea2_model.schedule import MAX_SEED

from .ledger import Entry, number_of
from .tables import read_table

# Beside the columns of the plain command: a name of the user's, which the ledger keeps.
ID = "id"
JOB = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("id", pa.string()),
        ("file", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.uint64()),
        # The other columns of the row, as JSON.
        ("values", pa.string()),
        # Jobs of one group may be painted in one call.
        ("group", pa.string()),
    ]
)
# With the embeddings of the prompts, see `encoding`.
ENCODED_JOB = JOB.append(pa.field("encoded", pa.large_binary()))
# Jobs of a chunk, within which groups are brought together.
CHUNK = 8192
# Distinct settings whose options are kept: most tables have a few.
_KEPT = 4096
# Rows whose options differ in more than these are painted by themselves.
_ALONE = (*PICTURES, "regions", "upscale")

# The length of a prompt in tokens, with (word:1.3) as weights or as text.
TokensOf = Callable[[str, bool], int]


@dataclass
class Plan:
    """Jobs to make, and what was counted on the way.

    keys: of the jobs, sorted numbers. key_rows: the row of each. ended: whether it has an entry.
    made: in earlier runs. repeated: rows' pictures that are the same as others of the table.
    errors: entries of rows that are wrong. sizes: jobs by width, height (None is the checkpoint's)
    and steps. groups: jobs by their groups.
    """

    chunks: list[pa.Table] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    key_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    ended: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    rows: int = 0
    made: int = 0
    repeated: int = 0
    errors: list[Entry] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)
    groups: Counter = field(default_factory=Counter)

    @property
    def jobs(self) -> int:
        return len(self.keys)

    def set_keys(self, rows: Mapping[int, int]) -> None:
        """Keep the keys of the jobs, of which `rows` has the rows."""
        keys = np.fromiter(rows, np.uint64, len(rows))
        order = np.argsort(keys)
        self.keys = keys[order]
        self.key_rows = np.fromiter(rows.values(), np.int64, len(rows))[order]
        self.ended = np.zeros(len(rows), dtype=bool)

    def take(self, entries: Iterable[Entry]) -> list[Entry]:
        """The entries of jobs that had none, which `ended` notes."""
        new = []
        for entry in entries:
            at = self._place_of(entry["key"])
            if at is not None and not self.ended[at]:
                self.ended[at] = True
                new.append(entry)
        return new

    def unended(self, jobs: pa.Table) -> pa.Table:
        """Jobs that have no entry."""
        places = [self._place_of(key) for key in jobs["key"].to_pylist()]
        return jobs.filter([at is not None and not self.ended[at] for at in places])

    def left(self) -> list[tuple[int, str]]:
        """Row and key of each job that has no entry."""
        rows, keys = self.key_rows[~self.ended], self.keys[~self.ended]
        return [(row, f"{key:016x}") for row, key in zip(rows.tolist(), keys.tolist(), strict=True)]

    def _place_of(self, key: str) -> int | None:
        at = int(np.searchsorted(self.keys, np.uint64(number_of(key))))
        return at if at < len(self.keys) and int(self.keys[at]) == number_of(key) else None

    def check(self, address: str | Path) -> None:
        """Raise UsageError for a table without rows, or with errors in all of them."""
        if not self.rows:
            raise UsageError(f"{address} has no rows; expected at least one prompt.")
        if len(self.errors) == self.rows:
            row, error = (self.errors[0][name] for name in ("row", "error"))
            raise UsageError(
                f"{by_count(self.rows, 'The only row', f'All {self.rows} rows')} of {address} "
                f"{by_count(self.rows, 'has', 'have')} errors; row {row}: {error}"
            )


class RowOptions:
    """Options of rows over those of the command line, read once for each distinct row of them."""

    def __init__(self, base: Namespace):
        self._base = base
        self.read = lru_cache(_KEPT)(self._read)

    def _read(self, values: str) -> Namespace:
        return options_of_row(json.loads(values), self._base)

    @lru_cache(_KEPT)  # noqa: B019 - lives as long as the plan
    def settings(self, values: str) -> dict[str, Any]:
        """Settings of a row, but for prompt and seed, which have their places in them."""
        args = copy(self.read(values))
        args.prompt, args.seed = "", 0
        return settings_of(args)

    def of_job(self, job: Mapping[str, Any]) -> Namespace:
        """The options of one picture."""
        args = copy(self.read(job["values"]))
        args.prompt, args.seed = job["prompt"], job["seed"]
        # Drawn and counted when the plan was made.
        args.wildcards, args.images, args.seeds = False, 1, None
        return args


def make_plan(
    address: str | Path,
    args: Namespace,
    done: np.ndarray,
    batch: int = 1,
    tokens_of: TokensOf | None = None,
) -> Plan:
    """Read a table and plan what is not `done`, sorted numbers of keys.

    batch, tokens_of: for groups of jobs that a call of the model can share; without, none do.
    Raises UsageError for a table that cannot be used: see `read_table`; the same id or the same
    output for rows of other content.
    """
    plan, options = Plan(), RowOptions(args)
    intake = Intake(plan, done)
    waiting: list[dict[str, Any]] = []
    for number, values in read_table(address, (*COLUMNS, ID)):
        plan.rows += 1
        try:
            if isinstance(values, UsageError):
                raise values
            jobs = list(_jobs(number, values, options, args.format))
        except (UsageError, ValueError) as error:
            plan.errors.append({"row": number, "error": message_of(error, args)})
            continue
        for job in jobs:
            if not intake.takes(job, number):
                continue
            settings = options.settings(job["values"])
            plan.sizes[settings.get("width"), settings.get("height"), settings.get("steps")] += 1
            job["group"] = _group(job, settings, tokens_of) if batch > 1 else ""
            plan.groups[job["group"]] += 1
            waiting.append(job)
            if len(waiting) == CHUNK:
                plan.chunks.append(_chunk(waiting, batch))
                waiting = []
    if waiting:
        plan.chunks.append(_chunk(waiting, batch))
    intake.end(address)
    return plan


def _jobs(
    number: int, values: Mapping[str, Any], options: RowOptions, ending: str
) -> Iterator[dict[str, Any]]:
    """The jobs of a row; of seeds and images, one each."""
    row = {str(name).strip().replace("-", "_"): value for name, value in values.items()}
    identity, prompt, seed = row.pop(ID, None), row.pop("prompt", ""), row.pop("seed", None)
    if seed is not None:
        seed = _seed(seed)
    kept = json.dumps(row, sort_keys=True, default=str)
    args = copy(options.read(kept))
    args.prompt = str(prompt)
    args.seed = args.seed if seed is None else seed
    if not args.prompt.strip() and args.regions is None:
        raise UsageError("The prompt is empty; expected words for what the picture shows.")
    # One set of values for all pictures of the row.
    for name in ("seeds", "images", "output"):
        row.pop(name, None)
    kept = json.dumps(row, sort_keys=True, default=str)
    settings = options.settings(kept)
    output = getattr(args, "row_output", None)
    if output is not None:
        check_name(output)
        image_format(output)
    for count, one in enumerate(pictures_of_row(args), 1):
        key = digest_of({**settings, "prompt": one.prompt, "seed": one.seed}, one)
        file = f"{key[:2]}/{key}.{ending}"
        if output is not None:
            path = output if count == 1 else output.with_stem(f"{output.stem}-{count}")
            file = path.as_posix()
        yield {
            "row": number,
            "key": key,
            "id": None if identity is None else str(identity),
            "file": file,
            "prompt": one.prompt,
            "seed": one.seed,
            "values": kept,
        }


def _seed(value: Any) -> int:
    try:
        seed = int(str(value))
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"--seed is {value}; expected a whole number from 0 to {MAX_SEED}.")
    return seed


class Intake:
    """Jobs as they are read: counted in a plan, and taken if they are still to be made.

    done: sorted numbers of the keys of jobs that are made.
    """

    def __init__(self, plan: Plan, done: np.ndarray):
        self._plan, self._names, self._made = plan, Names(), set(done.tolist())
        self._rows: dict[int, int] = {}  # by their keys

    def takes(self, job: Mapping[str, Any], number: int) -> bool:
        """True for a job of a row that is new. Raises UsageError as `Names` does."""
        self._names.take(job, number)
        key = number_of(job["key"])
        if key in self._rows:
            self._plan.repeated += 1
            return False
        self._rows[key] = number
        if key in self._made:
            self._plan.made += 1
            return False
        return True

    def end(self, address: str | Path) -> None:
        """Check the plan of a table that is read, and give it the keys of its jobs."""
        self._plan.check(address)
        self._plan.set_keys({k: row for k, row in self._rows.items() if k not in self._made})


class Names:
    """Names that rows give themselves, each for one content."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, str], tuple[str, int]] = {}

    def take(self, job: Mapping[str, Any], number: int) -> None:
        """Raises UsageError for a name that a row of other content has."""
        key = job["key"]
        if not job["file"].startswith(f"{key[:2]}/{key}."):
            self._take("output", job["file"], key, number)
        if job["id"] is not None:
            self._take("id", job["id"], key, number)

    def _take(self, kind: str, name: str, key: str, number: int) -> None:
        other, row = self._taken.setdefault((kind, name), (key, number))
        if other != key and row != number:
            raise UsageError(
                f"Rows {row} and {number} have the same {kind}, {name}, and different content; "
                f"expected a {kind} for each. Rename one of them."
            )


def _group(job: Mapping[str, Any], settings: Mapping[str, Any], tokens_of: TokensOf | None) -> str:
    """What jobs have in common that one call of the model can paint together."""
    if tokens_of is None or any(settings.get(name) for name in _ALONE):
        return job["key"]
    shared = {k: v for k, v in settings.items() if k not in ("prompt", "seed", "negative")}
    texts = (job["prompt"], settings.get("negative", ""))
    lengths = [tokens_of(text, settings.get("weights", True)) for text in texts]
    text = json.dumps([shared, lengths])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chunk(jobs: list[dict[str, Any]], batch: int) -> pa.Table:
    if batch > 1:
        jobs.sort(key=lambda job: job["group"])
    return pa.Table.from_pylist(jobs, JOB)
