"""The button of Krea 2 Picture Settings, in both of the page's ways to draw nodes."""

import json

import pytest
from PIL import Image

from conftest import api_form, set_widgets
from krea2_model.cli.graph import graph_of
from krea2_model.cli.settings import as_json
from krea2_model.images.output_files import save_image

STYLE = "krea2_nano_notebook_lora.safetensors"
SETTINGS = {
    "model": "nano", "prompt": "a green ring on black", "negative": "blue", "width": 96,
    "height": 64, "steps": 3, "seed": 99, "guidance": 0.5, "mu": 0.9,
}  # fmt: skip
ADD = """([type, values]) => {
    const node = LiteGraph.createNode(type);
    node.pos = [40, 700];
    app.rootGraph.add(node);
    for (const [name, value] of Object.entries(values))
        node.widgets.find(widget => widget.name === name).value = value;
}"""
# The loader's model goes through a LoRA to the sampler.
INSERT = """() => {
    const find = type => app.rootGraph.nodes.find(node => node.type === type);
    const [loader, lora, sampler] = ['K2Loader', 'K2LoraLoader', 'K2Sampler'].map(find);
    loader.connect(0, lora, lora.findInputSlot('model'));
    lora.connect(0, sampler, sampler.findInputSlot('model'));
}"""
REPORT = """() => app.rootGraph.nodes.find(node => node.type === 'K2PictureSettings')
    .widgets.find(widget => widget.name === 'report')?.value ?? ''"""


@pytest.fixture
def graph(both_kinds, load_template):
    """The page with the first template and a picture to read."""
    page = load_template("krea2_nano_first_image")
    return page


@pytest.fixture
def keep(server):
    def call(name, settings, as_graph=False):
        texts = {"krea2": as_json(settings)}
        if as_graph:
            texts = {"prompt": json.dumps(graph_of(settings))}
        save_image(Image.new("RGB", (96, 64), "green"), server.base / "input" / name, texts)
        return name

    return call


def use(page, name):
    """Choose a picture and press the button; what the node says then."""
    if not page.evaluate("() => app.rootGraph.nodes.some(n => n.type === 'K2PictureSettings')"):
        page.evaluate(ADD, ["K2PictureSettings", {"image": name}])
    set_widgets(page, "K2PictureSettings", image=name)
    page.evaluate("""() => app.rootGraph.nodes.find(n => n.type === 'K2PictureSettings')
        .widgets.find(widget => widget.type === 'button' && widget.name.startsWith('Use'))
        .callback()""")
    page.wait_for_function(f"() => {{ const text = ({REPORT})(); "
                           "return text && !text.startsWith('Reading'); }")  # fmt: skip
    return page.evaluate(REPORT)


def nodes(page):
    return {node["class_type"]: node["inputs"] for node in api_form(page).values()}


@pytest.mark.parametrize("ending, as_graph", [("png", False), ("webp", True), ("jpg", False)])
def test_a_picture_s_settings_come_into_the_nodes(graph, keep, ending, as_graph):
    page = graph
    said = use(page, keep(f"kept.{ending}", SETTINGS, as_graph))
    assert said.splitlines()[0].startswith("Set: Load Krea 2, Krea 2 Prompt, Krea 2 Size")
    assert "Not set" not in said
    found = nodes(page)
    assert found["K2TextEncode"]["prompt"] == "a green ring on black"
    assert found["K2TextEncode"]["negative"] == "blue"
    size = found["K2EmptyLatent"]
    assert (size["aspect"], size["width"], size["height"]) == ("custom", 96, 64)
    expected = {"preset": "custom", "seed": 99, "steps": 3, "guidance": 0.5, "shift": "fixed"}
    assert expected.items() <= found["K2Sampler"].items() and found["K2Sampler"]["mu"] == 0.9
    control = """() => app.rootGraph.nodes.find(node => node.type === 'K2Sampler')
        .widgets.find(widget => widget.name === 'control_after_generate').value"""
    assert page.evaluate(control) == "fixed"
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function("""() => app.rootGraph.nodes.find(node => node.type === 'K2TextEncode')
        .widgets.find(widget => widget.name === 'prompt').value.startsWith('a red circle')""")
    assert nodes(page)["K2Sampler"]["seed"] != 99


def test_what_cannot_be_set_is_said(graph, keep):
    page = graph
    settings = SETTINGS | {"lora": [[STYLE, 0.5], ["mine.safetensors", 0.8]]}
    said = use(page, keep("lora.png", settings)).splitlines()
    assert "- Load Krea 2 LoRA: the graph has none for mine.safetensors" in said
    page.get_by_role("alert").get_by_text("none for mine.safetensors").first.wait_for()
    page.evaluate(ADD, ["K2LoraLoader", {"strength": 0.1}])
    page.evaluate(INSERT)
    said = use(
        page, keep("lora.png", SETTINGS | {"lora": [["mine.safetensors", 0.8]]})
    ).splitlines()
    assert "- Load Krea 2 LoRA, lora: mine.safetensors is not here" in said
    assert nodes(page)["K2LoraLoader"]["strength"] == 0.8
    page.evaluate(ADD, ["K2Vary", {"strength": 0.9, "variation_seed": 1}])
    page.evaluate("""() => {
        const [vary, sampler] = ['K2Vary', 'K2Sampler'].map(
            type => app.rootGraph.nodes.find(node => node.type === type));
        vary.connect(0, sampler, sampler.findInputSlot('noise'));
    }""")
    use(page, keep("lora.png", SETTINGS | {"lora": [[STYLE, 0.5]], "vary": [[77, 0.25]]}))
    vary = {"seed": 99, "variation_seed": 77, "strength": 0.25}
    assert vary.items() <= nodes(page)["K2Vary"].items()
    assert nodes(page)["K2LoraLoader"]["lora"] == "krea2-nano notebook (built in)"
    said = use(page, keep("plain.png", SETTINGS)).splitlines()
    kinds = ("Load Krea 2 LoRA", "Krea 2 Vary")
    assert {f"- {title} stays: the picture has none" for title in kinds} <= set(said)


def test_pictures_and_graphs_without_are_refused(graph, keep, server):
    page = graph
    Image.new("RGB", (8, 8)).save(server.base / "input" / "bare.png")
    assert "bare.png holds no settings" in use(page, "bare.png")
    assert "There is no picture 'gone.png'" in use(page, "gone.png")
    assert "such as" in use(page, "../example.png") and nodes(page)["K2Sampler"]["seed"] != 99
    page.evaluate(ADD, ["K2Sampler", {}])
    assert "There are 2 nodes Krea 2 Sampler" in use(page, keep("kept.png", SETTINGS))
    page.evaluate("""() => app.canvas.selectNode(
        app.rootGraph.nodes.findLast(node => node.type === 'K2Sampler'))""")
    assert use(page, "kept.png").startswith("Set: Krea 2 Sampler")


def test_the_button_is_not_part_of_the_workflow(graph, keep):
    page = graph
    use(page, keep("kept.png", SETTINGS))
    assert nodes(page)["K2PictureSettings"] == {"image": "kept.png"}
    saved = page.evaluate("""() => app.rootGraph.serialize().nodes
        .find(node => node.type === 'K2PictureSettings').widgets_values""")
    assert saved[0] == "kept.png" and not any("Use" in str(value) for value in saved)
