"""`krea2 vary` and `krea2 walk`: neighbours and frames, each made again by its settings."""

import json

import numpy as np
import pytest
from PIL import Image

from krea2_model import Krea2Pipeline
from krea2_model.cli.graph import graph_of, settings_of_graph
from krea2_model.images.picture_texts import read_texts
from krea2_model.text.expander import Expansion

pytestmark = pytest.mark.usefixtures("nano_once")

SMALL = ("--model", "nano", "--width", 64, "--height", 48, "--steps", 2)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def settings(path):
    return json.loads(read_texts(path)["krea2"])["settings"]


@pytest.fixture
def picture(krea2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path,) = krea2("a {red|blue} star", *SMALL, "--seed", 4, "--output", "a.png")
    return path


def test_neighbours_and_their_neighbours_are_made_again(krea2, picture):
    first, second = krea2("vary", picture, "--images", 2, "--strength", 1 / 3)
    assert settings(second)["vary"] == [[6, 1 / 3]] and settings(second)["seed"] == 4
    (again,) = krea2("again", second, "--output", "b.png")
    assert again.read_bytes() == second.read_bytes() != first.read_bytes()
    (next_one,) = krea2("vary", second, "--images", 1, "--variation-seed", 30)
    assert settings(next_one)["vary"] == [[6, 1 / 3], [30, 0.3]]
    (again,) = krea2("again", next_one, "--output", "c.png")
    assert again.read_bytes() == next_one.read_bytes()


def test_the_ends_of_the_strength(krea2, picture):
    (same,) = krea2("vary", picture, "--images", 1, "--strength", 0)
    assert (pixels(same) == pixels(picture)).all()
    (other,) = krea2("vary", picture, "--images", 1, "--strength", 1, "--variation-seed", 9)
    (plain,) = krea2("again", picture, "--seed", 9)
    assert (pixels(other) == pixels(plain)).all() and (pixels(other) != pixels(same)).any()


def test_another_prompt_and_expanded_ones(krea2, picture, monkeypatch):
    (words,) = krea2("vary", picture, "--images", 1, "--strength", 0, "--words", "a circle")
    assert settings(words)["prompt"] == "a circle"

    def expand(self, prompt, variants, seed):
        return [Expansion(f"{prompt} {number}") for number in range(variants)]

    assert "cannot write" in krea2("vary", picture, "--expand", code=2)
    monkeypatch.setattr(Krea2Pipeline, "expand", expand)
    found = krea2("vary", picture, "--images", 2, "--expand", "--output", "e.png")
    prompt = settings(picture)["prompt"]
    assert [settings(path)["prompt"] for path in found] == [f"{prompt} 0", f"{prompt} 1"]


def test_a_walk_is_frames_and_an_animation(krea2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["walk", "a red circle", "a blue star", *SMALL, "--seed", 3, "--to-seed", 8]
    *frames, moving = krea2(*line, "--frames", 4, "--animation", "w.webp", "--back")
    assert [path.name for path in frames] == ["0001.png", "0002.png", "0003.png", "0004.png"]
    (first,) = krea2("a red circle", *SMALL, "--seed", 3)
    (last,) = krea2("a blue star", *SMALL, "--seed", 8)
    assert first.read_bytes() == frames[0].read_bytes()
    assert last.read_bytes() == frames[3].read_bytes()
    (again,) = krea2("again", frames[1], "--output", "b.png")
    assert again.read_bytes() == frames[1].read_bytes()
    with Image.open(moving) as image:
        assert (image.n_frames, image.size) == (6, (64, 48))
        image.seek(3)
        close = np.asarray(image.convert("RGB")).astype(int) - pixels(frames[3])
        assert np.abs(close).mean() < 8
    for name in ("w.gif", "w.png"):
        *_, file = krea2(*line, "--frames", 2, "--animation", name, "--output", name + "s")
        assert Image.open(file).n_frames == 2
    assert "walk/0001.png is there already" in krea2(*line, code=2).replace("\\", "/")


def test_options_and_graphs_have_variations():
    given = {
        "prompt": "a star", "seed": 4, "width": 64, "height": 48, "steps": 2, "guidance": 0.0,
        "model": "nano", "vary": [[6, 0.25], [2**64 - 1, 0.5]],
    }  # fmt: skip
    found = settings_of_graph(graph_of(given))
    assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["vary", "a.png", "--strength", "1.1"], "--strength is 1.1"),
        (["vary", "none.png"], "none.png"),
        (["vary", "a.png", "--vary", "3"], "--vary is 3; expected a seed and a strength"),
        (["walk", "a star"], "nothing to walk to"),
        (["walk", "a star", "a circle", "--frames", "1"], "--frames is 1"),
        (["walk", "a star", " ", "--model", "nano"], "The second prompt is empty"),
        (["walk", "a", "b", "--model", "nano", "--animation", "w.jpg"], "expected a .webp, .gif"),
        (
            ["walk", "a", "b", "--model", "nano", "--animation", "walk/0001.png"],
            "is one of the frames too",
        ),
        (["walk", "a", "b", "--model", "nano", "--back"], "--back is of the animation"),
        (["walk", "a", "b", "--model", "nano", "--seconds", "1"], "--seconds is of the animation"),
        (["a star", "--blend", " ", "--model", "nano"], "--blend is empty"),
        (["walk", "a", "b", "--images", "2"], "--frames says how many"),
    ],
)
def test_wrong_lines_are_refused(krea2, picture, line, words):
    assert words in krea2(*line, code=2)
