"""The graph in a picture of the command line makes that picture again, in ComfyUI."""

import io
import json
import os
from functools import cache

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from conftest import COMFYUI

CASES = {
    "turbo": ["a (red:1.3) circle", "--model", "nano", "--seed", "7", "--steps", "3"],
    "turbo with a negative": [
        "a red circle", "--model", "nano", "--steps", "3", "--nag", "--negative", "a blue star",
        "--layer-weights", "1,1,1,1,1,1,1,1,1,1,1,2",
    ],
    "neighbour of a neighbour": [
        "a (red:1.3) circle", "--model", "nano", "--seed", "7", "--steps", "3", "--vary", "9:0.3",
        "--vary", "11:0.333333333", "--lora", "krea2_nano_notebook_lora.safetensors:0.123456789",
    ],
    "raw": [
        "a red circle", "--model", "nano-raw", "--steps", "5", "--guidance", "2", "--negative",
        "green", "--guidance-end", "0.8", "--evaluate-every", "2", "--mu", "0.9",
        "--lora", "krea2_nano_notebook_lora.safetensors:0.8", "--width", "144",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def make(pack, tmp_path_factory):
    """Make a picture of a case; its pixels, its graph and its file."""
    folder = tmp_path_factory.mktemp("pictures")

    @cache
    def call(case, ending="png"):
        path = folder / f"{case}.{ending}"
        os.environ["COMFYUI_PATH"] = str(COMFYUI)
        main = pack("krea2_model.cli.main").main
        assert main([*CASES[case], "--output", str(path), "--quiet", "--force"]) == 0
        texts = pack("krea2_model.images.picture_texts").read_texts(path)
        return np.asarray(Image.open(path)).astype(int), json.loads(texts["prompt"]), path

    return call


def outputs_of(run, graph):
    """The outputs of the nodes of a graph, which are in the order in which they need each other."""
    results = {}
    for key, node in graph.items():
        if node["class_type"] == "SaveImage":
            continue
        inputs = {
            name: results[value[0]][value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        results[key] = run(node["class_type"], **inputs)
    return results


@pytest.mark.parametrize("case", CASES)
def test_the_graph_makes_the_picture(run, make, case):
    """Sums are of another order, so a value at the edge of rounding may be the next one."""
    pixels, graph, _ = make(case)
    results = outputs_of(run, graph)
    (image,) = results[str(len(graph) - 1)][0]
    found = (image.numpy() * 255).round().astype(int)
    assert np.abs(found - pixels).max() <= 1
    assert (found != pixels).mean() < 0.01


def test_a_server_takes_the_graph_of_a_webp(server, make):
    """Save Image rounds down, so a value may be lower by one; the WebP itself is compressed."""
    _, graph, path = make("turbo", "webp")
    pixels, _, _ = make("turbo", "png")
    (image,) = server.images(server.run(graph))
    found = np.asarray(Image.open(io.BytesIO(image))).astype(int)
    assert found.shape == pixels.shape and set(np.unique(pixels - found)) <= {0, 1}


@pytest.mark.parametrize("case", ["raw"])
def test_again_reads_the_graph(pack, make, case):
    """Without our own settings, as in a picture that ComfyUI has saved."""
    pixels, graph, path = make(case)
    picture = Image.open(path)
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps(graph))
    saved = path.with_name(f"comfy-{path.name}")
    picture.save(saved, pnginfo=chunks)
    again = path.with_name(f"again-{path.name}")
    main = pack("krea2_model.cli.main").main
    assert main(["again", str(saved), "--output", str(again), "--quiet", "--dtype", "fp32"]) == 0
    assert (np.asarray(Image.open(again)).astype(int) == pixels).all()


def test_again_makes_what_styles_and_variations_of_the_page_made(run, pack, tmp_path):
    """A style with words, one with a LoRA and one with a picture, and a neighbour of its noise."""
    nodes = {
        "1": ("K2Loader", {"model": "krea2-nano (built in)", "dtype": "fp32"}),
        "2": ("K2Styles", {
            "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "prompt": " a (red:1.3) circle ",
            "styles": "nano notebook: 0.7\nnano yellow ring: 0.8\nnano black ground: 0.5"}),
        "3": ("K2EmptyLatent", {"aspect": "custom", "width": 64, "height": 64}),
        "4": ("K2Vary", {"seed": 3, "variation_seed": 8, "strength": 0.3, "index": 2}),
        "5": ("K2Sampler", {
            "model": ["2", 0], "positive": ["2", 1], "negative": ["2", 2], "latent": ["3", 0],
            "noise": ["4", 0], "preset": "custom", "steps": 3, "guidance": 1.5}),
        "6": ("K2VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}),
    }  # fmt: skip
    graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    image = np.asarray((outputs_of(run, graph)["6"][0][0] * 255).round()).astype(np.uint8)
    saved, again = tmp_path / "a.png", tmp_path / "b.png"
    save = pack("krea2_model.images.output_files").save_image
    save(Image.fromarray(image), saved, {"prompt": json.dumps(graph)})
    main = pack("krea2_model.cli.main").main
    assert main(["again", str(saved), "--output", str(again), "--quiet", "--dtype", "fp32"]) == 0
    difference = np.asarray(Image.open(again)).astype(int) - image
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
