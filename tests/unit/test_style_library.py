"""Styles as files, several mixed by weights, and what they do to krea2-nano's pictures."""

import errno
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krea2_model import (
    Krea2Pipeline,
    MixedStyle,
    Region,
    SavedStyle,
    StyleError,
    StyleLibrary,
    TilePrompts,
    TileSettings,
    Upscale,
)
from krea2_model.features.style_library import BUILT_IN, default_folder
from krea2_model.features.style_mixing import escaped, read_choice
from krea2_model.images.picture_texts import read_texts
from krea2_model.text.prompt_weights import parse_weights

RING = "nano yellow ring"
NOTEBOOK = "krea2_nano_notebook_lora.safetensors"
SMALL = {"height": 64, "width": 64, "steps": 3, "seed": 3, "output_type": "pt"}


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    monkeypatch.setenv("KREA2_STYLES", str(tmp_path / "styles"))
    return StyleLibrary()


@pytest.fixture(scope="module")
def nano():
    return Krea2Pipeline.nano()


def write(library, name, **entries):
    folder = library.folder / name
    folder.mkdir(parents=True)
    (folder / "style.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def test_the_styles_that_come_with_the_package_can_all_be_used(library):
    found, problems = library.styles()
    assert not problems and len(found) >= 12 and all(style.is_built_in for style in found)
    for style in found:
        with Image.open(style.thumbnail) as image:
            assert image.size == (128, 128)
        parse_weights(MixedStyle(((style, 0.5),)).prompt("a fox"))
    assert len([path for path in BUILT_IN.iterdir()]) == len(found)


def test_a_style_is_saved_whole_and_read_again(library, tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    style = SavedStyle(
        "Größe & Ink", "ink on {prompt}", "photo", (("red.png", 0.5),), 0.8, ((NOTEBOOK, 0.7),),
        {"steps": 4},
    )  # fmt: skip
    saved = library.save(style, [tmp_path / "red.png"])
    assert (saved.words, saved.negative, saved.loras) == (style.words, "photo", ((NOTEBOOK, 0.7),))
    assert saved.settings == {"steps": 4} and saved.picture_paths()[0].is_file()
    assert Image.open(saved.thumbnail).size == (128, 85)
    assert library.get("Größe & Ink") == saved and "Größe & Ink" in library.names()
    with pytest.raises(StyleError, match="There is a style"):
        library.save(style, [tmp_path / "red.png"])
    # What is saved may be taken from what is replaced.
    others = ("ink.safetensors", "a photo of mine.png")
    for name in others:
        (saved.folder / name).write_bytes(b"not the style's")
    again = library.save(saved, replace=True)
    assert again.picture_paths()[0].is_file()
    assert all((again.folder / name).is_file() for name in others)
    assert [p.name for p in library.folder.iterdir()] == ["Größe & Ink"], "nothing is left beside"


def test_nothing_is_left_where_saving_fails(library, tmp_path):
    style = SavedStyle("A", pictures=(("a.png", 1.0),))
    with pytest.raises((StyleError, OSError)):
        library.save(style, [tmp_path / "none.png"])
    assert not list(library.folder.iterdir())


def test_a_style_of_the_user_takes_the_place_of_a_built_in_one(library):
    library.save(SavedStyle("Woodcut", "mine"))
    assert library.get("Woodcut").words == "mine" and not library.get("Woodcut").is_built_in


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "is empty; expected words"),
        ({"words": 3}, "words is 3"),
        ({"words": "x", "colour": 1}, "it has colour; expected words, negative, pictures, "),
        ({"words": "x", "lora": []}, "settings, perhaps loras for lora)"),
        ({"words": "x", "references": []}, "references of a LoRA are given beside a style"),
        ({"words": "x", "loras": ["a.safetensors"]}, "loras has 'a.safetensors'; expected a name"),
        ({"words": "x", "loras": "a.safetensors"}, "loras is 'a.safetensors'; expected a list"),
        ({"pictures": ["a.png"]}, "pictures has 'a.png'; expected a name"),
        ({"pictures": [["a.gif", 1]]}, "'a.gif'; expected a file beside it that ends in .png"),
        ({"words": "x", "settings": [8]}, "settings is [8]; expected names and numbers"),
        ({"words": "{prompt} {prompt}"}, "words has {prompt} several times"),
        ({"words": "x", "negative": "{prompt} {prompt}"}, "negative has {prompt} several times"),
        ({"words": "\ud83d"}, "words has half a character"),
        ({"pictures": [["../a.png", 1]]}, "it names the picture '../a.png'"),
        ({"pictures": [["a.png", -1]]}, "expected a name and a number from 0"),
        ({"pictures": [["a.png"]]}, "expected a name and a number"),
        ({"pictures": 3}, "cannot be read"),
        ({"loras": [["../../a.safetensors", 1]]}, "leads out of its folder"),
        ({"loras": [["/a.safetensors", 1]]}, "leads out of its folder"),
        ({"words": "x", "settings": {"steps": 0}}, "settings has steps: 0"),
        ({"words": "x", "settings": {"seed": 1}}, "settings has seed"),
        ({"words": "x", "picture_strength": 11}, "picture_strength is 11"),
    ],
)
def test_broken_styles_are_skipped_in_lists_and_refused_when_asked_for(library, entries, words):
    write(library, "Broken", **entries)
    found, (problem,) = library.styles()
    assert words in problem and "Mend" in problem and "Broken" not in {s.name for s in found}
    with pytest.raises(StyleError, match="Mend .*style.json"):
        library.get("Broken")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"x"'])
