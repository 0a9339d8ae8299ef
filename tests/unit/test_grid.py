"""`krea2 grid`: cells are the pictures of single runs, each in its place on the sheet."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from krea2_model import Krea2Pipeline, PictureGrid, nano
from krea2_model.cli.axes import between_bars
from krea2_model.cli.painter import Painter
from krea2_model.cli.parser import command_parser
from krea2_model.cli.table import options_of_row
from krea2_model.images.grid_sheet import MAX_SHEET, check_counts, grid_sheet
from krea2_model.images.picture_texts import read_texts
from krea2_model.text.encoder import Qwen3VLTextEncoder
from work import assert_linear

pytestmark = pytest.mark.usefixtures("nano_once")
SIZE = ["--steps", "1", "--width", "32", "--height", "32"]
MODEL = ["--model", "nano", *SIZE]
COLOURS = ("red", "lime", "blue", "magenta", "cyan", "yellow")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def painted(monkeypatch):
    """Options of the pictures in the order in which they were painted."""
    found, paint = [], Painter.paint

    def note(self, args, title):
        found.append(args)
        return paint(self, args, title)

    monkeypatch.setattr(Painter, "paint", note)
    return found


@pytest.fixture
def encoded(monkeypatch):
    """Counts the calls of the text encoder."""
    found, encode = [], Qwen3VLTextEncoder.encode_tokens

    def note(self, prompts):
        found.append(len(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(Qwen3VLTextEncoder, "encode_tokens", note)
    return found


def settings(file):
    return json.loads(read_texts(file)["krea2"])["settings"]


def test_cells_are_the_pictures_of_single_runs(krea2, painted, encoded):
    lora = f"{nano.LORA}:0.5"
    *cells, sheet = krea2(
        "grid", "a (red:1.3) circle", *MODEL, "--x", "seed=1-2", "--y", f"lora=none,{lora}",
        "--z", "prompt~circle=circle|star, blue",
    )  # fmt: skip
    # One LoRA after the other, of each one prompt after the other; each is encoded once.
    order = [(with_lora, star) for with_lora in (False, True) for star in (False, True)]
    assert [(bool(args.lora), "star" in args.prompt) for args in painted[::2]] == order
    assert encoded == [1, 1]
    assert len({file.read_bytes() for file in cells}) == 8 and sheet.name == "grid.png"
    assert cells[0].as_posix() == "grid/0001-seed-1-lora-none-circle-circle.png"
    for number, words in (
        (0, ["a (red:1.3) circle", "--seed", "1"]),
        (7, ["a (red:1.3) star, blue", "--seed", "2", "--lora", lora]),
    ):
        (alone,) = krea2(*words, *MODEL, "--output", f"{number}.png")
        assert alone.read_bytes() == cells[number].read_bytes()
    (same,) = krea2("again", cells[5], "--output", "again.png")
    assert (np.asarray(Image.open(same)) == np.asarray(Image.open(cells[5]))).all()
    # All are on the sheet to the pixel: seeds beside each other, LoRAs and prompts below.
    pixels, places = np.asarray(Image.open(sheet)), {}
    for file in cells:
        place = find(pixels, np.asarray(Image.open(file)))
        told = settings(file)
        places[told["seed"], bool(told.get("lora")), "star" in told["prompt"]] = place
    lefts = {seed: {x for (s, *_), (_, x) in places.items() if s == seed} for seed in (1, 2)}
    assert max(map(len, lefts.values())) == 1 and max(lefts[1]) + 32 < min(lefts[2])
    rows = [
        {y for (_, *rest), (y, _) in places.items() if rest == [with_lora, star]}
        for star in (False, True)
        for with_lora in (False, True)
    ]
    tops = [row.pop() for row in rows]
    assert not any(rows) and tops == sorted(tops) and min(np.diff(tops)) > 32


def find(sheet, picture):
    """Top and left of the only place where a picture is on a sheet."""
    height, width = picture.shape[:2]
    starts = np.argwhere((sheet == picture[0, 0]).all(-1))
    found = [
        (y, x)
        for y, x in starts.tolist()
        if np.array_equal(sheet[y : y + height, x : x + width], picture)
    ]
    assert len(found) == 1
    return found[0]


def test_each_model_is_loaded_once(krea2, painted, monkeypatch):
    loaded, alive, load = [], [], Painter.__init__

    def note(self, args, weights, console):
        assert not any(painter() for painter in alive)  # two models may not fit
        loaded.append(weights.built_in)
        alive.append(weakref.ref(self))
        load(self, args, weights, console)

    monkeypatch.setattr(Painter, "__init__", note)
    *cells, _ = krea2(
        "grid", *SIZE, "--x", "model=nano,nano-raw", "--y", "prompt=a red circle, tiny|a star"
    )
    assert loaded == ["turbo", "raw"]
    found = [(settings(file)["model"], settings(file)["prompt"]) for file in cells]
    prompts = ["a red circle, tiny", "a star"]
    assert found == [(model, prompt) for model in ("nano", "nano-raw") for prompt in prompts]
    (alone,) = krea2("a star", "--model", "nano-raw", *SIZE, "--output", "alone.png")
    assert alone.read_bytes() == cells[3].read_bytes()


def test_strengths_are_of_all_loras_and_same_cells_are_made_once(krea2, painted):
    words = [
        "--x",
        f"lora=none,{nano.LORA};{nano.REFERENCE_LORA}:0.1",
        "--y",
        "lora-strength=0.5,1",
    ]
    *cells, _ = krea2("grid", "a star", *MODEL, *words)
    assert [[scale for _, scale in args.lora] for args in painted] == [[], [0.5, 0.5], [1, 1]]
    assert len(cells) == 3


def test_files_of_one_name_are_different_cells(krea2, painted, folder):
    for name, file in (("one", nano.LORA), ("two", nano.REFERENCE_LORA)):
        (folder / name).mkdir()
        (folder / name / "lora.safetensors").write_bytes(file.read_bytes())
    words = ["--x", "lora=one/lora.safetensors,two/lora.safetensors"]
    first, second, _ = krea2("grid", "a star", *MODEL, *words)
    assert first.read_bytes() != second.read_bytes()
    assert [path.name for path in (first, second)] == [
        "0001-lora-one-lora.safetensors.png",
        "0002-lora-two-lora.safetensors.png",
    ]
    painted.clear()
    krea2("grid", "a star", *MODEL, *words, "--resume")
    assert not painted
    (folder / "two" / "lora.safetensors").write_bytes(nano.VAE.read_bytes())
    assert "expected a LoRA" in krea2("grid", "a star", *MODEL, *words, code=2)


def test_axes_have_the_directions_of_their_letters(krea2):
    wide, high = (krea2("grid", "a star", *MODEL, f"--{letter}", "seed=1-3")[-1] for letter in "xz")
    assert Image.open(wide).width > 3 * 32 + 64 > Image.open(wide).height + 64
    assert Image.open(high).width < Image.open(high).height - 64


def test_a_stopped_grid_keeps_what_is_done(krea2, painted, monkeypatch):
    words = ["grid", "a star", *MODEL, "--x", "seed=1-2", "--y", "guidance=0-0.5:0.5"]
    paint = Painter.paint

    def stop(self, args, title):
        if (args.seed, args.guidance) == (2, 0.5):
            raise KeyboardInterrupt
        return paint(self, args, title)

    with monkeypatch.context() as patch:
        patch.setattr(Painter, "paint", stop)
        assert krea2(*words, code=130) == "krea2: stopped\n"
    half = np.asarray(Image.open("grid.png"))
    painted.clear()
    *cells, sheet = krea2(*words, "--resume")
    assert [(args.seed, args.guidance) for args in painted] == [(2, 0.5)]
    whole, last = np.asarray(Image.open(sheet)), np.asarray(Image.open(cells[0]))
    y, x = find(whole, last)
    assert sheet.name == "grid.png" and whole.shape == half.shape and len(cells) == 1
    assert (half[y : y + 32, x : x + 32] == 255).all()
    half, whole = half.copy(), whole.copy()
    half[y : y + 32, x : x + 32] = whole[y : y + 32, x : x + 32] = 0
    assert (half == whole).all()
    # A second grid has a sheet and a folder of its own.
    cell, _, sheet = krea2("grid", "a star", *MODEL, "--x", "seed=1-2")
    assert (cell.as_posix(), sheet.name) == ("grid-2/0001-seed-1.png", "grid-2.png")


def test_a_failed_cell_is_blank_and_said(krea2, painted, monkeypatch):
    paint = Painter.paint

    def fail(self, args, title):
        if args.seed == 2:
            raise MemoryError
        return paint(self, args, title)

    monkeypatch.setattr(Painter, "paint", fail)
    assert "1 of 3 pictures" in krea2("grid", "a star", *MODEL, "--x", "seed=1-3", code=1)
    assert Image.open("grid.png").width > 3 * 32
    lines = [
        json.loads(line) for line in Path("grid/results.jsonl").read_text("utf-8").splitlines()
    ]
    assert [line.get("error", "")[:14] for line in lines] == ["", "Memory ran out", ""]
    assert [line["cell"] for line in lines] == ["seed: 1", "seed: 2", "seed: 3"]


REFUSED = [
    ("", "There is no axis; expected one to three"),
    ("--x seed", "expected an option and its values"),
    ("--x sead=1", "--x is sead=1: there is no option sead of a picture that takes values."),
    ("--x images=2", "there is no option images"),
    ("--x seed=1,2 --z seed=3", "--x and --z are both seed"),
    ("--x prompt~a=b --y prompt~a=c", "--x and --y are both a;"),
    ("--x seed=1,2 --seed 4", "--x is seed, which --seed gives too; leave --seed out"),
    ("--x prompt=a|b", "which PROMPT gives too"),
    ("--x seed=", "a value is missing"),
    ("--x seed=1,,2", "--x is seed=1,,2, in which a value is missing"),
    ("--x seed=3-1", "expected a range that rises"),
    ("--x seed=1-9:0", "expected a range that rises"),
    ("--x seed=1,1", "has '1' twice"),
    ("--x seed=1-40 --y mu=1-11", "440 cells, 40 of seed x 11 of mu; expected at most 400"),
    ("--x seed=1-501 --max-cells 600", "501 pictures beside each other; expected at most 500"),
    ("--x guidance=0,-1", "--x guidance=-1: --guidance is -1; expected a number, 0 to 100"),
    ("--y guidance_ramp=constant,ramp", "--y guidance-ramp=ramp: --guidance-ramp is ramp;"),
    ("--x mask-hard=maybe", "--x mask-hard=maybe: mask_hard is 'maybe'; expected true or false"),
    ("--x prompt~cat=dog", "--x replaces 'cat', which is not in the prompt 'a red circle'"),
    ("--x negative~a=b", "expected a part of the prompt after prompt~"),
    ("--x lora-strength=1", "lora-strength without a LoRA"),
    ("--x lora-strength=a --lora b.safetensors", "--x lora-strength=a: the strength is a;"),
    ("--x lora=none,nowhere.safetensors", "The cell of lora: nowhere: There is no file or folder"),
    ("--x seed=1 --y denoise=0.5", "The cell of seed: 1, denoise: 0.5: --denoise is 0.5 without"),
    ("--x seed=1 --images 2", "--images is 2; a grid has a picture in each cell"),
    ("--x seed=1 --output a.xyz", "the ending .xyz"),
]  # fmt: skip


def test_what_is_wrong_is_refused_before_anything_starts(krea2, folder, monkeypatch):
    monkeypatch.setattr(Painter, "__init__", None)
    for words, said in REFUSED:
        error = krea2("grid", "a red circle", *MODEL, *words.split(), code=2)
        assert said in error and error.count("\n") == 1, words
    assert not list(folder.iterdir())


def test_tables_encode_a_prompt_once_for_its_seeds(krea2, encoded):
    Path("p.txt").write_text("a star\na circle\n", "utf-8")
    assert len(krea2("render", "p.txt", *MODEL, "--seeds", "1-3")) == 6
    assert encoded == [1, 1]


def test_switches_of_rows_are_on_and_off():
    base = command_parser("render").parse_args(["p.txt", "--nag"])
    for name in ("mask_hard", "nag", "weights"):
        for word, value in (("yes", True), ("false", False)):
            assert getattr(options_of_row({name: word}, base), name) is value


def flat(colour, width=40, height=30):
    return Image.new("RGB", (width, height), colour)


def test_bars_of_wildcards_part_no_values_and_many_take_linear_time():
    assert between_bars("{a|b} c|d|{e}") == ["{a|b} c", "d", "{e}"]
    assert between_bars("a|b}|c{|d") == ["a|b}", "c{", "d"]
    assert_linear(lambda n: between_bars("|" * n), 2_000)


def test_the_sheet_has_a_place_for_every_cell():
    places = [(x, y, z) for z in range(2) for y in range(2) for x in range(2)][:6]
    pictures = {place: flat(colour) for place, colour in zip(places, COLOURS, strict=True)}
    labels = (["a", "b"], ["one", "two"], ["first", "second"])
    sheet = np.asarray(grid_sheet(pictures, *labels))
    boxes = {}
    for place, colour in zip(places, COLOURS, strict=True):
        ys, xs = np.nonzero((sheet == np.asarray(flat(colour))[0, 0]).all(-1))
        assert len(ys) == 40 * 30
        boxes[place] = ys.min(), xs.min()
    assert {x for _, x in boxes.values()} == {boxes[0, 0, 0][1], boxes[1, 0, 0][1]}
    assert boxes[0, 0, 0] == (boxes[1, 0, 0][0], boxes[0, 0, 1][1])
    assert boxes[0, 0, 0][0] < boxes[0, 1, 0][0] < boxes[0, 0, 1][0]
    # The two that are missing would stand below the last two.
    assert (sheet[boxes[0, 0, 1][0] + 30 :, boxes[0, 0, 1][1] :] == 255).all()
    # Labels take their room above and at the left, and none where there are none.
    plain = np.asarray(grid_sheet({(0, 0, 0): flat("red")}, [""]))
    assert plain.shape == (30 + 2 * 8, 40 + 2 * 8, 3)
    assert (sheet[:, : boxes[0, 0, 0][1]] < 128).any() and (sheet[: boxes[0, 0, 0][0]] < 128).any()


def test_long_labels_and_many_cells_keep_within_the_largest_sheet():
    sheet = grid_sheet({(0, 0, 0): flat("red", 16, 16)}, ["w " * 500] * 500, ["word " * 99] * 2)
    assert max(sheet.size) <= MAX_SHEET
    for counts, kind in (((501, 1, 1), "beside"), ((1, 51, 10), "below")):
        with pytest.raises(ValueError, match=kind):
            check_counts(*counts)
    with pytest.raises(ValueError, match="no picture"):
        grid_sheet({}, ["a"])
    with pytest.raises(ValueError, match=r"is at \(1, 0, 0\)"):
        grid_sheet({(1, 0, 0): flat("red")}, ["a"])


ONE = {"steps": 1, "width": 32, "height": 32}


@pytest.fixture
def pipeline():
    return Krea2Pipeline.from_files(nano.TRANSFORMERS["turbo"])


def test_a_grid_in_python_has_the_pictures_of_calls(pipeline, encoded):
    loras = [[], [(nano.LORA, 0.5)]]
    axes = {"seed": [1, 2], "prompt": ["a star", "a circle"], "loras": loras}
    grid = PictureGrid(pipeline, axes, **ONE)
    order = [place for place, _ in grid.paint()]
    assert order == [(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
    assert encoded == [1, 1]
    assert not any(stack.originals for stack in pipeline._loras)
    alone = pipeline("a star", seed=2, **ONE)[0]
    assert (np.asarray(alone) == np.asarray(grid.images[1, 0, 0])).all()
    pipeline.load_loras(loras[1])
    alone = pipeline("a circle", seed=1, **ONE)[0]
    assert (np.asarray(alone) == np.asarray(grid.images[0, 1, 1])).all()
    with pytest.raises(ValueError, match="has LoRAs loaded"):
        PictureGrid(pipeline, axes, **ONE)
    assert len(encoded) == 4  # encodings are kept by a grid alone


def test_a_grid_in_python_goes_on_after_a_stop(pipeline):
    grid = PictureGrid(pipeline, {"seed": [1, 2]}, prompt="a star", **ONE)
    for place, image in grid.paint():
        assert grid.images == {place: image} and place == (0, 0, 0)
        break
    half = np.asarray(grid.sheet())
    assert [place for place, _ in grid.paint()] == [(1, 0, 0)] and not list(grid.paint())
    assert find(np.asarray(grid.sheet()), np.asarray(grid.images[1, 0, 0]))
    assert half.shape == np.asarray(grid.sheet()).shape


@pytest.mark.parametrize(
    "axes, options, said",
    [
        ({}, {}, "axes has 0 arguments"),
        ({"sead": [1]}, {}, "axes has 'sead'"),
        ({"num_images": [1]}, {}, "axes has 'num_images'"),
        ({"seed": []}, {}, r"seed is \[\]"),
        ({"prompt": "ab"}, {}, "expected a list of values"),
        ({"seed": [1]}, {"seed": 2}, "seed is an axis and an option"),
        ({"seed": [1]}, {"output_type": "np"}, "output_type is no option of a grid"),
        ({"seed": range(501)}, {}, "501 pictures beside each other"),
    ],
)
def test_what_is_no_grid_is_refused(pipeline, axes, options, said):
    with pytest.raises(ValueError, match=said):
        PictureGrid(pipeline, axes, **options)


def test_texts_are_kept_while_it_lasts_and_not_for_another_encoder(pipeline, encoded):
    def encode(*prompts, **options):
        return [pipeline.encode_prompt(prompt, **options).taps for prompt in prompts]

    with pipeline.keep_texts(2):
        first, _, again = encode("a", "b", "a")
        assert encoded == [1, 1] and first.equal(again)
        encode("a", weighted=True)  # drops "b", the oldest
        encode("a", "b")
        assert len(encoded) == 4
        layer = next(name for name in pipeline._loras[1].shapes)
        pipeline._loras[1].updates[layer].append(None)
        encode("b", "b")
        pipeline._loras[1].updates.clear()
        assert len(encoded) == 6
    encode("b")
    assert len(encoded) == 7
    with pytest.raises(ValueError, match="count is 0"), pipeline.keep_texts(0):
        pass
