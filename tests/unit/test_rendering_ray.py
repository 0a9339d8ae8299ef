"""Jobs through a real Ray: killed workers, jobs that kill, shards, and krea2-nano itself.

One Ray for the file. Actors are painted squares where the model does not matter: they import no
torch.
"""

import json
import os
import signal
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import krea2_rendering.ray_engine as engine
from krea2_model.cli.main import main, parse
from krea2_model.cli.progress import Console
from krea2_rendering.ledger import Ledger, read_entries
from krea2_rendering.places import Place
from krea2_rendering.plan import make_plan
from krea2_rendering.ray_engine import Resources, ray_entries
from krea2_rendering.render import follow

MODEL = ["--model", "nano", "--steps", "1", "--width", "32", "--height", "32", "--quiet"]


class Squares:
    """Stands in for the painter; a prompt that says so kills it, once or always."""

    def __init__(self, args, batch, threads):
        self._killed = args.output / "killed"

    def __call__(self, block):
        rows = []
        for job in block.to_pylist():
            if job["prompt"] == "kill" or (job["prompt"] == "kill once" and self._is_first()):
                os.kill(os.getpid(), signal.SIGKILL)
            entry = {name: job[name] for name in ("row", "key", "prompt")} | {"settings": {}}
            row = {"entry": json.dumps(entry), "file": job["file"], "pixels": b"abc" * 16}
            rows.append({**row, "width": 4, "height": 4, "texts": "{}"})
        return pa.Table.from_pylist(rows)

    def _is_first(self):
        try:
            self._killed.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    size = 80 * 2**20
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=size, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def make(cluster, tmp_path):
    """Make pictures of prompts with two actors; the lines of the ledger by their prompts."""

    def run(prompts, *words):
        table = tmp_path / "p.txt"
        table.write_text("\n".join(prompts), encoding="utf-8")
        args = parse(["render", str(table), "--engine", "ray", *MODEL, *words])
        args.output = tmp_path / "out"
        args.output.mkdir(exist_ok=True)
        plan, place = make_plan(table, args, np.empty(0, np.uint64)), Place(args.output)
        workers = Resources(2, 0, 0.2)
        with Ledger(place) as ledger:
            follow(ray_entries(plan, args, place, workers, Squares), plan, ledger, Console(True))
        return list(read_entries(place))

    return run


def test_a_killed_worker_loses_and_doubles_nothing(make, tmp_path):
    prompts = [f"a star {n}" for n in range(30)]
    prompts.insert(7, "kill once")
    found = make(prompts)
    assert (tmp_path / "out" / "killed").exists()
    assert sorted(entry["row"] for entry in found) == list(range(1, 32))
    assert not any("error" in entry for entry in found)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 31


def test_a_job_that_kills_every_worker_is_an_error(make, monkeypatch):
    """And so are those of its block; all others are made."""
    monkeypatch.setattr(engine, "_RETRIES", 1)
    found = make(["kill", *(f"a star {n}" for n in range(20))])
    bad = [entry for entry in found if "error" in entry]
    assert len(found) == 21 and 1 <= len(bad) <= engine._BLOCK
    assert all("The worker was killed" in entry["error"] for entry in bad)


def test_shards_have_their_size(make, tmp_path):
    found = make([f"a star {n}" for n in range(20)], "--layout", "parquet", "--shard-size", "8")
    files = sorted((tmp_path / "out" / "shards").iterdir())
    sizes = sorted(pq.ParquetFile(file).metadata.num_rows for file in files)
    assert sum(sizes) == 20 and max(sizes) == 8 and len(found) == 20


def test_the_command_makes_the_pictures_of_the_plain_one(cluster, nano_once, krea2, tmp_path):
    """Of krea2-nano, on an actor of its own, to the byte."""
    table = tmp_path / "p.jsonl"
    rows = [{"prompt": f"a red {shape}", "seed": 3} for shape in ("star", "ring")]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["render", str(table), *MODEL]
    assert main([*words, "--engine", "ray", "--output", str(tmp_path / "many")]) == 0
    assert main([*words, "--output", str(tmp_path / "plain")]) == 0
    files = [
        {
            entry["key"]: (folder / entry["file"]).read_bytes()
            for entry in read_entries(Place(folder))
        }
        for folder in (tmp_path / "many", tmp_path / "plain")
    ]
    assert files[0] == files[1] and len(files[0]) == 2
    # The ledger of the plain command is one too: nothing is left to make.
    again = ["--engine", "ray", "--resume", "--output", str(tmp_path / "plain")]
    assert main([*words, *again]) == 0
    assert len(list(read_entries(Place(tmp_path / "plain")))) == 2


def test_more_workers_than_there_are_cores_are_refused(cluster, krea2, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    words = [
        "render",
        tmp_path / "p.txt",
        "--engine",
        "ray",
        *MODEL[:-1],
        "--output",
        tmp_path / "o",
    ]
    assert "--workers is 9, and the cluster has 2 cores" in krea2(*words, "--workers", 9, code=2)
    error = krea2(*words, "--gpus-per-worker", "1", code=2)
    assert "more than the 0 GPUs of the cluster" in error and "--gpus-per-worker 0" in error
