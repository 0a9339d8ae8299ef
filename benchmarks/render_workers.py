"""Pictures a second of `krea2 render`: a plain loop, and Ray with one worker and with two.

    OMP_NUM_THREADS=1 python -m benchmarks.render_workers --pictures 80 --rounds 2

The three take turns, each timed from its first block of pictures to its last, without starts and
loading, which are given apart. Beside it, seconds of CPU a picture of all processes: on a machine
that does other work too, they say more than the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from krea2_model.cli.main import parse
from krea2_rendering.painting import JobPainter
from krea2_rendering.places import Place
from krea2_rendering.plan import make_plan
from krea2_rendering.ray_engine import ray_entries, ray_session, resources
from krea2_rendering.writing import FolderWriter, encode

NONE = np.empty(0, np.uint64)
WAYS = ("plain loop", "ray, 1 worker", "ray, 2 workers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    costs: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, ray_session(quiet=True):
        table = Path(folder, "rows.jsonl")
        rows = [
            {"prompt": "a red circle on a blue background", "seed": n} for n in range(args.pictures)
        ]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for number, (workers, way) in itertools.product(range(args.rounds), enumerate(WAYS)):
            words = ["render", str(table), "--engine", "ray", "--model", "nano", "--quiet"]
            words += ["--steps", str(args.steps), "--batch", str(args.batch)]
            options = parse([*words, "--workers", str(workers or 1)])
            place = Place(Path(folder, f"{number}-{workers}"))
            plan = make_plan(table, options, NONE, args.batch, lambda text, weighted: len(text))
            begin = time.perf_counter()
            blocks = plain(plan, options, place) if not workers else by_ray(plan, options, place)
            rate, cost, start = measure(blocks, begin)
            rates[way].append(rate)
            costs[way].append(cost)
            print(
                f"{way}: {rate:.2f} pictures/s, {cost:.3f} s of CPU each, start {start:.1f} s",
                flush=True,
            )
    base_rate, base_cost = (statistics.median(each[WAYS[0]]) for each in (rates, costs))
    for way in WAYS:
        rate, cost = statistics.median(rates[way]), statistics.median(costs[way])
        print(
            f"{way}: {rate:.2f} pictures/s, x {rate / base_rate:.2f}; CPU x {cost / base_cost:.3f}"
        )


def plain(plan, options, place) -> Iterator[int]:
    painter, writer = JobPainter(options, options.batch), FolderWriter(place)
    for chunk in plan.chunks:
        for first in range(0, chunk.num_rows, 4):
            yield len(writer(encode(painter(chunk.slice(first, 4)))))


def by_ray(plan, options, place) -> Iterator[int]:
    for entries in ray_entries(plan, options, place, resources(options)):
        yield len(entries)


def measure(blocks: Iterator[int], begin: float) -> tuple[float, float, float]:
    """Pictures a second, seconds of CPU a picture, and the seconds before the first block."""
    next(blocks)
    first, before = time.perf_counter(), cpu_seconds()
    count, after, last = 0, before, first
    for pictures in blocks:
        # The processes of a run end with it.
        count, last, after = count + pictures, time.perf_counter(), cpu_seconds()
    cpu = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())
    return count / (last - first), cpu / count, first - begin


def cpu_seconds() -> dict[int, float]:
    """Of this process and all that it has started and that live, by their ids."""
    found = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        found[process.pid] = times.user + times.system
    return found


if __name__ == "__main__":
    main()