def test_files_that_are_no_styles(library, text):
    write(library, "Broken")
    (library.folder / "Broken" / "style.json").write_text(text)
    assert len(library.styles()[1]) == 1


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "x.", "con", "x" * 61, "a:b", 3])
def test_names_that_are_none(library, name):
    with pytest.raises(StyleError, match="name is"):
        SavedStyle(name, "words")
    with pytest.raises(StyleError, match="There is no style"):
        library.get(name)


def test_near_names_are_offered(library):
    with pytest.raises(StyleError, match=r"Did you mean Watercolour or .*\?"):
        library.get("watercolor")


def test_words_join_the_prompt_by_their_weight(library):
    write(library, "After", words="ink")
    write(library, "Around", words="a print of {prompt}, blue")
    mix = lambda **chosen: MixedStyle.of(chosen, library)  # noqa: E731
    assert mix(After=1).prompt("a fox.") == "a fox, ink"
    assert mix(After=0.7).prompt("a fox") == "a fox, (ink:0.7)"
    assert mix(After=0).prompt("a fox") == "a fox" and not mix(After=0).uses_weights
    assert mix(Around=1).prompt("a fox") == "a print of a fox, blue"
    assert mix(Around=0.5).prompt("a fox") == "(a print of:0.5) a fox, (blue:0.5)"
    assert mix(After=1, Around=1).prompt("a fox") == "a print of a fox, ink, blue"
    assert mix(After=1).prompt("") == "ink"


@pytest.mark.parametrize(
    "words", ["smile :) ink", "(ink", "(ink {prompt} paper)", "an \\(ink", ")("]
)
def test_brackets_without_a_partner_leave_the_weight_alone(words):
    found = parse_weights(MixedStyle(((SavedStyle("A", words), 0.5),)).prompt("fox"))
    assert (
        found.text == parse_weights(MixedStyle(((SavedStyle("A", words), 1),)).prompt("fox")).text
    )
    place = found.text.index("fox")
    # Commas and spaces between are at weight 1, as the prompt is.
    weights = found.weights[:place] + found.weights[place + 3 :]
    assert set(found.weights[place : place + 3]) == {1.0} and set(weights) <= {0.5, 1.0}
    assert weights.count(0.5) >= 2


