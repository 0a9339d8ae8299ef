"""What a person meets in the page: templates, search, Run, errors, help, the blueprint."""

import math
import re
import urllib.request

import pytest
from playwright.sync_api import expect

from conftest import ROOT, api_form, outputs_of_run, read_json, run, set_widgets
from krea2_model import TransformerConfig, load_transformer, nano
from krea2_model.features.tiles import TileSettings, tiles_at
from krea2_model.memory.forecast import call_operations
from nano_templates import NANO, NANO_RAW, nano_graph
from page import PACK_FOLDER, open_template

TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
HELP_PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))

# What the page shows of a node that it does not know, by node: its type, or odd widgets.
MISSING = """() => app.rootGraph.nodes.flatMap(node => [
    ...(LiteGraph.registered_node_types[node.type] ? [] : [node.type]),
    ...(node.widgets ?? []).filter(w => w.name === 'UNKNOWN').map(w => `${node.type}.${w.name}`),
])"""
# The text that a node shows after a run.
REPORT = """type => app.rootGraph.nodes.find(node => node.type === type)
    .widgets.find(widget => widget.name === 'report')?.value"""
SEARCHES = {
    "krea": {"Load Krea 2", "Krea 2 Prompt", "Krea 2 Size", "Krea 2 Sampler", "Load Krea 2 LoRA"},
    "k2": {"Load Krea 2", "Krea 2 Prompt", "Krea 2 Size", "Krea 2 Sampler", "Load Krea 2 LoRA"},
    "qwen": {"Load Krea 2", "Load Krea 2 Text Encoder", "Krea 2 Prompt", "Load Krea 2 VAE"},
    "turbo": {"Load Krea 2", "Load Krea 2 Model", "Krea 2 Sampler", "Krea 2 Size"},
    "raw": {"Load Krea 2", "Load Krea 2 Model", "Krea 2 Sampler", "Krea 2 Size"},
}
LOADER = "K2Loader"
HIDDEN = """type => app.rootGraph.nodes.find(node => node.type === type)
    .widgets.filter(widget => widget.hidden).map(widget => widget.name)"""
# Nodes whose lower right corner is in no group.
OUTSIDE = """() => app.rootGraph.nodes.filter(node => !app.rootGraph.groups.some(group =>
    node.pos[0] >= group.pos[0] && node.pos[1] >= group.pos[1]
    && node.pos[0] + node.size[0] <= group.pos[0] + group.size[0]
    && node.pos[1] + node.size[1] <= group.pos[1] + group.size[1])).map(node => node.type)"""
TILED = """() => {
    const tiled = LiteGraph.createNode('K2TiledSampling');
    app.rootGraph.add(tiled);
    const sampler = app.rootGraph.nodes.find(node => node.type === 'K2Sampler');
    const slot = sampler.findInputSlot('model');
    sampler.getInputNode(slot).connect(0, tiled, 0);
    tiled.connect(0, sampler, slot);
}"""
COUNT_REQUESTS = """() => {
    const fetch = window.fetch;
    window.asked = [];
    window.fetch = (...words) => { window.asked.push(words[0]); return fetch(...words); };
}"""
BLUEPRINT = "Krea 2 text to image"


def choose(page, node_type: str, name: str, value: str | float):
    """Choose from a node's list, as its menu does."""
    page.evaluate(
        """([type, name, value]) => {
            const node = app.rootGraph.nodes.find(node => node.type === type);
            const widget = node.widgets.find(widget => widget.name === name);
            widget.value = value;
            widget.callback(value, app.canvas, node);
        }""",
        [node_type, name, value],
    )


def pick_model(page, name: str):
    choose(page, LOADER, "model", name)


def search(page, words: str):
    """The results of the node search, as locators."""
    page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_role("combobox", name="Add a node").fill(words)
    return page.get_by_test_id("result-item")


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_opens_whole_and_equals_its_twin(load_template, server, name):
    page = load_template(name)
    assert page.evaluate(MISSING) == []
    assert api_form(page) == read_json(ROOT / "tests" / "workflows" / f"{name}.json")
    workflow = read_json(ROOT / "example_workflows" / f"{name}.json")
    assert page.evaluate("() => app.rootGraph.links.size") == len(workflow["links"])
    thumbnail = f"http://{server.address}/api/workflow_templates/{PACK_FOLDER}/{name}.jpg"
    with urllib.request.urlopen(thumbnail) as answer:
        assert answer.headers.get_content_type() == "image/jpeg"


