"""Jobs and requests through a real Ray: killed workers, jobs that kill, shards, krea2-nano.

One Ray for the file. Actors are painted squares where the model does not matter: they import no
torch.
"""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import sys
import time
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import copy

import numpy as np
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray import serve

import krea2_rendering.ray_engine as engine
from krea2_model.cli.errors import Failure
from krea2_model.cli.main import main, parse
from krea2_model.cli.progress import Console
from krea2_rendering.ledger import Ledger, read_entries
from krea2_rendering.places import Place
from krea2_rendering.plan import make_plan
from krea2_rendering.ray_each import ray_each
from krea2_rendering.ray_engine import Resources, ray_entries, ray_session, resources
from krea2_rendering.render import follow
from krea2_rendering.serving import ImageServer, Item, deploy

MODEL = ["--model", "nano", "--steps", "1", "--width", "32", "--height", "32", "--quiet"]


class Squares:
    """Stands in for the painter; a prompt that says so kills it, once or always."""

    def __init__(self, args, batch, threads, folder):
        if args.dtype == "fp16":
            raise ValueError("There is no fp16 here.")
        self._killed = args.output / "killed"

    def __call__(self, block):
        rows = []
        for job in block.to_pylist():
            assert job["encoded"] == job["prompt"].encode()
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


class Letters:
    """Stands in for the encoder: its embeddings are the prompts."""

    def __init__(self, args, threads, folder):
        pass

    def __call__(self, block):
        encoded = [prompt.encode() for prompt in block["prompt"].to_pylist()]
        return block.append_column("encoded", pa.array(encoded, pa.large_binary()))


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    size = 80 * 2**20
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": size}
    with ray_session(quiet=True, **options):
        yield


@pytest.fixture
def make(cluster, tmp_path):
    """Make pictures of prompts with actors of squares; gives the lines of the ledger."""

    def run(prompts, *words, workers=2):
        table = tmp_path / "p.txt"
        table.write_text("\n".join(prompts), encoding="utf-8")
        args = parse(["render", str(table), "--engine", "ray", *MODEL, *words])
        args.output = tmp_path / "out"
        args.output.mkdir(exist_ok=True)
        plan, place = make_plan(table, args, np.empty(0, np.uint64)), Place(args.output)
        size = Resources(workers, 0, 0.1, encoders=1)
        with Ledger(place) as ledger:
            follow(
                ray_entries(plan, args, place, size, Squares, Letters), plan, ledger, Console(True)
            )
        return list(read_entries(place))

    return run


def test_killed_workers_lose_and_double_nothing(make, tmp_path, monkeypatch):
    """A job that kills every worker is an error; all others are in shards, its block's too."""
    monkeypatch.setattr(engine, "_RETRIES", 1)
    prompts = [f"a star {n}" for n in range(30)]
    prompts[7:7] = ["kill once"]
    found = make([*prompts, "kill"], "--layout", "parquet", "--shard-size", "8")
    assert (tmp_path / "out" / "killed").exists()
    good = [entry for entry in found if "error" not in entry]
    bad = [entry for entry in found if "error" in entry]
    assert len(found) == len({entry["key"] for entry in found}) == 32
    assert [entry["row"] for entry in bad] == [32]
    assert "Its worker was killed 4 times" in bad[0]["error"]
    assert "kill once" in [entry["prompt"] for entry in good]
    files = sorted((tmp_path / "out" / "shards").iterdir())
    tables = [pq.read_table(file) for file in files]
    assert max(table.num_rows for table in tables) == 8
    rows = [
        (file.name, key)
        for file, table in zip(files, tables, strict=True)
        for key in table["key"].to_pylist()
    ]
    assert sorted(key for _, key in rows) == sorted(entry["key"] for entry in good)
    assert {name for name, _ in rows} == {entry["file"].partition("/")[2] for entry in good}


def test_a_worker_that_cannot_start_ends_the_run(make):
    with pytest.raises(Failure, match="There is no fp16 here. What is made stays"):
        make(["a star"], "--dtype", "fp16", workers=1)


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


def test_curating_by_a_cluster_is_that_of_this_machine(cluster, krea2, tmp_path):
    """With a process that is killed on the way."""
    for number in range(40):
        generator = np.random.default_rng(number % 36)
        pixels = generator.integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    words = ["curate", tmp_path, "--resolution", "64", "--quiet"]
    krea2(*words, "--engine", "ray")
    found = pq.read_table(tmp_path / "curate.parquet")
    (tmp_path / "curate.parquet").unlink()
    krea2(*words)
    assert found.equals(pq.read_table(tmp_path / "curate.parquet")) and found.num_rows == 41

    def once(path):
        if path.name == "a" and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return path.name

    names = [tmp_path / name for name in "abc" * 20]
    assert list(ray_each(once, names, workers=2)) == [path.name for path in names]


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


