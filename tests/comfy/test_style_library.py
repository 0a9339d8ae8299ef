"""Krea 2 Styles and Save a Krea 2 Style: the library, its routes, and what styles do."""

import asyncio
import json
import re

import pytest
import torch
from PIL import Image

from in_process import NODES

SMALL = {"aspect": "custom", "width": 64, "height": 64}
RING, NOTEBOOK = "nano yellow ring", "krea2-nano notebook (built in)"


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model="krea2-nano (built in)")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path / "krea2_styles"


@pytest.fixture
def painted(run, nano):
    def call(model, positive):
        latent = run("K2EmptyLatent", **SMALL)[0]
        options = {"preset": "custom", "steps": 3, "guidance": 0.0, "seed": 3}
        options |= {"model": model, "positive": positive, "latent": latent}
        return run("K2Sampler", **options)[0]["samples"]

    return call


def styles(run, nano, text, **options):
    options = {"prompt": "a red star", "vae": nano[2]} | options
    return run("K2Styles", model=nano[0], clip=nano[1], styles=text, **options)


def test_words_loras_and_pictures_are_those_of_the_nodes_by_hand(run, nano, painted, pack):
    model, positive, _, report, prompt = styles(
        run, nano, f"nano black ground: 0.5\nnano notebook: 0.8\n{RING}: 0.6"
    )
    assert prompt == "a red star, (on a black background:0.5)"
    assert "nano notebook 0.8: LoRA" in report and f"{RING} 0.6: 1 picture" in report
    by_hand = run("K2LoraLoader", model=nano[0], clip=nano[1], lora=NOTEBOOK, strength=0.8,
                  clip_strength=0.8)  # fmt: skip
    file = pack("krea2_model.features.style_library").BUILT_IN / RING / "picture-1.png"
    image = pack("krea2_model.images.pictures").pixels_of(file, "it").movedim(0, -1)[None]
    other = run(
        "K2StyleTransfer", model=by_hand[0], vae=nano[2], clip=by_hand[1], image=image, strength=0.6
    )[0]
    text = run("K2TextEncode", clip=by_hand[1], prompt=prompt)[0]
    assert torch.equal(painted(model, positive), painted(other, text))
    plain = run("K2TextEncode", clip=nano[1], prompt="a red star")[0]
    assert not torch.equal(painted(model, positive), painted(nano[0], plain))


def test_a_style_is_saved_and_used(run, nano, folder):
    image = torch.rand(2, 40, 60, 3)
    (name,) = run("K2SaveStyle", name="Dots", words="dots", images=image, lora=NOTEBOOK,
                  lora_strength=0.5, negative="blue", picture_strength=0.7)  # fmt: skip
    assert name == "Dots" and (folder / "Dots" / "thumbnail.webp").is_file()
    with Image.open(folder / "Dots" / "picture-2.png") as kept:
        assert kept.size == (60, 40)
    *_, report, prompt = styles(run, nano, name)
    assert prompt == "a red star, dots" and "2 pictures at 0.7" in report
    with pytest.raises(ValueError, match="There is a style Dots"):
        run("K2SaveStyle", name="Dots", words="other")
    run("K2SaveStyle", name="Dots", words="other", replace=True)
    assert styles(run, nano, "Dots")[-1] == "a red star, other"


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.full((1, 32, 32, 3), float("nan")), "Image 1 of {} has NaN or infinite values"),
        (torch.stack([torch.zeros(32, 32, 3), torch.full((32, 32, 3), 7.0)]), "has values from"),
        (torch.zeros(1, 0, 32, 3), "Image 1 of {} has shape"),
        (torch.zeros(0, 32, 32, 3), "{} has no image"),
        (torch.zeros(1, 32, 32, 1), "Image 1 of {} is .1, 32, 32.; expected an image"),
    ],
)
def test_what_is_no_picture_is_not_saved(run, folder, images, words):
    with pytest.raises(ValueError, match=words.format("images")):
        run("K2SaveStyle", name="A", words="x", images=images)
    with pytest.raises(ValueError, match=words.format("thumbnail")):
        run("K2SaveStyle", name="A", words="x", thumbnail=images)
    assert not folder.exists()


