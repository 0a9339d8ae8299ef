"""Jobs of every kind for a server with krea2-nano: pictures, cancelled ones, broken ones."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from headless import ComfyClient, JobError
from nano_training.scenes import PICTURE_SIZES, Scene, caption, random_scene

WORKFLOW = Path(__file__).resolve().parents[2] / "tests/workflows/krea2_nano_first_image.json"
TURBO, RAW = "krea2-nano (built in)", "krea2-nano Raw (built in)"
LORA = "krea2-nano notebook (built in)"
TRUNCATED = "truncated.safetensors"

PICTURE, WAITING, RUNNING, REFUSED, FAILING = (
    "pictures", "cancelled while waiting", "cancelled while running", "refused", "failing",
)  # fmt: skip
_SHARES = {PICTURE: 0.8, WAITING: 0.05, RUNNING: 0.05, REFUSED: 0.05, FAILING: 0.05}
_SECONDS = 120  # for one job, far more than it takes


class Wrong(AssertionError):
    """A server did something else than it should."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise Wrong(message)


@dataclass
class Job:
    """A graph, and what must become of it.

    size: of its pictures, (width, height). error: words of the message that stops it. scene: what
    a picture shows, where plain Turbo paints it and a judge can tell.
    """

    kind: str
    graph: dict
    size: tuple[int, int] = (128, 128)
    batch: int = 1
    error: str = ""
    scene: Scene | None = None


def nano_graph(prompt: str = "a red circle left of a blue square", **settings) -> dict:
    """The first workflow with other settings, by the names of its nodes' inputs.

    lora: a LoRA to put before the sampler.
    """
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    lora = settings.pop("lora", None)
    # The sampler has an input called model too, which is a link.
    for name, value in {"prompt": prompt, **settings}.items():
        (inputs,) = [
            node["inputs"]
            for node in graph.values()
            if not isinstance(node["inputs"].get(name, []), list)
        ]
        inputs[name] = value
    if lora is not None:
        inputs = {"model": ["1", 0], "lora": lora, "strength": 1.0, "clip_strength": 1.0}
        graph["lora"] = {"class_type": "K2LoraLoader", "inputs": inputs}
        graph["4"]["inputs"]["model"] = ["lora", 0]
    return graph


def armed(graph: dict, part: str, times: int = 1) -> dict:
    """The graph with the next calls of a part running out of memory."""
    inputs = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "part": part, "times": times}
    fault = {"class_type": "K2TestOutOfMemory", "inputs": inputs}
    nodes = json.loads(json.dumps(graph))
    for node in nodes.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == "1":
                node["inputs"][name] = ["fault", value[1]]
    return {**nodes, "fault": fault}


def make_jobs(count: int, seed: int = 0) -> list[Job]:
    """Jobs in a random order, with the shares above and one at least, each of another seed."""
    dice = Random(seed)
    makers = {PICTURE: _picture, WAITING: _slow, RUNNING: _slow, REFUSED: _refused,
              FAILING: _failing}  # fmt: skip
    kinds = [kind for kind, share in _SHARES.items() for _ in range(max(1, round(share * count)))]
    dice.shuffle(kinds)
    return [makers[kind](kind, dice, seed * count + index) for index, kind in enumerate(kinds)]


def _picture(kind: str, dice: Random, seed: int) -> Job:
    scene = random_scene(dice)
    width, height = size = dice.choice([(128, 128)] * 3 + [*PICTURE_SIZES, (64, 64), (192, 128)])
    model = RAW if dice.random() < 0.1 else TURBO
    lora = LORA if dice.random() < 0.25 else None
    batch = 2 if dice.random() < 0.1 else 1
    prompt = caption(scene, dice, brief=0)
    graph = nano_graph(
        prompt, model=model, lora=lora, seed=seed, width=width, height=height, batch=batch
    )
    # The judge measures shapes at the size that most of the training had.
    plain = model == TURBO and lora is None and size == (128, 128)
    return Job(kind, graph, size, batch, scene=scene if plain else None)