def test_every_machine_of_a_cluster_keeps_a_core_for_cutting_blocks(cluster, monkeypatch):
    """Else Ray waits for one for ever."""
    import ray

    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2
    nodes += [{"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {"CPU": 1.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    args = parse(["render", "p.txt", "--engine", "ray", *MODEL, "--workers", "2"])
    assert 0 < resources(args).cpus <= 1 - engine._TASK_CPUS


def test_a_ray_that_does_not_start_is_tried_again(cluster, monkeypatch):
    """As on a busy machine, where Ray gives up after half a minute."""
    import ray

    tries = []

    def fail(**options):
        tries.append(options)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    message = "Ray does not start on this machine: The current node"
    with pytest.raises(Failure, match=message), ray_session(num_cpus=2):
        pass
    assert len(tries) == 4 and tries[0]["num_cpus"] == 2


# krea2 serve, by the client that programs use.


@pytest.fixture(scope="module")
def server(cluster):
    """The address of a server with krea2-nano that takes two requests and lets one wait."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", "nano", "--steps", "2", "--width", "64", "--height", "64", "--quiet"]
    words += ["--port", str(port), "--token", "secret", "--max-queue", "1", "--max-side", "256"]
    args = parse(["serve", *words])
    args.prompt, args.seeds = "", None
    deploy(args)
    yield f"http://127.0.0.1:{port}/v1"
    serve.shutdown()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server, api_key="secret", max_retries=0)


def opened(answer):
    return [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in answer.data]


def png(image):
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return ("picture.png", stored.getvalue())


def test_a_served_picture_is_that_of_the_command(client, nano_once, krea2, tmp_path):
    found = opened(client.images.generate(prompt="a red star", n=2, extra_body={"seed": 4}))
    words = ["--model", "nano", "--steps", "2", "--width", "64", "--height", "64", "--seed", "4"]
    files = krea2("a red star", *words, "--images", "2", "--output", tmp_path / "a.png")
    for image, file in zip(found, files, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(file)))
    answer = client.images.generate(prompt="a star", size="96x64", output_format="webp")
    assert answer.size == "96x64" and opened(answer)[0].format == "WEBP"
    assert [model.id for model in client.models.list()] == ["nano"]


def test_a_mask_says_what_of_a_picture_changes(client):
    """White of ours, transparent of theirs."""
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 64))
    answer = client.images.edit(image=png(picture), mask=png(mask), prompt="a blue ring")
    found, before = np.asarray(opened(answer)[0]), np.asarray(picture)
    assert np.array_equal(found[:, 48:], before[:, 48:])
    assert not np.array_equal(found[:, :16], before[:, :16])
    answer = client.images.edit(image=png(picture), prompt="a ring", extra_body={"strength": 0.5})
    assert not np.array_equal(np.asarray(opened(answer)[0]), before)


def test_requests_that_are_wrong_are_refused(client, server):
    for wrong, message in (
        ({"size": "9999x64"}, "sides from 1 to 256"),
        ({"n": 9}, "n is 9; expected 1 to 4"),
        ({"extra_body": {"sed": 1}}, "Did you mean seed?"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)):
            client.images.generate(**{"prompt": "a star", **wrong})
    small, large = (png(Image.new("RGB", (side, 64))) for side in (64, 300))
    for pictures, message in (
        ({"image": small, "mask": ("a.png", b"no picture")}, "A file is no picture"),
        ({"image": large}, "A picture has 300 x 64 px; expected sides up to 256"),
        ({"image": [small, small]}, "several need an edit LoRA"),
        ({"image": small, "mask": png(Image.new("RGBA", (32, 64)))}, "mask"),
        ({"image": small, "extra_body": {"strength": 0}}, "strength is 0, which changes nothing"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(**pictures, prompt="a star")
    with pytest.raises(openai.AuthenticationError, match="The token is missing or wrong"):
        openai.OpenAI(base_url=server, api_key="other", max_retries=0).images.generate(prompt="a")


def test_a_client_that_goes_takes_its_pictures_back(client):
    long = {"prompt": "a star", "size": "128x128", "extra_body": {"steps": 100, "seed": 1}}
    begin = time.monotonic()
    client.images.generate(**long)
    whole = time.monotonic() - begin
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(**long, timeout=whole / 8)
    begin = time.monotonic()
    client.images.generate(prompt="a star", extra_body={"steps": 1})
    assert time.monotonic() - begin < whole / 2


def test_requests_above_the_queue_are_refused(client):
    def ask(seed):
        try:
            client.images.generate(prompt="a star", extra_body={"steps": 100, "seed": seed})
        except openai.InternalServerError as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(5) as pool:
        found = Counter(pool.map(ask, range(5)))
    # Two can be with the replica while one waits, but those that come at once all wait at first.
    assert set(found) == {200, 503}


def test_requests_of_one_setting_share_a_call():
    calls = []

    class Painter:
        def paint_together(self, rows, title, on_step):
            calls.append([row.seed for row in rows])
            return [Namespace(image=row.seed) for row in rows]

    async def ask():
        replica = ImageServer.func_or_class.__new__(ImageServer.func_or_class)
        replica._painter = Painter()
        base = parse(["generate", "a star", *MODEL])
        base.width = 32
        items = []
        for seed, width in enumerate((32, 64, 32, 32)):
            items.append(Item(copy(base)))
            items[-1].args.seed, items[-1].args.width = seed, width
        items[3].args.denoise = 0.5  # without a picture, which is nobody else's error
        return await replica._paint_all(items)

    *found, refused = asyncio.run(ask())
    assert found == [0, 1, 2] and calls == [[0, 2], [1]]
    assert "without a picture to change" in str(refused)


def test_an_empty_host_is_refused(krea2):
    """Sockets take it for every network."""
    assert "--host is empty" in krea2("serve", "--model", "nano", "--host", " ", code=2)