def test_a_moodboard_is_saved_from_styles_and_own_words(run, nano, folder):
    shown = torch.zeros(1, 16, 16, 3)
    lines = f"nano black ground: 0.5\nnano notebook: 0.5\n{RING}: 0.4"
    run("K2SaveStyle", name="Board", words="soft", styles=lines, images=shown, thumbnail=shown)
    *_, report, prompt = styles(run, nano, "Board")
    assert prompt == "a red star, (on a black background:0.5), soft"
    assert "2 pictures" in report and "LoRA krea2_nano_notebook_lora.safetensors:0.5" in report


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "No style is chosen; click one"),
        ("Wood: 1", "There is no style 'Wood'.* Did you mean Woodcut"),
        ("Woodcut: 3", "weight of style Woodcut is 3.0; expected 0"),
        ("Woodcut: x", "styles has the line"),
        ("Lost", "Style Lost needs a LoRA. There is no 'none.safetensors' in models/loras"),
    ],
)
def test_bad_styles_are_refused_before_the_run(run, nano, folder, text, words):
    (folder / "Lost").mkdir(parents=True)
    (folder / "Lost" / "style.json").write_text('{"loras": [["none.safetensors", 1]]}')
    assert re.search(words, NODES["K2Styles"].validate_inputs(styles=text))
    with pytest.raises(ValueError, match=words):
        styles(run, nano, text)


def test_pictures_need_the_vae(run, nano):
    with pytest.raises(ValueError, match="has pictures, whose style needs the VAE"):
        styles(run, nano, RING, vae=None)
    assert NODES["K2Styles"].validate_inputs(styles=RING) is True


@pytest.mark.parametrize("name", ["../x", "a/b", "", "con"])
def test_names_that_lead_elsewhere_are_refused(run, folder, name):
    with pytest.raises(ValueError, match="style's name is"):
        run("K2SaveStyle", name=name, words="x")
    assert not folder.exists() or not list(folder.iterdir())


def test_a_changed_style_runs_again(run, folder):
    run("K2SaveStyle", name="A", words="one")
    before = NODES["K2Styles"].fingerprint_inputs(styles="A")
    assert before == NODES["K2Styles"].fingerprint_inputs(styles="A") is not None
    run("K2SaveStyle", name="A", words="another", replace=True)
    assert NODES["K2Styles"].fingerprint_inputs(styles="A") != before


class Request:
    def __init__(self, **query):
        self.query = query


def test_the_page_gets_names_and_thumbnails(run, pack, folder):
    from aiohttp import web

    routes = pack("nodes.style_routes")
    run("K2SaveStyle", name="Mine", words="x", thumbnail=torch.zeros(1, 16, 16, 3))
    (folder / "Broken").mkdir()
    (folder / "Broken" / "style.json").write_text("{")
    answer = json.loads(asyncio.run(routes.list_styles(Request())).body)
    mine = next(style for style in answer["styles"] if style["name"] == "Mine")
    assert mine["summary"] == "x" and not mine["built_in"] and mine["thumbnail"]
    assert "Broken" in answer["problems"][0] and len(answer["styles"]) > 12
    shown = asyncio.run(routes.show_thumbnail(Request(name="Mine")))
    assert shown.content_type == "image/webp" and shown.body[:4] == b"RIFF"
    secret = folder.parent / "thumbnail.webp"
    secret.write_bytes(b"secret")
    (folder / "Mine" / "thumbnail.webp").unlink()
    (folder / "Mine" / "thumbnail.webp").symlink_to(secret)
    for name in ("Mine", "..", "../krea2_styles/Mine", "", str(folder), "none"):
        with pytest.raises(web.HTTPNotFound):
            asyncio.run(routes.show_thumbnail(Request(name=name)))
