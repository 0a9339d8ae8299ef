"""`krea2 render`: rows are options, errors stop nobody, and a run goes on where it stopped."""

import json

import numpy as np
import pytest
from PIL import Image

from krea2_model import nano
from krea2_model.cli.painter import Painter
from krea2_model.images.picture_texts import read_texts

pytestmark = pytest.mark.usefixtures("nano_once")
MODEL = ["--model", "nano", "--steps", "1", "--width", "32", "--height", "32"]


@pytest.fixture
def render(krea2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name, text, *words, code=0):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return krea2("render", name, *MODEL, *words, code=code)

    return run


@pytest.fixture
def painted(monkeypatch):
    """Prompts and seeds in the order in which they were painted."""
    found, paint = [], Painter.paint

    def note(self, args, title):
        found.append((args.prompt, args.seed))
        return paint(self, args, title)

    monkeypatch.setattr(Painter, "paint", note)
    return found


def results(folder):
    lines = (folder / "renders" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_text_file_is_a_prompt_a_line(render, painted, tmp_path):
    text = "# comment\na {red|blue} circle\n\na green star\n"
    words = ["--seeds", "3,7-8", "--grid", "sheet.png"]
    files = render("p.txt", text, *words)
    assert [file.as_posix() for file in files] == [
        "renders/0002.png", "renders/0002-2.png", "renders/0002-3.png",
        "renders/0004.png", "renders/0004-2.png", "renders/0004-3.png", "sheet.png",
    ]  # fmt: skip
    assert [seed for _, seed in painted] == [3, 7, 8] * 2
    assert {prompt for prompt, _ in painted[:3]} <= {"a red circle", "a blue circle"}
    assert Image.open("sheet.png").width > 3 * 32
    lines = results(tmp_path)
    assert [line["file"] for line in lines] == [file.name for file in files[:-1]]
    assert [line["row"] for line in lines] == [2, 2, 2, 4, 4, 4]
    assert all(line["seconds"] >= 0 and line["seed"] in (3, 7, 8) for line in lines)


def test_columns_are_options_with_their_types(render, painted):
    text = (
        "prompt,seed,steps,negative,guidance,weights,lora,nag,output\n"
        f'"a star, blue",5,2,green,1.5,no,{nano.LORA}:0.5;{nano.REFERENCE_LORA},true,star.webp\n'
        "a circle,,,,,,,,\n"
    )
    first, second = render("p.csv", text, "--seed", "9")
    found = json.loads(read_texts(first)["krea2"])["settings"]
    expected = {
        "model": "nano", "prompt": "a star, blue", "seed": 5, "steps": 2, "negative": "green",
        "guidance": 1.5, "weights": False, "nag": True, "width": 32, "height": 32,
        "lora": [[nano.LORA.name, 0.5], [nano.REFERENCE_LORA.name, 1.0]],
    }  # fmt: skip
    assert found == expected and first.name == "star.webp"
    found = json.loads(read_texts(second)["krea2"])["settings"]
    assert (found["seed"], found["steps"]) == (9, 1) and "lora" not in found


def test_a_picture_is_the_one_that_generate_makes(render, krea2, tmp_path):
    row = json.dumps({"prompt": "a star", "seed": 4, "lora": [[nano.LORA.name, 0.5]]})
    plain = json.dumps({"prompt": "a star", "seed": 4})
    files = render("p.jsonl", f"{plain}\n{row}\n{plain}\n")
    words = ["--seed", "4", "--output", "a.png"]
    lora = ["--lora", f"{nano.LORA}:0.5"]
    alone = [krea2("a star", *MODEL, *words, *options)[0] for options in ([], lora)]
    first, second, third = (file.read_bytes() for file in files)
    assert first == third == alone[0].read_bytes() != second == alone[1].read_bytes()


BAD = """\
{"prompt": "a circle"}
{"prompt": "a star", "stpes": 2}
{"prompt": "a star", "steps": 0}
no json
["a star"]
{"prompt": "a {star"}
{"prompt": "a star", "lora": "nowhere.safetensors"}
{"prompt": "a star", "output": "../a.png"}
{"prompt": "a star", "output": "a.xyz"}
{"prompt": "a star", "weights": "maybe"}
{"prompt": "a star", "model": "nano-raw"}
{"steps": 1}
"""
SAID = [
    "Did you mean steps?", "--steps is 0; expected", "It is no JSON", "It is list",
    "The brace at position 2", "nowhere.safetensors (--lora)", "expected a name in the folder",
    "the ending .xyz", "expected true or false", "weights are loaded once", "The prompt is empty",
]  # fmt: skip


def test_bad_rows_are_said_first_and_stop_nobody(render, painted, tmp_path):
    error = render("p.jsonl", BAD, code=1)
    assert "11 of 12 pictures not made" in error and error.count("\n") == 1
    assert painted == [("a circle", 0)]
    *bad, good = results(tmp_path)
    assert good["file"] == "0001.png"
    for line, said in zip(bad, SAID, strict=True):
        assert said in line["error"], line
    assert "11 of 12 rows" in render("p.jsonl", BAD, "--strict", code=2)
    assert len(painted) == 1


def test_columns_that_are_no_options_are_refused(render):
    assert "the column 'promt'" in render("p.csv", "promt\na star\n", code=2)
    assert "Did you mean prompt?" in render("p.csv", "promt\na star\n", code=2)
    assert "more cells than there are columns" in render("p.csv", "prompt\na star,1\n", code=2)
    assert "ends in .md; expected .txt, .csv or .jsonl" in render("p.md", "a", code=2)
    assert "has no rows" in render("p.txt", "# nothing\n", code=2)


def test_a_stopped_run_goes_on(render, painted, tmp_path, monkeypatch):
    text = "a circle\na star\na square\n"
    paint = Painter.paint

    def stop(self, args, title):
        if args.prompt == "a star":
            raise KeyboardInterrupt
        return paint(self, args, title)

    with monkeypatch.context() as patch:
        patch.setattr(Painter, "paint", stop)
        assert render("p.txt", text, code=130) == "krea2: stopped\n"
    # A line that a crash has cut.
    with (tmp_path / "renders" / "results.jsonl").open("a") as file:
        file.write('{"row": 2, "fi')
    painted.clear()
    render("p.txt", text, "--resume")
    assert [prompt for prompt, _ in painted] == ["a star", "a square"]
    # What counts is the content of a row, wherever it is, and that the file is there.
    (tmp_path / "renders" / "0003.png").unlink()
    painted.clear()
    render("p.txt", "a square\na star\na moon\n", "--resume")
    assert [prompt for prompt, _ in painted] == ["a square", "a moon"]
    painted.clear()
    render("p.txt", "a square\na star\na moon\n", "--resume", "--guidance", "1")
    assert len(painted) == 3
    # A sheet is made anew with new pictures alone.
    sheet = tmp_path / "sheet.png"
    for _ in range(2):
        render("p.txt", "a star\n", "--resume", "--guidance", "1", "--grid", str(sheet))
    assert list(tmp_path.glob("sheet*")) == [sheet]


def test_a_failure_of_one_picture_is_a_line_of_the_results(render, tmp_path, monkeypatch):
    paint = Painter.paint

    def fail(self, args, title):
        if args.prompt == "a star":
            raise MemoryError
        return paint(self, args, title)

    monkeypatch.setattr(Painter, "paint", fail)
    assert "1 of 3 pictures" in render("p.txt", "a circle\na star\na square\n", code=1)
    assert [line.get("file") for line in results(tmp_path)] == ["0001.png", None, "0003.png"]
    assert "Memory ran out" in results(tmp_path)[1]["error"]
    assert "Memory ran out" in render("p.txt", "a star\na moon\n", "--strict", code=1)


def test_names_that_exist_are_not_written_over(render, tmp_path):
    (first,) = render("p.txt", "a circle\n")
    old = first.read_bytes()
    (second,) = render("p.txt", "a star\n")
    assert second.name == "0001-2.png" and first.read_bytes() == old
    (third,) = render("p.txt", "a star\n", "--force")
    assert third == first and first.read_bytes() == second.read_bytes()
    assert (np.asarray(Image.open(first)) == np.asarray(Image.open(second))).all()
