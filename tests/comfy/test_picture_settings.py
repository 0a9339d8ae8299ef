"""Krea 2 Picture Settings: what krea2 and the page kept in a picture, checked before it is told."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from headless import ROOT
from in_process import NODES

NAMES = (
    *("prompt", "negative", "seed", "steps", "guidance", "shift", "mu", "width", "height"),
    *("sampler", "preset", "loras", "settings"),
)
STYLE = "krea2_nano_notebook_lora.safetensors"
SETTINGS = {
    "model": "nano-raw", "lora": [[STYLE, 0.5]], "prompt": "a red circle, größer",
    "negative": "blue", "width": 48, "height": 32, "steps": 5, "seed": 9, "mu": 0.7,
    "guidance": 1.5, "layer_weights": [1.0] * 11 + [2.0], "nag_scale": 2.0,
}  # fmt: skip
GRAPH = json.loads((ROOT / "tests/workflows/krea2_nano_first_image.json").read_text("utf-8"))


@pytest.fixture
def read(run):
    """The outputs for a picture of the input folder, by name."""
    return lambda name: dict(zip(NAMES, run("K2PictureSettings", image=name), strict=True))


@pytest.fixture
def keep(base, pack):
    """Write a picture with texts into the input folder; its name."""
    save = pack("krea2_model.images.output_files").save_image
    made = []

    def call(texts, ending="png"):
        made.append(base / "input" / f"kept{len(made)}.{ending}")
        save(Image.new("RGB", (64, 40)), made[-1], texts)
        return made[-1].name

    yield call
    for path in made:
        path.unlink()


@pytest.fixture
def from_krea2(keep, pack):
    texts = {"krea2": pack("krea2_model.cli.settings").as_json(SETTINGS)}
    return lambda ending="png": keep(texts, ending)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_of_krea2(read, from_krea2, ending):
    found = read(from_krea2(ending))
    text = found.pop("settings")
    assert found == {
        "prompt": "a red circle, größer", "negative": "blue", "seed": 9, "steps": 5,
        "guidance": 1.5, "shift": "fixed", "mu": 0.7, "width": 48, "height": 32,
        "sampler": "euler", "preset": "custom", "loras": f"{STYLE}:0.5",
    }  # fmt: skip
    lines = text.splitlines()
    assert {"negative: blue", "nag_scale: 2", f"lora: {STYLE}:0.5"} <= set(lines)
    assert lines[0] == "a red circle, größer" and lines[-1] == "picture: 64 x 40 px"


def test_a_picture_of_the_page(read, keep):
    graph = json.loads(json.dumps(GRAPH))
    (sampler,) = [n["inputs"] for n in graph.values() if n["class_type"] == "K2Sampler"]
    sampler |= {"sampler": "dpmpp_2m", "shift": "by size", "denoise": 0.6, "seed": 7}
    found = read(keep({"prompt": json.dumps(graph)}))
    assert (found["sampler"], found["shift"], found["preset"]) == ("dpmpp_2m", "by size", "auto")
    assert (found["seed"], found["steps"], found["guidance"]) == (7, 28, 4.5)
    assert (found["width"], found["height"], found["loras"]) == (128, 128, "")
    assert "denoise: 0.6" in found["settings"].splitlines()


def shown(name):
    return NODES["K2PictureSettings"].execute(image=name).ui["k2_settings"][0]["nodes"]


def test_nodes_for_the_page_are_those_before_the_sampler(from_krea2, keep):
    """In their order, loaders first: so several LoRAs are told apart."""
    nodes = shown(from_krea2())
    assert [node["type"] for node in nodes] == [
        "K2Loader", "K2LoraLoader", "K2TextEncode", "K2NegativeGuidance", "K2TapWeights",
        "K2EmptyLatent", "K2Sampler",
    ]  # fmt: skip
    values = {node["type"]: node["values"] for node in nodes}
    assert values["K2Loader"]["model"] == "krea2-nano Raw (built in)"
    assert values["K2LoraLoader"]["strength"] == 0.5 and "model" not in values["K2LoraLoader"]
    assert values["K2Sampler"]["steps"] == 5 and values["K2Sampler"]["mu"] == 0.7
    types = [node["type"] for node in shown(keep({"prompt": json.dumps(GRAPH)}))]
    assert types == ["K2Loader", "K2TextEncode", "K2EmptyLatent", "K2Sampler"]


def test_settings_that_no_graph_has_are_told_all_the_same(keep, read, pack):
    settings = SETTINGS | {"style_image": ["style.png"]}
    name = keep({"krea2": pack("krea2_model.cli.settings").as_json(settings)})
    assert "style_image: style.png" in read(name)["settings"] and shown(name) == []
    # Pairs are as they are typed.
    settings |= {"vary": [[6, 0.25], [7, 1 / 3]], "style": [["Ink wash", 0.5], ["Woodcut", 1]]}
    settings |= {"blend": "a star", "blend_share": 0.25}
    lines = read(keep({"krea2": pack("krea2_model.cli.settings").as_json(settings)}))["settings"]
    assert {
        f"vary: 6:0.25, 7:{1 / 3!r}", "style: Ink wash:0.5, Woodcut:1", "blend: a star",
        "blend_share: 0.25",
    } <= set(lines.splitlines())  # fmt: skip
    # Of a picture without all of them, the rest is what the inputs have.
    name = keep({"krea2": '{"settings": {"prompt": "a star", "model": "nano"}}'})
    found = read(name)
    assert (found["preset"], found["steps"], found["shift"]) == ("auto", 28, "auto")
    assert (found["width"], found["height"]) == (64, 40) and shown(name) == []


REFUSED = {
    "nothing": ({}, "holds no settings"),
    "another graph": ({"prompt": '{"1": {"class_type": "KSampler", "inputs": {}}}'},
                      "has 0 Krea 2 Sampler nodes; expected one. Drop the picture on the page"),
    "no json": ({"krea2": "{"}, "cannot be read"),
    "no text": ({"krea2": '{"settings": {"prompt": 5}}'}, "its prompts are no texts"),
    "no number": ({"krea2": '{"settings": {"prompt": "a", "steps": "x"}}'}, "are wrong"),
    "path": ({"krea2": '{"settings": {"prompt": "a", "lora": [["../x", 1]]}}'}, "names the file"),
    "sampler": ({"prompt": json.dumps({
        "1": {"class_type": "K2Sampler", "inputs": {
            "sampler": "x", "latent": ["2", 0], "positive": ["3", 0], "model": ["4", 0]}},
        "2": {"class_type": "K2EmptyLatent", "inputs": {"aspect": "custom"}},
        "3": {"class_type": "K2TextEncode", "inputs": {"prompt": "a"}},
        "4": {"class_type": "K2Loader", "inputs": {"model": "a"}}})}, "are wrong: sampler is x."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_pictures_of_strangers_are_refused(keep, read, base, case):
    texts, message = REFUSED[case]
    name = keep(texts)
    verdict = NODES["K2PictureSettings"].validate_inputs(image=name)
    assert verdict is not True and message in verdict and str(base) not in verdict
    with pytest.raises(ValueError) as raised:
        read(name)
    assert message in str(raised.value)


def test_what_is_no_picture_is_refused(base, read):
    file = base / "input" / "text.png"
    file.write_text("no picture")
    try:
        with pytest.raises(ValueError, match="text.png cannot be read as a picture"):
            read(file.name)
    finally:
        file.unlink()


def test_the_list_and_the_names_of_the_page(keep, read, base, pack):
    texts = {"krea2": pack("krea2_model.cli.settings").as_json(SETTINGS)}
    name = keep(texts)
    (entry,) = NODES["K2PictureSettings"].define_schema().inputs
    assert name in entry.options and entry.upload.value == "image_upload"
    # As Load Image writes pasted pictures, and those of folders.
    assert read(f"{name} [input]")["seed"] == 9
    folder = base / "input" / "pasted"
    folder.mkdir()
    (base / "input" / name).rename(folder / name)
    assert read(f"pasted/{name}")["seed"] == read(f"pasted\\{name}")["seed"] == 9
    (folder / name).rename(base / "input" / name)
    folder.rmdir()


def test_another_picture_of_the_name_is_read_again(keep, base):
    node, prints = NODES["K2PictureSettings"], set()
    name = keep({"krea2": "{}"})
    prints.add(node.fingerprint_inputs(image=name))
    chunks = PngInfo()
    chunks.add_text("krea2", json.dumps({"settings": SETTINGS}))
    Image.new("RGB", (8, 8)).save(base / "input" / name, pnginfo=chunks)
    prints.add(node.fingerprint_inputs(image=name))
    assert len(prints) == 2 and None not in prints