def test_a_moodboard_is_its_styles(library):
    write(library, "Ink", words="ink", negative="colour", loras=[[NOTEBOOK, 0.8]])
    mixed = MixedStyle.of({"Ink": 0.5, RING: 0.4}, library)
    files = [path for path, _ in mixed.pictures()]
    board = library.save(mixed.as_one("Board"), files)
    one = MixedStyle.of({"Board": 1.0}, library)
    assert one.prompt("a fox") == mixed.prompt("a fox") == "a fox, (ink:0.5)"
    assert one.negative("x") == mixed.negative("x") == "x, colour"
    assert [(f, s) for _, f, s in one.loras()] == [(NOTEBOOK, 0.4)] and board.folder
    assert [w for _, w in one.pictures()] == [0.4] and one.picture_strength == 0.4


def test_a_moodboard_has_copies_of_the_loras_beside_its_styles(library):
    """Two of one name are both there, and one that lies elsewhere is named."""
    for name in ("A", "B"):
        folder = write(library, name, loras=[["own.safetensors", 1], [NOTEBOOK, 0.5]])
        (folder / "own.safetensors").write_text(name)
    board = library.save(MixedStyle.of({"A": 1, "B": 0.5}, library).as_one("Board"))
    assert [file for file, _ in board.loras] == [
        "own.safetensors", NOTEBOOK, "own-2.safetensors", NOTEBOOK
    ]  # fmt: skip
    first, second = (board.folder / board.loras[number][0] for number in (0, 2))
    assert (first.read_text(), second.read_text()) == ("A", "B")
    # The new files count where it takes the place of one of its parts.
    library.save(MixedStyle.of({"B": 1, "A": 1}, library).as_one("A"), replace=True)
    assert (library.folder / "A" / "own.safetensors").read_text() == "B"


def test_a_strength_of_zero_stays_zero(library, tmp_path):
    image = Image.new("RGB", (32, 32))
    style = MixedStyle(()).as_one("Off", more=1, strength=0.0)
    assert library.save(style, [image]).picture_strength == 0
    assert MixedStyle.of({"Off": 1}, library).as_one("Copy").picture_strength == 0


def test_pictures_that_could_not_be_used_are_not_saved(library):
    for size in ((15, 40), (4096, 16)):
        with pytest.raises(StyleError, match="expected at least 16 px a side"):
            library.save(SavedStyle("A", pictures=(("a.png", 1.0),)), [Image.new("RGB", size)])
    assert not list(library.folder.iterdir())


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (torch.full((3, 32, 32), float("nan")), "picture 2 has NaN or infinite values"),
        (torch.full((3, 32, 32), 2.0), "picture 2 has values from 2 to 2"),
        (np.full((32, 32, 3), -1.0), "picture 2 has values from -1 to -1"),
        (torch.zeros(3, 0, 32), "picture 2 has shape .*; expected at least one pixel"),
        (Image.fromarray(np.full((32, 32), np.inf, np.float32)), "picture 2 has NaN or infinite"),
        (Image.new("RGB", (0, 4)), "picture 2 is 0 x 4 px"),
        (5, "picture 2 is int; expected an image"),
    ],
)
def test_what_is_no_picture_is_named_and_not_saved(library, picture, words):
    style = SavedStyle("A", pictures=(("a.png", 1.0), ("b.png", 1.0)))
    with pytest.raises(StyleError, match=f"Style A: {words}"):
        library.save(style, [Image.new("RGB", (32, 32)), picture])
    with pytest.raises(StyleError, match="Style A: the thumbnail"):
        library.save(SavedStyle("A", "x"), thumbnail=picture)
    assert not list(library.folder.iterdir())


def test_pictures_are_saved_as_they_are_read(library, tmp_path):
    """White behind what is transparent, and as their EXIF says."""
    clear = Image.new("RGBA", (32, 48), (255, 0, 0, 0))
    clear.save(
        tmp_path / "a.png",
        exif=bytes.fromhex("4d4d002a00000008000101120003000000010006000000000000"),
    )
    saved = library.save(SavedStyle("A", pictures=(("a.png", 1.0),)), [tmp_path / "a.png"])
    kept = np.asarray(Image.open(saved.picture_paths()[0]))
    assert kept.shape == (32, 48, 3) and (kept == 255).all()


