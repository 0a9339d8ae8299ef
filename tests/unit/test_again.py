"""Settings inside pictures, and pictures made again by them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from krea2_model import nano
from krea2_model.cli.graph import graph_of, not_in_graph, settings_of_graph
from krea2_model.images.picture_texts import read_texts, save_options

STYLE = "krea2_nano_notebook_lora.safetensors"
OPTIONS = [
    "a (red:1.2) {circle|star}, größer", "--model", "nano-raw", "--steps", "2", "--guidance", "1.5",
    "--negative", "blue", "--seed", "5", "--width", "48", "--height", "32", "--lora",
    f"{nano.LORA}:0.5", "--guidance-end", "0.9", "--guidance-rescale", "0.5", "--mu", "0.7",
    "--max-sequence-length", "40", "--nag-scale", "2", "--layer-weights", "1,1,1,1,1,1,1,1,1,1,1,2",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("nano_once")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_a_picture_is_made_again_from_its_file(krea2, tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    first, second = krea2(*OPTIONS, "--images", 2, "--output", f"a.{ending}")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    (again,) = krea2("again", tmp_path / second, "--output", f"b.{ending}")
    assert again.read_bytes() == (tmp_path / second).read_bytes() != (tmp_path / first).read_bytes()
    (other,) = krea2("again", again, "--seed", 5, "--output", f"c.{ending}")
    same_prompt = settings(again)["prompt"] == settings(tmp_path / first)["prompt"]
    assert (pixels(other) == pixels(tmp_path / first)).all() == same_prompt
    (plain,) = krea2("again", again, "--output", f"d.{ending}", "--no-metadata")
    assert not read_texts(plain) and (pixels(plain) == pixels(again)).all()
    assert "holds no settings" in krea2("again", plain, code=2)


def test_a_picture_in_the_style_of_another_again(krea2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32), "orange").save("style.png")
    words = ["a blue star", "--model", "nano", "--width", 48, "--height", 32, "--steps", 2]
    style = ["--style-image", "style.png", "--style-strength", 0.8, "--style-end", 1]
    (plain,) = krea2(*words, "--output", "plain.png")
    (first,) = krea2(*words, *style, "--output", "a.png")
    (again,) = krea2("again", first, "--output", "b.png")
    assert (pixels(again) == pixels(first)).all() and (pixels(first) != pixels(plain)).any()
    assert settings(again)["style_image"] == ["style.png"]
    assert "prompt" not in read_texts(first), "no graph has the file"


def test_a_picture_with_regions_again(krea2, tmp_path, monkeypatch):
    """The picture holds them: their file may go, not those that they name."""
    folder = tmp_path / "pictures"
    (folder / "lists").mkdir(parents=True)
    monkeypatch.chdir(folder)
    Image.linear_gradient("L").resize((48, 32)).save("mask.png")
    regions = [
        {"prompt": "a red circle", "box": [0, 0, 0.5, 1], "loras": [[STYLE, 0.5]]},
        {"prompt": "a blue star", "mask": str(folder / "mask.png"), "soft": 0.1},
    ]
    file = folder / "lists" / "regions.json"
    file.write_text(json.dumps({"regions": regions, "separate": 0.2}), encoding="utf-8")
    words = ["--model", "nano", "--width", 48, "--height", 32, "--steps", 1]
    (first,) = krea2("", *words, "--regions", file, "--output", "a.png")
    kept = settings(first)["regions"]
    assert kept["regions"][1]["mask"] == "mask.png" and kept["separate"] == 0.2
    file.unlink()
    monkeypatch.chdir(tmp_path)
    (again,) = krea2("again", folder / first, "--output", "b.png")
    assert again.read_bytes() == (folder / first).read_bytes()
    (plain,) = krea2("", *words, "--regions", '[{"prompt": "x", "box": "background"}]')
    assert (pixels(plain) != pixels(again)).any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none.json", "--regions is none.json, which is not there"),
        ("[{]", "regions cannot be read"),
        ("[]", "There are no regions; expected 1 to 8"),
        ('[{"prompt": "x", "box": [0.6, 0, 0.6, 1]}]', "Region 1's box lies outside"),
        ('[{"prompt": "x", "mask": "none.png"}]', "There is no file or folder none.png"),
        ('[{"prompt": "x", "box": [0, 0, 1, 1], "loras": [["none", 1]]}]', "folder none"),
    ],
)
def test_bad_regions_are_refused_before_loading(krea2, text, words):
    error = krea2("a fox", "--model", "nano", "--regions", text, code=2)
    assert words in error and "loading" not in error


def settings(path):
    return json.loads(read_texts(path)["krea2"])["settings"]


def test_options_replace_those_of_the_picture(krea2, tmp_path):
    (first,) = krea2(*OPTIONS, "--output", tmp_path / "a.png")
    words = ["--steps", 1, "--lora", nano.REFERENCE_LORA, "--prompt", "a {green} star"]
    (second,) = krea2("again", first, *words, "--output", tmp_path / "b.png")
    expected = settings(first) | {"steps": 1, "prompt": "a green star"}
    assert settings(second) == expected | {"lora": [[nano.REFERENCE_LORA.name, 1.0]]}
    # Another model brings its own steps and guidance.
    (third,) = krea2("again", first, "--model", "nano", "--output", tmp_path / "c.png")
    found = settings(third)
    assert (found["model"], found["steps"], found["guidance"]) == ("nano", 8, 0.0)


def test_the_texts_hold_no_folders(krea2, tmp_path):
    (path,) = krea2(*OPTIONS, "--output", tmp_path / "a.png")
    texts = read_texts(path)
    assert not [text for text in texts.values() if str(nano.FOLDER) in text or "/" in text]
    lines = texts["parameters"].splitlines()
    assert lines[0].startswith("a (red:1.2) ") and lines[0].endswith(", größer")
    assert lines[1] == "Negative prompt: blue"
    assert lines[2].startswith(
        "Steps: 2, Sampler: Euler, CFG scale: 2.5, Seed: 5, Size: 48x32, Model: krea2-nano-raw, "
        "Loras: krea2_nano_notebook_lora:0.5, Version: Krea 2 Kit "
    )
    graph = json.loads(texts["prompt"])
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds == [
        "K2Loader", "K2LoraLoader", "K2TextEncode", "K2TapWeights", "K2GuidanceSchedule",
        "K2NegativeGuidance", "K2EmptyLatent", "K2Sampler", "K2VAEDecode", "SaveImage",
    ]  # fmt: skip
    # ComfyUI's page reads tags of the first directory of a WebP as "name:text".
    (webp,) = krea2(*OPTIONS, "--output", tmp_path / "a.webp")
    tags = Image.open(webp).getexif()
    assert json.loads(tags[0x0110].removeprefix("prompt:")) == graph


FULL = {
    "transformer": "krea2_raw_bf16.safetensors", "text_encoder": "qwen/qwen3vl.safetensors",
    "vae": "vae.safetensors", "prompt": "a fox", "negative": "snow", "weights": False,
    "layer_weights": [1.0] * 11 + [2.0], "width": 1344, "height": 768, "steps": 20, "seed": 9,
    "mu": 0.8, "evaluate_every": 3, "guidance": 4.0, "guidance_start": 0.1, "guidance_end": 0.9,
    "guidance_ramp": "hill", "guidance_rescale": 0.3, "nag": True, "nag_scale": 5.0,
    "nag_blend": 0.5, "nag_limit": 3.0, "nag_start": 0.1, "nag_end": 0.8,
    "max_sequence_length": 512, "lora": [["style.safetensors", 0.5], [STYLE, -1.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"max_sequence_length": 100}, {"model": "nano", "transformer": None,
                "text_encoder": None, "vae": None}],
)  # fmt: skip
def test_a_graph_gives_the_settings_it_was_made_of(changes):
    full = {name: v for name, v in (FULL | changes).items() if v is not None}
    assert not_in_graph(full) == []
    assert settings_of_graph(graph_of(full)) == full


def test_what_no_graph_expresses_is_named():
    extra = {"start_image": "a.png", "reference": ["b.png"], "evaluate_every": 4}
    assert not_in_graph(FULL | extra) == ["--start-image", "--reference", "--evaluate-every"]


@pytest.mark.parametrize(
    "name", ["nano_first_image", "lora", "turbo_negative", "raw_faster", "styles"]
)
def test_graphs_of_the_templates_are_understood(name):
    root = Path(__file__).resolve().parents[1] / "workflows" / f"krea2_{name}.json"
    found = settings_of_graph(json.loads(root.read_text(encoding="utf-8")))
    assert found["prompt"] and ("model" in found or "transformer" in found)


@pytest.mark.parametrize(
    "name", ["inpaint", "raw_then_turbo", "image_to_image", "stock_nodes", "upscale"]
)
def test_graphs_that_no_options_express_are_refused(name, krea2, tmp_path):
    root = Path(__file__).resolve().parents[1] / "workflows" / f"krea2_{name}.json"
    chunks = PngInfo()
    chunks.add_text("prompt", root.read_text(encoding="utf-8"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    error = krea2("again", tmp_path / "a.png", code=2)
    assert "The graph in the picture has" in error and error.count("\n") == 1


SIZE = {"aspect": "custom", "width": 48, "height": 32}


def keep_graph(path, **nodes):
    """A picture with a graph from a loader to a sampler, with Krea 2 Styles between them."""
    styles = {"prompt": " a star ", "styles": "Bold: 0.333333333\nPixel art", "model": ["load", 0]}
    sampler = {"model": ["style", 0], "positive": ["style", 1], "latent": ["size", 0], "seed": 3}
    graph = {
        "load": ("K2Loader", {"model": "krea2-nano (built in)", "dtype": "fp32"}),
        "style": ("K2Styles", styles), "size": ("K2EmptyLatent", SIZE),
        "sample": ("K2Sampler", sampler), **nodes,
    }  # fmt: skip
    chunks = PngInfo()
    graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
    chunks.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (48, 32)).save(path, pnginfo=chunks)
    return path


def test_a_graph_with_styles_again(krea2, tmp_path, monkeypatch):
    monkeypatch.setenv("KREA2_STYLES", str(tmp_path))
    (tmp_path / "Bold").mkdir()
    entries = {"words": "bold", "loras": [[STYLE, 1]], "settings": {"steps": 2, "width": 64}}
    (tmp_path / "Bold" / "style.json").write_text(json.dumps(entries))
    (again,) = krea2("again", keep_graph(tmp_path / "a.png"), "--output", tmp_path / "b.png")
    found = settings(again)
    assert (found["prompt"], found["seed"]) == ("a star", 3)
    assert found["style"] == [["Bold", 0.333333333], ["Pixel art", 1.0]]
    # What a style suggests is for new pictures: the node leaves this to the checkpoint.
    assert (found["steps"], found["width"], found["height"]) == (8, 48, 32)
    (other,) = krea2("again", again, "--style", "Bold", "--output", tmp_path / "c.png")
    assert settings(other)["steps"] == 8
    monkeypatch.setenv("KREA2_STYLES", str(tmp_path / "another"))
    assert "--style-folder FOLDER" in krea2("again", again, code=2)
    krea2("again", again, "--style-folder", tmp_path, "--output", tmp_path / "d.png")
    assert (pixels(tmp_path / "d.png") == pixels(again)).all()


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({"load": ("K2LoraLoader", {"lora": "a", "model": ["load", 0]})}, "goes in a circle"),
        ({"sample": ("K2Sampler", {"model": ["load", 0], "positive": ["style", 1],
                                   "latent": ["size", 0]})}, "different nodes Krea 2 Styles"),
        ({"style": ("K2Styles", {"prompt": "a", "styles": ["b", 0], "model": ["load", 0]})},
         "The styles in the picture come from another node"),
        ({"fix": ("K2VAEDecode", {"samples": ["sample", 0]}),
          "more": ("K2Detailer", {"image": ["fix", 0], "denoise": 0.4})}, "Krea 2 Detailer 0.4"),
    ],
)  # fmt: skip
def test_graphs_that_only_look_as_if_are_refused(krea2, tmp_path, nodes, words):
    error = krea2("again", keep_graph(tmp_path / "a.png", **nodes), code=2)
    assert words in error and "Open the picture in ComfyUI" in error


def test_a_graph_of_another_branch_does_not_count(tmp_path):
    other = ("K2Upscale", {"image": ["photo", 0], "scale": 2.0})
    path = keep_graph(tmp_path / "a.png", more=other)
    assert settings_of_graph(json.loads(read_texts(path)["prompt"]))["prompt"] == "a star"


HOSTILE = [
    "no json", "[]", "{}", '{"settings": 5}', '{"settings": {"prompt": ["a"], "steps": "x"}}',
    '{"settings": {"model": "nano", "prompt": "a", "lora": 5}}',
    '{"settings": {"model": "nano", "prompt": "a", "lora": [["a", "b"]]}}',
    '{"settings": {"model": "../../secret", "prompt": "a"}}',
    '{"settings": {"model": "/etc/passwd", "prompt": "a"}}',
    '{"settings": {"model": "C:\\\\\\\\secret", "prompt": "a"}}',
    '{"settings": {"model": "nano", "prompt": "a", "start_image": "../a.png"}}',
    '{"settings": {"model": "nano", "prompt": "a", "lora": [["~/a.safetensors", 1]]}}',
    '{"settings": {"model": "nano", "prompt": "a", "regions": [{"mask": "../a.png"}]}}',
    '{"settings": {"model": "nano", "prompt": "a", "guidance_ramp": {"a": 1}}}',
    '{"settings": ' + "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["krea2", "prompt"])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_settings_of_strangers_are_refused(krea2, tmp_path, kind, text):
    chunks = PngInfo()
    if kind == "prompt" and text.startswith('{"settings": {'):
        inputs = json.loads(text)["settings"]
        node = {"class_type": "K2Sampler", "inputs": {"latent": ["2", 0], **inputs}}
        latent = {"class_type": "K2EmptyLatent", "inputs": {"aspect": 5}}
        text = json.dumps({"1": node, "2": latent})
    chunks.add_text(kind, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    error = krea2("again", tmp_path / "a.png", "--output", tmp_path / "b.png", code=2)
    assert error.startswith("krea2: error: ") and error.count("\n") == 1
    assert not (tmp_path / "b.png").exists()
    if kind == "krea2" and any(mark in text for mark in ("../", "/etc", "C:", "~/")):
        assert "expected a name without a folder above it" in error


def test_files_are_found_beside_the_picture(krea2, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.effect_noise((48, 32), 90).convert("RGB").save(folder / "start.png")
    shutil.copyfile(nano.LORA, folder / "mine.safetensors")
    monkeypatch.chdir(folder)
    words = ["--start-image", "start.png", "--denoise", 0.5, "--lora", "mine.safetensors"]
    (first,) = krea2("a star", "--model", "nano", "--steps", 1, *words, "--output", "a.png")
    assert "prompt" not in read_texts(first)
    monkeypatch.chdir(tmp_path)
    (again,) = krea2("again", folder / first, "--output", "b.png")
    assert again.read_bytes() == (folder / first).read_bytes()
    (folder / "start.png").unlink()
    assert "--start-image is start.png, which is not there" in krea2("again", again, code=2)


def test_an_inpainted_picture_again(krea2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "yellow").save("start.png")
    Image.new("L", (32, 24), "white").save("mask.png")
    words = ["--model", "nano", "--steps", 1, "--start-image", "start.png", "--mask", "mask.png"]
    krea2("a star", *words, "--mask-grow", 3, "--mask-hard", "--output", "a.png")
    krea2("again", "a.png", "--output", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert Image.open("a.png").size == (64, 48)
    assert "give --start-image" in krea2("a star", "--model", "nano", *words[-2:], code=2)
    assert "leave --width" in krea2("a star", *words, "--width", 64, "--height", 48, code=2)


def test_a_jpeg_leaves_out_what_it_has_no_room_for():
    texts = {"krea2": "a" * 30_000, "parameters": "b" * 10_000, "prompt": "c" * 60_000}
    options, left_out = save_options("JPEG", texts)
    assert left_out == ["prompt"] and len(options["exif"]) < 65_536
    assert save_options("BMP", texts) == ({}, ["krea2", "parameters", "prompt"])
    assert save_options("PNG", {}) == ({}, [])