def _slow(kind: str, dice: Random, seed: int) -> Job:
    graph = nano_graph(seed=seed, preset="custom", steps=1000, guidance=0.0)
    return Job(kind, graph, error="interrupted")


def _refused(kind: str, dice: Random, seed: int) -> Job:
    settings, error = dice.choice([
        ({"model": "nowhere.safetensors"}, "There is no 'nowhere.safetensors'"),
        ({"model": TRUNCATED}, "the download is incomplete"),
        ({"lora": "../vae/other.safetensors"}, "There is no '../vae/other.safetensors'"),
        ({"steps": 0}, "steps is 0; expected"),
        ({"width": -64}, "width is -64; expected"),
    ])  # fmt: skip
    return Job(kind, nano_graph(seed=seed, **settings), error=error)


def _failing(kind: str, dice: Random, seed: int) -> Job:
    if dice.random() < 0.5:
        graph = nano_graph(seed=seed, model=RAW)
        del graph["4"]["inputs"]["negative"]
        return Job(kind, graph, error="Connect the negative output of Krea 2 Prompt")
    return Job(
        kind, armed(nano_graph(seed=seed), "transformer"), error="The transformer, at 1 image"
    )


def pixels(png: bytes) -> np.ndarray:
    """(H, W, 3) in whole numbers."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def pictures(client: ComfyClient, graph: dict) -> list[np.ndarray]:
    """The pictures of a graph that runs alone. Raises JobError."""
    outputs = client.run(graph, timeout=_SECONDS)
    return [pixels(png) for png in client.images(outputs)]


def run_jobs(
    client: ComfyClient, jobs: list[Job], together: int = 20
) -> Iterator[tuple[Job, list[np.ndarray]]]:
    """Run jobs, so many in the queue at once, and give each with its pictures as it ends.

    Raises Wrong where one ends otherwise than it should.
    """
    for start in range(0, len(jobs), together):
        block = jobs[start : start + together]
        ids = [_post(client, job) for job in block]
        for job, prompt_id in zip(block, ids, strict=True):
            if job.kind == WAITING and prompt_id:
                check(client.cancel(prompt_id), f"A waiting job was not cancelled: {job.graph}")
        for job, prompt_id in zip(block, ids, strict=True):
            yield job, _finish(client, job, prompt_id) if prompt_id else []


def _post(client: ComfyClient, job: Job) -> str:
    """The prompt id; empty for a job that is refused, as it has to be."""
    try:
        prompt_id = client.post(job.graph)
    except JobError as error:
        right = job.kind == REFUSED and job.error in str(error)
        check(right, f"A job ({job.kind}) was refused: {error}")
        return ""
    check(job.kind != REFUSED, f"A job that is wrong ({job.error}) was queued.")
    return prompt_id


def _finish(client: ComfyClient, job: Job, prompt_id: str) -> list[np.ndarray]:
    deadline = time.monotonic() + _SECONDS
    while (status := _status(client, prompt_id)) in ("pending", "in_progress"):
        if job.kind == RUNNING and status == "in_progress":
            client.cancel(prompt_id)
        check(time.monotonic() < deadline, f"A job ({job.kind}) is still {status}.")
        time.sleep(0.02)
    if job.kind == PICTURE:
        found = [pixels(png) for png in client.images(client.wait(prompt_id))]
        sizes = [(image.shape[1], image.shape[0]) for image in found]
        check(sizes == [job.size] * job.batch, f"{job.batch} of {job.size} came out as {sizes}.")
        return found
    if job.kind == WAITING:
        check(status in ("unknown", "cancelled"), f"A cancelled job is {status}.")
        return []
    try:
        client.wait(prompt_id)
    except JobError as error:
        check(job.error in str(error), f"Expected {job.error!r}; the message is {error}")
        return []
    raise Wrong(f"A job ({job.kind}) ended well.")


def _status(client: ComfyClient, prompt_id: str) -> str:
    """What ComfyUI says of a job; it forgets those that are cancelled before they begin."""
    known = client.job(prompt_id)
    return known["status"] if known else "unknown"