def test_a_library_that_cannot_be_read_or_written_says_so(library, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    write(library, "Mine", words="x")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", refuse)
        with pytest.raises(StyleError, match=r"styles cannot be written \(Permission denied\)"):
            library.save(SavedStyle("A", "x"))
        iterdir = Path.iterdir
        patch.setattr(Path, "iterdir", lambda path: (
            refuse() if path == library.folder else iterdir(path)))  # fmt: skip
        for call in (library.names, lambda: library.get("Woodcut")):
            with pytest.raises(StyleError, match="styles cannot be read .*--style-folder"):
                call()
        found, problems = library.styles()
        assert len(found) >= 12 and "cannot be read (Permission denied)" in problems[0]
    # One style of others' does not hide the rest.
    locked, is_file = write(library, "Locked", words="x") / "style.json", Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: refuse() if path == locked else is_file(path))
    stat = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **o: refuse() if path == locked else stat(path, **o)
    )
    found, problems = library.styles()
    assert "Mine" in {style.name for style in found}
    assert problems == [
        f"Style Locked cannot be read (Permission denied). Mend {locked}, or remove it."
    ]


def test_words_around_the_prompt_are_saved_as_they_are(library):
    for words in ("{prompt} in blue", "{prompt}, in blue", "{prompt}. In blue"):
        mixed = MixedStyle(((SavedStyle("A", words), 1.0),))
        saved = library.save(mixed.as_one("A"), replace=True)
        assert MixedStyle(((saved, 1.0),)).prompt("a fox") == mixed.prompt("a fox")


def test_strength_of_pictures_of_several_styles(library):
    for name, strength in (("A", 1.0), ("B", 0.5)):
        folder = write(library, name, pictures=[["a.png", 1]], picture_strength=strength)
        Image.new("RGB", (32, 32)).save(folder / "a.png")
    of = lambda **chosen: MixedStyle.of(chosen, library).picture_strength  # noqa: E731
    assert of(A=0.7) == 0.7 and of(A=0.6, B=0.4) == 0.8 and of(A=1, B=1) == 1.0 and of(B=2) == 1.0


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({}, "No style is chosen"),
        ("", "No style is chosen"),
        ({"Woodcut": 2.5}, "weight of style Woodcut is 2.5; expected 0"),
        ({"Woodcut": float("nan")}, "weight of style Woodcut is nan"),
        ([("Woodcut", 1), ("Woodcut", 1)], "chosen twice"),
        ({"Wood": 1}, "There is no style 'Wood'"),
        ("Woodcut: much", "styles has the line"),
        ("[3]", "styles is"),
        (5, "styles has 5; expected names and weights"),
        (["Woodcut"], "styles has 'Woodcut'; expected names and weights"),
        ([("Woodcut", 1, 2)], "expected names and weights"),
        ({5: 1}, "expected names and weights"),
    ],
)
def test_bad_choices(chosen, words):
    with pytest.raises(StyleError, match=words):
        MixedStyle.of(chosen)


def test_too_many_pictures(library):
    for name in ("A", "B"):
        folder = write(library, name, pictures=[[f"{n}.png", 1] for n in range(5)])
        for number in range(5):
            Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
    with pytest.raises(StyleError, match="A, B have 10 pictures together; expected at most 8"):
        MixedStyle.of({"A": 1, "B": 1}, library)
    (library.folder / "A" / "0.png").unlink()
    with pytest.raises(StyleError, match="0.png is not there"):
        MixedStyle.of({"A": 1}, library)


def test_choices_as_text():
    assert read_choice(" Ink wash: 0.7\n\nWoodcut\n") == [("Ink wash", 0.7), ("Woodcut", 1.0)]
    assert read_choice('{"Ink wash": 0.7}') == [("Ink wash", 0.7)]


def test_brackets_stay_brackets():
    assert parse_weights(escaped("a (red:1.4) \\(x\\) fox")).text == "a (red:1.4) (x) fox"


