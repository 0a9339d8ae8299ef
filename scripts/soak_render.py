"""Render krea2-nano pictures with `krea2 render --engine ray` while its processes are killed.

    python scripts/soak_render.py --pictures 20000 --workers 2 --kill-every 60 --driver-kills 3

Counts at the end: every row has one picture in the table and on the disk, none is there twice, and
memory of driver and workers at the beginning and at the end. Exits with 1 where that is not so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring")


def main() -> int:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    table, folder = args.output / "prompts.jsonl", args.output / "pictures"
    write_prompts(table, args.pictures)
    command = [
        *(sys.executable, "-m", "krea2_model", "render", str(table), "--engine", "ray"),
        *("--model", "nano", "--steps", str(args.steps), "--workers", str(args.workers)),
        *("--width", str(args.side), "--height", str(args.side)),
        *("--output", str(folder), "--quiet", "--resume", "--layout", args.layout),
        *("--shard-size", "32"),
    ]
    kills, memory, begin = Counter[str](), [], time.monotonic()
    chance = random.Random(args.seed)
    for left in reversed(range(args.driver_kills + 1)):
        done = run(command, args, folder, left, chance, kills, memory)
        print(f"run ended: {done}, {count_lines(folder)} lines", flush=True)
        if left == 0 and done != 0:
            return 1
    print(f"{time.monotonic() - begin:.0f} s; killed: {dict(kills)}")
    return report(folder, args.pictures, memory)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--kill-every", type=float, default=20, help="seconds, about")
    parser.add_argument("--driver-kills", type=int, default=1)
    parser.add_argument("--layout", default="folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def write_prompts(table: Path, count: int) -> None:
    prompts = itertools.cycle(itertools.product(COLOURS, SHAPES, COLOURS))
    with table.open("w", encoding="utf-8") as file:
        for seed, (colour, shape, ground) in zip(range(count), prompts, strict=False):
            row = {"prompt": f"a {colour} {shape} on a {ground} background", "seed": seed}
            file.write(json.dumps(row) + "\n")


def run(command, args, folder, driver_kills_left, chance, kills, memory) -> int:
    """One run of the command; killed on the way where kills of the driver are left."""
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    begun = count_lines(folder)
    # Later each time, so that the last run has work too.
    end_at = args.pictures * chance.uniform(0.1, 0.6) / max(1, args.driver_kills)
    next_kill = time.monotonic() + args.kill_every * chance.uniform(0.8, 1.6)
    while driver.poll() is None:
        time.sleep(1)
        pids = workers(folder)
        memory.append((count_lines(folder), rss(driver.pid), max(map(rss, pids), default=0)))
        if driver_kills_left and count_lines(folder) - begun > end_at:
            driver.send_signal(signal.SIGKILL)
            kills["driver"] += 1
            break
        elif time.monotonic() > next_kill and pids:
            os.kill(chance.choice(pids), signal.SIGKILL)
            kills["worker"] += 1
            next_kill = time.monotonic() + args.kill_every * chance.uniform(0.5, 1.5)
    return driver.wait()


def lines(folder: Path) -> list[str]:
    path = folder / "results.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def count_lines(folder: Path) -> int:
    return len(lines(folder))


def workers(folder: Path) -> list[int]:
    """Processes that painted the last pictures and still live: of this run, by its ledger."""
    found = set()
    for line in lines(folder)[-40:]:
        try:
            pid = json.loads(line).get("pid")
            if pid and psutil.Process(pid).cmdline()[0].startswith("ray::"):
                found.add(pid)
        except (ValueError, IndexError, psutil.Error):
            continue
    return sorted(found)


def rss(pid: int) -> int:
    """Megabytes in memory, of files that are mapped too; 0 for a process that has ended."""
    try:
        return psutil.Process(pid).memory_info().rss // 2**20
    except psutil.Error:
        return 0


def report(folder: Path, pictures: int, memory: list[tuple[int, int, int]]) -> int:
    table = pq.read_table(folder / "table.parquet")
    keys, errors = table["key"].to_pylist(), table["error"].drop_null()
    members = list(zip(table["file"].to_pylist(), table["member"].to_pylist(), strict=True))
    files = [file for file in folder.rglob("*.*") if file.suffix in (".png", ".tar", ".parquet")]
    files = [file for file in files if file.name != "table.parquet"]
    print(f"rows: {pictures}, in the table: {len(keys)}, different: {len(set(keys))}")
    print(f"errors: {len(errors)}, files on the disk: {len(files)}")
    print(f"different places: {len(set(members))}, lines of the ledger: {count_lines(folder)}")
    for first in range(0, pictures, pictures // 4):
        part = [at for at in memory if first < at[0] <= first + pictures // 4]
        peaks = [max((at[column] for at in part), default=0) for column in (1, 2)]
        print(f"from picture {first}: driver up to {peaks[0]} MB, a worker up to {peaks[1]} MB")
    expected = {file for file, _ in members}
    found = {file.relative_to(folder).as_posix() for file in files}
    good = len(keys) == len(set(keys)) == len(set(members)) == pictures and not len(errors)
    return 0 if good and expected == found else 1


if __name__ == "__main__":
    raise SystemExit(main())
