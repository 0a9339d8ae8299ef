"""docs/api.md, block by block, against a real server."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from headless import ROOT, ComfyClient, JobError
from nano_training.judge import judge
from nano_training.scenes import Scene, Thing

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
WORKFLOW = ROOT / "tests" / "workflows" / "krea2_nano_first_image.json"


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory):
    """A reader's folder, after the page's bash blocks; what they print is in printed.txt."""
    if shutil.which("curl") is None:
        pytest.fail("The page's first half is made of curl, which is not installed.")
    folder = tmp_path_factory.mktemp("reader")
    (folder / "printed.txt").write_text(
        follow(server, "bash", ["bash", "-euo", "pipefail"], folder)
    )
    return folder


def follow(server, language, command, folder):
    """Run the page's blocks of a language, one after the other as a reader does."""
    code = "\n".join(block for kind, block in BLOCKS if kind == language)
    assert "127.0.0.1:8188" in code
    script = folder / f"page.{language}"
    script.write_text(code.replace("127.0.0.1:8188", server.address))
    done = subprocess.run(
        [*command, str(script)], cwd=folder, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "scripts")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def picture(file):
    return np.asarray(Image.open(file).convert("RGB"))


def shows(file, *things, background):
    found = judge((picture(file) / 255).astype(np.float32), Scene(things, background))
    assert all(found.values()), found


def test_there_are_only_blocks_that_are_run():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}
    assert PAGE.count("\n```") == 2 * len(BLOCKS)


def test_curl(folder):
    graph, workflow = (json.loads(p.read_text()) for p in (folder / "graph.json", WORKFLOW))
    assert list(graph) == list(workflow)
    for name, node in graph.items():
        assert node["class_type"] == workflow[name]["class_type"]
        # Inputs that came later are optional, and the page has room for better things.
        assert node["inputs"].items() <= workflow[name]["inputs"].items()
    lines = (folder / "printed.txt").read_text().splitlines()
    assert lines == [
        "completed",
        '{"cancelled": true}400',
        "steps - steps is 0; expected a whole number from 1 to 10000.",
        "picture.png",
    ]
    circle, square = Thing("circle", "red", "left"), Thing("square", "blue", "right")
    shows(folder / "picture.png", circle, square, background="yellow")


def test_python(server, folder):
    printed = follow(server, "python", [sys.executable, "-P"], folder)
    star, ring = Thing("star", "yellow", "top", "small"), Thing("ring", "purple", "bottom")
    for name in ("picture_python.png", "picture_client.png"):
        shows(folder / name, star, ring, background="white")
    different = picture(folder / "picture_python.png") != picture(folder / "picture_client.png")
    assert different.any()
    for words in (
        "node 4 begins", "node 4: 8 of 8", "step 8 of 8",
        "K2Loader (node 1): model: There is no 'nowhere.safetensors' in models/",
        "K2Sampler (node 4): Required input is missing: steps",
        "K2Sampler (node 4): Guidance is 4.5 (preset raw) but nothing is connected",
    ):  # fmt: skip
        assert words in printed
    changed, start = picture(folder / "picture_changed.png"), picture(folder / "picture.png")
    assert changed.shape == start.shape and (changed != start).any()
    painted = picture(folder / "picture_inpainted.png")
    assert np.array_equal(painted[:, :64], start[:, :64])
    circle, star = Thing("circle", "red", "left"), Thing("star", "green", "right")
    shows(folder / "picture_inpainted.png", circle, star, background="yellow")
    workflow = json.loads(Image.open(folder / "picture_again.png").text["workflow"])
    assert workflow == json.loads((ROOT / "example_workflows" / WORKFLOW.name).read_text())
    again = picture(folder / "picture_again.png")
    assert np.array_equal(again, start)
    assert Image.open(folder / "picture_again.png").text["prompt"]


def test_required_inputs_have_to_be_there_and_optional_ones_need_not(server, folder):
    """Of each node in the page's graph, each input left out in turn: what the page says of it."""
    client, graph = ComfyClient(server.address), json.loads((folder / "graph.json").read_text())
    refused = {}
    for name, node in graph.items():
        schema = client.object_info(node["class_type"])["input"]
        assert not set(schema.get("optional", {})) & set(schema["required"])
        for key in node["inputs"]:
            wrong = json.loads(json.dumps(graph))
            del wrong[name]["inputs"][key]
            try:
                client.cancel(client.post(wrong))
            except JobError as error:
                refused[name, key] = str(error)
            assert ((name, key) in refused) == (key in schema["required"]), (name, key)
    assert "Required input is missing: steps" in refused["4", "steps"] and len(refused) > 15