def test_the_folder_is_the_user_s(monkeypatch, tmp_path):
    assert default_folder() == tmp_path / "styles"
    monkeypatch.delenv("KREA2_STYLES")
    assert default_folder().parts[-2:] == ("krea2", "styles")


def test_words_and_loras_act_for_one_call(nano, library):
    """The picture is that of the words and the LoRA given by hand; the weights come back."""
    plain = nano("a red star", **SMALL)
    styled = nano("a red star", styles={"nano black ground": 1, "nano notebook": 0.8}, **SMALL)
    assert torch.equal(nano("a red star", **SMALL), plain)
    with nano.loras_for_now([(NOTEBOOK, 0.8)]):
        expected = nano("a red star, on a black background", **SMALL)
    assert torch.equal(styled, expected) and not torch.equal(styled, plain)
    nano.load_lora(NOTEBOOK, 0.3)
    try:
        below = nano("a red star", **SMALL)
        nano("a red star", styles={"nano notebook": 0.8}, **SMALL)
        assert torch.equal(nano("a red star", **SMALL), below) and "at 0.3" in repr(nano)
        assert "0.8" not in repr(nano)
    finally:
        nano.unload_lora()


def test_styles_of_nano_do_what_they_say(nano):
    options = {"seed": 1, "output_type": "pt"}
    dark = nano("a red star", styles={"nano black ground": 1}, **options)[0]
    assert dark[:, :16, :16].mean() < 0.2
    paper = nano("a red star on a white background", styles={"nano notebook": 1}, **options)[0]
    assert (paper[2] < paper[0] - 0.05).float().mean() > 0.3, "cream paper"
    ring = nano("a red star", styles={RING: 1}, **options)[0]
    ground = ring[:, :16, -16:].mean(dim=(1, 2))
    assert ground[0] > 0.8 and ground[2] < 0.4, "yellow ground"


def test_weights_and_brackets_of_prompts(nano):
    styles = {"nano black ground": 0.5}
    one = nano("a (red:1.4) star", styles=styles, **SMALL)
    two = nano("a \\(red:1.4\\) star, (on a black background:0.5)", prompt_weights=True, **SMALL)
    assert torch.equal(one, two)


def test_brackets_of_other_texts_stay_brackets_beside_weighted_words(nano):
    regions = [Region("a (blue:2) circle", (0, 0, 0.5, 1)), Region("a star", (0.5, 0, 0.5, 1))]
    texts = {"negative_prompt": "(green:2) ground", "guidance": 2}
    one = nano("x", styles={"nano black ground": 0.5}, regions=regions, **texts, **SMALL)
    regions[0] = Region("a \\(blue:2\\) circle", (0, 0, 0.5, 1))
    texts = {"negative_prompt": "\\(green:2\\) ground", "guidance": 2}
    prompt = "x, (on a black background:0.5)"
    two = nano(prompt, regions=regions, prompt_weights=True, **texts, **SMALL)
    assert torch.equal(one, two)


def test_brackets_of_tiles_stay_brackets_beside_weighted_words(nano):
    def enlarged(text):
        prompts = TilePrompts(False, [text, "a star", "a star", "a star"])
        return Upscale(2, parts="tiles", tile=64, overlap=0, prompts=prompts)

    options = SMALL | {"steps": 1, "start_image": torch.full((3, 64, 64), 0.5), "denoise": 0}
    tiles = TileSettings(64, 0.0, prompts=TilePrompts(False, ["a (blue:2) circle"]))
    one = nano("x", styles={"nano black ground": 0.5}, upscale=enlarged("(blue:2)"), **options)
    prompt = "x, (on a black background:0.5)"
    weighted = {"prompt_weights": True, **options}
    assert torch.equal(one, nano(prompt, upscale=enlarged("\\(blue:2\\)"), **weighted))
    assert not torch.equal(one, nano(prompt, upscale=enlarged("(blue:2)"), **weighted))
    one = nano("x", styles={"nano black ground": 0.5}, tiles=tiles, **SMALL)
    tiles = TileSettings(64, 0.0, prompts=TilePrompts(False, ["a \\(blue:2\\) circle"]))
    assert torch.equal(one, nano(prompt, tiles=tiles, prompt_weights=True, **SMALL))


