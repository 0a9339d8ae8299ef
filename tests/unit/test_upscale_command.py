"""The second stage on the command line, and the same picture again."""

import pytest
from PIL import Image

from krea2_model import Krea2Pipeline, SparseAttention, TilePrompts, Upscale
from krea2_model.cli.main import main


@pytest.fixture
def krea2(tmp_path, monkeypatch, tokenizer_folder, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        assert main([*words, "--quiet"]) == code
        return capsys.readouterr().err

    return run


def test_pictures_are_made_larger_and_made_again(krea2, tmp_path):
    common = ("--model", "nano", "--upscale", "2", "--width", "64", "--height", "48")
    krea2("a green star", *common, "--output", "a.png", "--steps", "2")
    alone = ("--start-image", "a.png", "--denoise", "0", "--upscale", "1.5")
    krea2("a green star", "--model", "nano", *alone, "--output", "b.png")
    for name, size in (("a.png", (128, 96)), ("b.png", (192, 144))):
        krea2("again", name, "--output", f"again_{name}")
        pictures = [Image.open(tmp_path / prefix) for prefix in (name, f"again_{name}")]
        assert pictures[0].size == size
        assert pictures[0].tobytes() == pictures[1].tobytes()


def test_tiles_are_seen_by_the_text_encoder(krea2, tmp_path):
    common = ("--model", "nano", "--upscale", "2", "--steps", "1")
    krea2("a green star", *common, "--upscale-see-tiles", "--output", "a.png")
    krea2("a green star", *common, "--output", "b.png")
    krea2("again", "a.png", "--output", "c.png")
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    (expected,) = Krea2Pipeline.nano()(
        "a green star", steps=1, upscale=Upscale(2, prompts=TilePrompts())
    )
    assert a == c == expected.tobytes() and a != b


def test_tiles_have_texts_of_their_own(krea2, tmp_path):
    """A picture keeps them, and a table has `;` between them."""
    texts = ["a red circle, a star"] + ["a green star"] * 3
    common = ("--model", "nano", "--upscale", "1.5", "--steps", "1")
    own = [f"--upscale-tile-prompt={text}" for text in texts]
    krea2("a green star", *common, *own, "--output", "a.png")
    krea2("again", "a.png", "--output", "b.png")
    rows = f'prompt,upscale_tile_prompt,output\na green star,"{";".join(texts)}",c.png\n'
    (tmp_path / "rows.csv").write_text(rows, encoding="utf-8")
    krea2("render", "rows.csv", *common, "--output", ".")
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    prompts = TilePrompts(False, texts)
    (expected,) = Krea2Pipeline.nano()(
        "a green star", steps=1, upscale=Upscale(1.5, prompts=prompts)
    )
    assert a == b == c == expected.tobytes()


def test_sparse_attention_above_a_sigma(krea2, tmp_path):
    """Only from 1,024 px on tokens see less than all with its defaults."""
    size = ("--width", "1040", "--height", "64", "--steps", "1")
    run = ("a green star", "--model", "nano", *size)
    krea2(*run, "--sparse-above", "0", "--output", "a.png")
    krea2(*run, "--sparse-above", "1", "--output", "b.png")
    krea2("again", "a.png", "--output", "c.png")
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    (expected,) = Krea2Pipeline.nano()(
        "a green star", steps=1, width=1040, height=64, sparse=SparseAttention(0.0)
    )
    assert a == c == expected.tobytes() and a != b


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--denoise", "0"), "--denoise 0 changes nothing"),
        (("--upscale", "1"), "--upscale"),
        (("--upscale-tile-prompt", "a fox"), "goes with --upscale"),
        (("--blend-share", "0.2"), "--blend-share goes with --blend;"),
        (("--mask-grow", "0"), "--mask-grow goes with --mask;"),
        (("--style-end", "1"), "--style-end goes with --style-image;"),
        (("--control-strength", "2"), "--control-strength goes with --control;"),
        (("--edit-boost", "2"), "--edit-boost goes with --edit;"),
        (("--upscale-sigma", "0.5"), "--upscale-sigma goes with --upscale"),
        (("--upscale-see-tiles",), "--upscale-see-tiles goes with --upscale"),
        (("--upscale", "2", "--upscale-tile-prompt", "a fox"), "There is 1 text for 9 tiles"),
        (
            ("--upscale", "2", "--upscale-tile-prompt", "a fox", "--dry-run"),
            "There is 1 text for 9 tiles",
        ),
        (("--sparse-above", "2"), "--sparse-above is 2"),
        (("--upscale", "2", "--start-image", "a.png", "--mask", "a.png"), "do not go together"),
    ],
)
def test_what_does_not_go_together_is_refused(krea2, words, message):
    assert message in krea2("a star", "--model", "nano", *words, code=2)
