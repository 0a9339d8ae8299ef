"""The example workflows on krea2-nano, as the page makes them when it is picked: all run."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from nano_templates import nano_graph

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "workflows").glob("*.json"))
# Models that krea2-nano stands for, and a LoRA of its own.
SUFFIX = ".safetensors"


@pytest.fixture(scope="module")
def picture(server):
    """ComfyUI's example image, its middle masked."""
    image = Image.linear_gradient("L").resize((160, 160)).convert("RGB")
    ImageDraw.Draw(image).rectangle((20, 20, 90, 100), fill="white", outline="black")
    opaque = Image.new("L", image.size, 255)
    opaque.paste(0, (48, 48, 112, 112))
    image.putalpha(opaque)
    image.save(server.base / "input" / "example.png")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_without_a_download(server, picture, name):
    graph = nano_graph(name)
    for node in graph.values():
        if node["class_type"] == "K2TrainLora":
            node["inputs"].update(steps=1, batch=1, resolution=64)
    values = [value for node in graph.values() for value in node["inputs"].values()]
    assert not [value for value in values if str(value).endswith(SUFFIX)]
    images = server.images(server.run(graph, timeout=120))
    assert images
    for number, image in enumerate(images, 1):
        with Image.open(io.BytesIO(image)) as opened:
            found = len(opened.convert("RGB").getcolors(1 << 20))
            # Edges, of which there is a preview, are in black and white.
            assert found > (20 if number == len(images) else 1), "more than an empty ground"