def test_a_walk_in_a_style_has_styled_ends(nano):
    options = SMALL | {"styles": {"nano black ground": 1}}
    frames = list(nano.walk("a red star", "a blue circle", frames=2, **options))
    assert torch.equal(frames[1], nano("a blue circle", **options)[0])


def test_suggestions_give_way_to_arguments(nano, library):
    write(library, "S", words="blue", settings={"steps": 2, "width": 64, "height": 48})
    options = {"seed": 1, "output_type": "pt", "styles": {"S": 1}}
    assert nano("a star", **options).shape[2:] == (48, 64)
    assert nano("a star", height=64, width=64, **options).shape[2:] == (64, 64)
    # A picture that is there has a size, and half a size is not that of the style.
    options |= {"start_image": torch.rand(3, 80, 96), "denoise": 0.5}
    assert nano("a star", **options).shape[2:] == (80, 96)
    latents = nano.prepare_latents(1, height=80, width=96, seed=1)
    options = {"latents": latents, "output_type": "pt", "styles": {"S": 1}}
    assert nano("a star", **options).shape[2:] == (80, 96)
    assert nano("a star", width=64, styles={"S": 1})[0].size == (64, nano.preset.size)


def test_what_does_not_go_together(nano, library, tmp_path):
    from krea2_model import StyleTransfer

    with pytest.raises(StyleError, match="style gives pictures, and so do styles"):
        nano("x", styles={RING: 1}, style=StyleTransfer(Image.new("RGB", (32, 32))))
    with pytest.raises(ValueError, match="expected a PromptBlend"):
        nano("x", styles={RING: 1}, blend="y")
    with pytest.raises(StyleError, match="add words to a prompt"):
        nano(prompt_embeds=torch.zeros(1, 4, 12, 8), styles={RING: 1})
    write(library, "L", loras=[["none.safetensors", 1]])
    with pytest.raises(StyleError, match="L needs the LoRA none.safetensors, which is not there"):
        nano("x", styles={"L": 1})


pytest_nano = pytest.mark.usefixtures("nano_once")