@pytest.mark.parametrize("name", TEMPLATES)
def test_picking_nano_puts_its_values_in_and_another_model_the_template_s(load_template, name):
    page = load_template(name)
    own, nano = api_form(page), nano_graph(name)
    (loader,) = [node["inputs"]["model"] for node in nano.values() if node["class_type"] == LOADER]
    pick_model(page, loader)
    assert api_form(page) == nano
    pick_model(page, next(n for n in own.values() if n["class_type"] == LOADER)["inputs"]["model"])
    assert api_form(page) == own


def test_a_value_of_the_user_s_stays(load_template):
    page = load_template("krea2_turbo_text_to_image")
    set_widgets(page, "K2PromptExpander", prompt="a hare")
    pick_model(page, NANO)
    form = {node["class_type"]: node["inputs"] for node in api_form(page).values()}
    assert form["K2PromptExpander"]["prompt"] == "a hare"
    assert form["K2EmptyLatent"]["width"] == 128


def test_the_sampler_shows_what_it_will_use(load_template):
    page = load_template("krea2_raw_text_to_image")
    # By its name: the file is not here.
    operations = 56 * call_operations(TransformerConfig(), 4096, 512) / 1e15
    assert page.evaluate(REPORT, "K2Sampler") == "\n".join(
        [
            "auto: raw, 28 steps, mu by size",
            "guidance 4.5 (cfg 5.5)",
            f"4096 tokens, 56 calls, {operations:.3g} PFLOP",
        ]
    )
    assert page.evaluate(HIDDEN, "K2Sampler") == ["steps", "guidance", "mu"]
    pick_model(page, NANO_RAW)
    assert "guidance 3.5" in page.evaluate(REPORT, "K2Sampler")
    choose(page, "K2Sampler", "preset", "turbo")
    assert page.evaluate(REPORT, "K2Sampler").startswith("turbo, 8 steps, mu 1.15")
    choose(page, "K2Sampler", "preset", "custom")
    choose(page, "K2Sampler", "shift", "fixed")
    assert page.evaluate(HIDDEN, "K2Sampler") == []
    assert page.evaluate(REPORT, "K2Sampler").startswith("64 tokens, 56 calls, ")


def test_the_sampler_shows_what_a_run_will_take(load_template):
    """Before it, and at once after each change, without a call to the server."""
    page = load_template("krea2_raw_text_to_image")
    pick_model(page, NANO)
    page.evaluate(COUNT_REQUESTS)
    choose(page, "K2EmptyLatent", "aspect", "custom")
    choose(page, "K2EmptyLatent", "width", 256)
    choose(page, "K2EmptyLatent", "batch", 3)
    report = page.evaluate(REPORT, "K2Sampler").split("\n")
    config = load_transformer(nano.TRANSFORMERS["turbo"]).config
    operations = 8 * call_operations(config, 16 * 8, 512, batch=3) / 1e9
    assert report[2] == f"128 tokens, 8 calls, {operations:.3g} GFLOP"
    # As Krea2Model.memory_required counts it, beside the weights.
    states = 3 * (128 + 512) * (3 * config.hidden_size + 2 * config.intermediate_size)
    needed = 4 * 1.15 * states + 0.45 * 1024**3
    peak = (needed + nano.TRANSFORMERS["turbo"].stat().st_size) / 1e9
    assert report[3].startswith(f"memory: {peak:.1f} of ") and len(report) == 4
    choose(page, "K2EmptyLatent", "width", 16384)
    choose(page, "K2EmptyLatent", "height", 16384)
    choose(page, "K2EmptyLatent", "batch", 64)
    report = page.evaluate(REPORT, "K2Sampler").split("\n")
    assert report[4:] == ["will not fit: make the image smaller", "or fewer images at once"]
    assert all(len(line) <= 40 for line in report)
    # The page itself asks for other things now and then, such as the size of a missing file.
    asked = page.evaluate("() => window.asked.map(String)")
    server = [url for url in asked if not url.startswith("https://")]
    assert [url for url in server if re.search("krea2|object_info|metadata", url)] == []


