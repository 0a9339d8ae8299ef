"""`--control` on the command line: several controls, in runs, tables and grids."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from krea2_model import Control, Krea2Pipeline, nano
from krea2_model.cli.main import main
from nano_training.outlines import outline_exam

pytestmark = pytest.mark.usefixtures("nano_once")
LORA = nano.CONTROL_LORA.name
RUN = ("--model", "nano", "--steps", "2", "--width", "64", "--height", "64")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two control images, and a mask of the left half."""
    monkeypatch.chdir(tmp_path)
    for number, case in enumerate(outline_exam(2)):
        pixels = np.round(255 * case.drawn.outlines()).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(f"{number}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save("left.png")
    return tmp_path


@pytest.fixture
def krea2(folder, capsys):
    def run(*words, code=0):
        assert main([*words, "--quiet"]) == code, capsys.readouterr().err
        return capsys.readouterr().err

    return run


def expected(*controls, seed=0):
    size = {"width": 64, "height": 64, "steps": 2}
    return Krea2Pipeline.nano()("a red star", control=list(controls), seed=seed, **size)[0]


def same(file, picture) -> bool:
    return Image.open(file).convert("RGB").tobytes() == picture.tobytes()


def results(folder):
    text = Path(folder, "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ONE = ("--control", LORA, "--control-image", "0.png")
BOTH = (*ONE, "--control", LORA, "--control-image", "1.png")


def test_several_controls_are_those_of_python_and_made_again(krea2):
    each = ("--control-strength", "0.7", "--control-strength", "0.4", "--control-end", "0.8",
            "--control-mask", "left.png", "--control-mask", "none")  # fmt: skip
    krea2("a red star", *RUN, *BOTH, *each, "--output", "a.png")
    first = Control(LORA, "0.png", 0.7, end=0.8, mask="left.png")
    picture = expected(first, Control(LORA, "1.png", 0.4, end=0.8))
    assert same("a.png", picture)
    krea2("again", "a.png", "--output", "b.png")
    assert same("b.png", picture)
    krea2("a red star", *RUN, *ONE, "--output", "c.png")
    assert same("c.png", expected(Control(LORA, "0.png"))) and not same("c.png", picture)


def test_rows_of_tables_and_axes_of_grids_have_their_own(krea2, folder):
    row = {"control": f"{LORA};{LORA}", "control_image": ["0.png", "1.png"], "prompt": "a red star"}
    rows = [row | {"control_strength": "0.7;0.4"}, row | {"control_strength": 0.5}]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    krea2("render", "jobs.jsonl", *RUN, "--output", "made")
    files = [line["file"] for line in results("made")]
    for file, strengths in zip(files, [(0.7, 0.4), (0.5, 0.5)], strict=True):
        pair = [Control(LORA, f"{n}.png", strength) for n, strength in enumerate(strengths)]
        assert same(f"made/{file}", expected(*pair))
    axis = ("--x", "control-strength=0-1:0.5")
    krea2("grid", "a red star", *RUN, *ONE, *axis, "--output", "sheet.png")
    lines = results("sheet")
    assert len(lines) == 3
    assert same(f"sheet/{lines[1]['file']}", expected(Control(LORA, "0.png", 0.5)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (BOTH[:6], "There are 2 --control and 1 --control-image"),
        (("--control", LORA), "There are 1 --control and 0 --control-image"),
        ((*BOTH, *3 * ("--control-end", "0.5")), "There are 3 --control-end and 2 --control"),
        ((*ONE, "--control-start", "0.9", "--control-end", "0.1"), "A control"),
        ((*ONE, "--control-strength", "11"), "--control-strength is 11"),
        ((*ONE, "--control-mask", "black.png"), "mask is empty"),
        ((*ONE, "--control-mask", "nowhere.png"), "nowhere.png"),
    ],
)
def test_what_does_not_go_together_is_refused_before_weights_are_read(
    krea2, monkeypatch, words, message
):
    Image.new("L", (64, 64)).save("black.png")
    monkeypatch.setattr(Krea2Pipeline, "from_files", None)
    assert message in krea2("a red star", *RUN, *words, code=2)


def test_a_dry_run_takes_them(krea2, capsys):
    assert main(["a red star", *RUN, *BOTH, "--dry-run"]) == 0
    assert "64 x 64 px" in capsys.readouterr().out