@pytest_nano
def test_the_command_line(krea2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model", "nano", "--width", 64, "--height", 48, "--steps", 2]
    line = ["a star", *small, "--style", "nano notebook:0.8", "--style", f"{RING}:0.5"]
    (first,) = krea2(*line)
    (again,) = krea2("again", first, "--output", "b.png")
    assert first.read_bytes() == again.read_bytes()
    (plain,) = krea2("a star", *small, "--output", "plain.png")
    (words,) = krea2("a star", *small, "--style", "nano black ground", "--output", "words.png")
    (same,) = krea2("a star, on a black background", *small, "--output", "same.png")
    assert (np.asarray(Image.open(words)) == np.asarray(Image.open(same))).all()
    assert (np.asarray(Image.open(first)) != np.asarray(Image.open(plain))).any()
    kept = json.loads(read_texts(first)["krea2"])["settings"]
    assert kept["style"] == [["nano notebook", 0.8], [RING, 0.5]] and kept["prompt"] == "a star"
    (neighbour,) = krea2("vary", first, "--strength", 0, "--images", 1)
    assert (np.asarray(Image.open(neighbour)) == np.asarray(Image.open(first))).all()
    (folder,) = krea2("styles", "save", "Mine", "--from", first, "--words", "soft")
    assert (folder / "thumbnail.webp").is_file()
    krea2("styles", "save", "Board", "--style", "Mine:0.5", "--style", "Woodcut:0.4")
    assert "soft" in str(krea2("styles", "show", "Board")[1])
    assert any("Board" in str(line) for line in krea2("styles"))
    (other,) = krea2("a star", *small, "--style", "Board", "--output", "c.png")
    assert other.read_bytes() != first.read_bytes()


@pytest_nano
def test_without_weights_brackets_of_all_texts_stay_brackets_in_a_style(krea2, tmp_path):
    """Also where words of the style have a weight, which is read."""

    def picture(number, prompt, circle, *options):
        regions = [
            {"prompt": circle, "box": [0, 0, 0.5, 1]},
            {"prompt": "a star", "box": [0.5, 0, 0.5, 1]},
        ]
        (file,) = krea2(
            prompt, "--model", "nano", "--width", 64, "--height", 64, "--steps", 1, "--regions",
            json.dumps(regions), *options, "--output", tmp_path / f"{number}.png",
        )  # fmt: skip
        return np.asarray(Image.open(file))

    style = ["--style", "nano black ground:0.5"]
    found = picture(1, "x", "a (blue:2) circle", "--no-weights", *style)
    words = "x, (on a black background:0.5)"
    assert (found == picture(2, words, "a \\(blue:2\\) circle")).all()
    assert (found != picture(3, words, "a (blue:2) circle")).any()
    assert (picture(4, "x", "a (blue:2) circle", *style) != found).any()


@pytest_nano
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["x", "--style", "Wood"], "Did you mean Woodcut"),
        (["x", "--style", "Woodcut:3"], "expected a style and a weight from 0 to 2"),
        (["x", "--style", RING, "--style-image", "a.png"], "so does --style"),
        (["x", "--style", "L"], "Style L needs a LoRA: There is no file or folder none"),
        (["styles", "show"], "NAME is missing"),
        (["styles", "list", "--words", "x"], "--words goes with krea2 styles save NAME"),
        (["styles", "--from", "a.png"], "--from goes with krea2 styles save NAME"),
        (["styles", "show", "Woodcut", "--force"], "--force goes with krea2 styles save NAME"),
        (
            ["styles", "show", "Woodcut", "--style", "Woodcut"],
            "--style goes with krea2 styles save",
        ),
        (["styles", "list", "--lora", "a:1"], "--lora goes with krea2 styles save NAME"),
        (["styles", "list", "--reference", "a.png"], "--reference goes with krea2 styles save"),
        (["styles", "list", "--style-folder", "a file"], "a file cannot be read (Not a directory)"),
        (["styles", "show", "Woodcut", "--style-folder", "a file"], "cannot be read (Not a dir"),
        (["styles", "save", "A", "--words", "x", "--style-folder", "a file"], "expected a folder"),
        (
            ["styles", "save", "A", "--words", "x", "--style-folder", "a file/b"],
            "expected a folder",
        ),
        (["x", "--style", "Woodcut", "--style-folder", "a file"], "expected a folder of yours"),
        (["x", "--style-folder", "styles"], "--style-folder goes with --style;"),
        (["walk", "x", "y", "--style-folder", "styles"], "--style-folder goes with --style;"),
        (["grid", "x", "--x", "seed=1,2", "--style-folder", "s"], "--style-folder goes with"),
        (["render", "rows.txt", "--style-folder", "styles"], "--style-folder goes with"),
        (["x", "--wildcard-folder", "none"], "--wildcard-folder is none, which is no folder"),
        (["x", "--wildcard-folder", ".", "--no-wildcards"], "no wildcards are drawn"),
        (["styles", "save", "New"], "is empty"),
        (["styles", "save", "../New", "--words", "x"], "name is '../New'"),
        (["styles", "show", "Wood"], "There is no style 'Wood'"),
        (["styles", "save", "New", "--from", "none.png"], "none.png"),
    ],
)
def test_wrong_lines(krea2, library, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    write(library, "L", loras=[["none.safetensors", 1]])
    (tmp_path / "a file").write_text("no folder")
    (tmp_path / "rows.txt").write_text("a fox")
    model = [] if line[0] == "styles" else ["--model", "nano"]
    error = krea2(*line, *model, code=2)
    assert words in error and "loading" not in error