@pytest.mark.parametrize("size, tile, overlap, move", [
    ((320, 224), 0, 0.25, True), ((320, 224), 128, 0.5, False), ((96, 480), 64, 0.0, True),
])  # fmt: skip
def test_the_forecast_counts_tiles(load_template, size, tile, overlap, move):
    page = load_template("krea2_nano_first_image")
    page.evaluate(TILED)
    for name, value in (("tile", tile), ("overlap", overlap), ("move", move)):
        choose(page, "K2TiledSampling", name, value)
    choose(page, "K2EmptyLatent", "aspect", "custom")
    choose(page, "K2EmptyLatent", "width", size[0])
    choose(page, "K2EmptyLatent", "height", size[1])
    settings = TileSettings(tile or 128, overlap, move)
    tiles = [one for one, _ in tiles_at((size[1] // 16, size[0] // 16), settings, 1.0)]
    tokens = math.prod(tiles[0].grid)
    report = page.evaluate(REPORT, "K2Sampler").split("\n")
    assert f"{len(tiles)} tiles, each of" in report
    assert any(line.startswith(f"{tokens} tokens, {8 * len(tiles)} calls") for line in report)
    page.evaluate("() => { app.rootGraph.nodes.find(n => n.type === 'K2TiledSampling').mode = 4; }")
    choose(page, "K2EmptyLatent", "width", size[0])
    assert "tiles" not in page.evaluate(REPORT, "K2Sampler")


def test_the_forecast_counts_both_prompts_of_a_walk(load_template):
    page = load_template("krea2_walk")
    pick_model(page, NANO)
    report = page.evaluate(REPORT, "K2Sampler").split("\n")
    assert "a frame between the two prompts:" in report
    assert any(" tokens, 16 calls, " in line for line in report), report
    page.evaluate("""() => {
        const walk = app.rootGraph.nodes.find(node => node.type === 'K2Walk');
        walk.disconnectInput(walk.findInputSlot('end'));
    }""")
    report = page.evaluate(REPORT, "K2Sampler").split("\n")
    assert len(report) == 4 and any(" tokens, 8 calls, " in line for line in report), report


def test_the_sampler_shows_the_steps_of_a_few_step_lora(load_template):
    page = load_template("krea2_lora")
    choose(page, "K2LoraLoader", "lora", "krea2_turbo_distill_4step.safetensors")
    assert page.evaluate(REPORT, "K2Sampler").startswith("auto: few-step LoRA, 4 steps")
    choose(page, "K2LoraLoader", "strength", 0.5)
    assert page.evaluate(REPORT, "K2Sampler").startswith("auto: turbo, 8 steps")


def test_the_pack_is_listed_by_its_name(server):
    for words in server.request("/i18n").values():
        category = words.get("templateWorkflows", {}).get("category", {})
        if "nodeDefs" in words:
            assert category[PACK_FOLDER] == "Krea 2 Kit"


def test_templates_are_offered(server):
    offered = server.request("/api/workflow_templates")
    assert sorted(offered[PACK_FOLDER]) == TEMPLATES


def test_run_previews_reports_and_saves_what_reopens(new_page, page, server, tmp_path):
    again, page = page, new_page()
    open_template(page, server, "krea2_nano_first_image")
    set_widgets(page, "K2TextEncode", prompt="a large green star on a white background")
    set_widgets(page, "K2Sampler", preset="custom", steps=60, guidance=0)
    run(page)
    # While it samples.
    page.wait_for_function("() => Object.keys(app.nodePreviewImages).length > 0")
    outputs = outputs_of_run(page, server, "SaveImage")
    (saved,) = [output["images"] for output in outputs.values() if output.get("images")]
    assert page.evaluate(REPORT, "K2TextEncode") == "prompt: 8 tokens of 507"
    assert page.evaluate(REPORT, "K2EmptyLatent") == "128 x 128 px, 0.02 megapixels"
    assert page.evaluate(REPORT, "K2Sampler").splitlines() == [
        "custom, 60 steps, mu 1.15",
        "guidance 0 (cfg 1)",
        "128 x 128 px, 64 tokens",
    ]
    # Nothing of the report is saved, or sent.
    assert "report" not in str(api_form(page))

    png = tmp_path / "saved.png"
    (image,) = server.images(outputs)
    png.write_bytes(image)
    assert saved[0]["filename"].startswith("krea2_nano_")
    again.evaluate("() => app.rootGraph.clear()")
    again.locator("#comfy-file-input").set_input_files(png)
    again.wait_for_function("() => app.rootGraph.nodes.some(node => node.type === 'K2Sampler')")
    again.wait_for_function("() => !app.extensionManager.workflow.isBusy")
    assert again.evaluate(MISSING) == []
    form = api_form(again)
    assert form["2"]["inputs"]["prompt"] == "a large green star on a white background"
    assert form["4"]["inputs"]["steps"] == 60
    assert set(form) == set(read_json(ROOT / "tests/workflows/krea2_nano_first_image.json"))


@pytest.mark.parametrize(
    "node_type, values, message",
    [
        ("K2Loader", {"model": "nowhere.safetensors"}, "There is no 'nowhere.safetensors' in"),
        ("K2EmptyLatent", {"width": 100_000}, "width is 100000; expected a whole number"),
    ],
)
def test_a_refused_input_is_shown_on_its_node(load_template, node_type, values, message):
    page = load_template("krea2_nano_first_image")
    set_widgets(page, node_type, **values)
    run(page)
    expect(page.get_by_test_id("error-overlay")).to_be_visible()
    marked = "() => app.rootGraph.nodes.filter(node => node.has_errors).map(node => node.type)"
    assert page.evaluate(marked) == [node_type]
    (errors,) = page.evaluate("() => Object.values(app.lastNodeErrors)")
    assert errors["class_type"] == node_type
    assert message in errors["errors"][0]["details"]


def test_an_error_of_a_run_is_shown_on_its_node(load_template):
    page = load_template("krea2_nano_first_image")
    set_widgets(page, "K2Loader", model="krea2-nano Raw (built in)")
    page.evaluate(
        """() => {
            const node = app.rootGraph.nodes.find(node => node.type === 'K2Sampler');
            node.disconnectInput(node.inputs.findIndex(input => input.name === 'negative'));
        }"""
    )
    run(page)
    overlay = page.get_by_test_id("error-overlay")
    expect(overlay).to_contain_text("Krea 2 Sampler")
    overlay.get_by_role("button", name="View details").click()
    message = "Connect the negative output of Krea 2 Prompt (an empty text is fine)"
    expect(page.get_by_text(message).first).to_be_visible()
    assert page.evaluate("() => app.lastExecutionError.node_type") == "K2Sampler"


def test_help_shows_for_each_node(page):
    content = page.locator(".node-help-content")
    for help_page in HELP_PAGES:
        text = help_page.read_text(encoding="utf-8")
        page.evaluate(
            """type => {
                app.rootGraph.clear();
                const node = LiteGraph.createNode(type);
                node.pos = [300, 200];
                app.rootGraph.add(node);
                app.canvas.selectItems([node]);
            }""",
            help_page.stem,
        )
        if content.count() == 0:
            # The files that ComfyUI's first workflow lacks may be shown over the button.
            page.get_by_test_id("info-button").dispatch_event("click")
        expect(content.locator("h1")).to_have_text(text.splitlines()[0].removeprefix("# "))
        expect(content.locator("table").first).to_be_visible()
        pictures = content.locator("img")
        expect(pictures).to_have_count(text.count("!["))
        for picture in pictures.all():
            page.wait_for_function("it => it.complete", arg=picture.element_handle())
            assert picture.evaluate("it => it.naturalWidth") > 0, f"{help_page.name}: no picture"


def test_search_finds_the_nodes(page):
    for words, wanted in SEARCHES.items():
        results = search(page, words)
        for name in wanted:
            expect(results.filter(has_text=name).first).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("combobox", name="Add a node")).to_have_count(0)


def test_blueprint_is_offered_and_runs(page, server):
    page.evaluate("() => app.rootGraph.clear()")
    offered = search(page, BLUEPRINT).filter(has_text=BLUEPRINT).first
    expect(offered).to_contain_text("Blueprint")
    offered.click()
    # It hangs on the pointer until it is put down.
    page.wait_for_function("() => app.rootGraph.nodes[0]?.subgraph")
    page.mouse.click(600, 200)
    page.evaluate(
        """() => {
            const [node] = app.rootGraph.nodes;
            const values = {
                prompt: 'a blue ring on a pink background', megapixels: 0.05,
                model: 'krea2-nano (built in)',
            };
            for (const [name, value] of Object.entries(values))
                node.widgets.find(widget => widget.name === name).value = value;
            const preview = LiteGraph.createNode('PreviewImage');
            app.rootGraph.add(preview);
            node.connect(0, preview, 0);
        }"""
    )
    inputs = {n["class_type"]: n["inputs"] for n in api_form(page).values()}
    assert inputs["K2TextEncode"]["prompt"] == "a blue ring on a pink background"
    assert inputs["K2Loader"] == {
        "model": "krea2-nano (built in)", "text_encoder": "auto", "vae": "auto", "dtype": "auto",
        "implementation": "this pack",
    }  # fmt: skip
    run(page)
    outputs = outputs_of_run(page, server, "PreviewImage")
    assert len(server.images(outputs)) == 1


def test_nodes_stay_in_their_groups_after_a_run(load_template, server):
    """Reports, the sampler's previews and pictures have made the nodes grow."""
    page = load_template("krea2_raw_faster")
    pick_model(page, NANO_RAW)
    run(page)
    outputs_of_run(page, server, "SaveImage")
    assert page.evaluate(OUTSIDE) == []
