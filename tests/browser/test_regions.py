"""The canvas of Krea 2 Regions, in both of the page's ways to draw nodes."""

import json

import pytest

from conftest import api_form, outputs_of_run, run, set_widgets

ADD = """() => {
    const find = type => app.rootGraph.nodes.find(node => node.type === type);
    const node = LiteGraph.createNode('K2Regions');
    node.pos = [40, 60];
    app.rootGraph.add(node);
    const slot = (node, name) => node.inputs.findIndex(input => input.name === name);
    find('K2Loader').connect(1, node, slot(node, 'clip'));
    find('K2EmptyLatent').connect(0, node, slot(node, 'latent'));
    find('K2TextEncode').connect(0, node, slot(node, 'positive'));
    const sampler = find('K2Sampler');
    node.connect(0, sampler, slot(sampler, 'positive'));
    for (const other of app.rootGraph.nodes) if (other !== node) other.pos = [900, 60];
    // So that all of it is seen.
    app.canvas.ds.scale = 0.7;
    app.canvas.ds.offset = [80, 90];
    app.canvas.setDirty(true, true);
}"""
PICTURE = """() => {
    const loader = LiteGraph.createNode('LoadImage');
    app.rootGraph.add(loader);
    loader.pos = [900, 400];
    loader.widgets.find(widget => widget.name === 'image').value = 'example.png';
    const node = app.rootGraph.nodes.find(node => node.type === 'K2Regions');
    loader.connect(0, node, node.findInputSlot('picture'));
}"""
TEXT = """() => app.rootGraph.nodes.find(node => node.type === 'K2Regions')
    .widgets.find(widget => widget.name === 'regions').value"""


@pytest.fixture
def canvas(both_kinds, load_template):
    """The page with a Krea 2 Regions between prompt and sampler of the first template."""
    page = load_template("krea2_nano_first_image")
    page.evaluate(ADD)
    page.locator(".k2-regions .stage").wait_for()
    set_regions(page, [])
    return page


def set_regions(page, entries):
    set_widgets(page, "K2Regions", regions=json.dumps(entries))
    page.locator(".k2-regions").dispatch_event("pointerenter")


def regions(page) -> list[dict]:
    return json.loads(page.evaluate(TEXT))


def drag(page, start, end):
    """From one place of the canvas to another, in fractions of it."""
    element = page.locator(".k2-regions .stage")
    # Waits until the canvas stands still: a new list of regions changes the node's height.
    element.hover(trial=True)
    stage = element.bounding_box()
    for (x, y), action in ((start, page.mouse.down), (end, page.mouse.up)):
        page.mouse.move(stage["x"] + x * stage["width"], stage["y"] + y * stage["height"], steps=4)
        action()


def rows(page):
    return page.locator(".k2-regions .row").filter(has=page.locator("input"))


def test_draw_two_type_their_prompts_and_run(canvas, server, request):
    page = canvas
    # Else ComfyUI has the second run's result already, and its history holds no report.
    set_widgets(page, "K2Sampler", seed=int("Vue" in request.node.name))
    set_widgets(page, "K2Regions", soft=0.02 if "Vue" in request.node.name else 0.01)
    drag(page, (0.01, 0.1), (0.45, 0.9))
    page.keyboard.type("a red circle")
    drag(page, (0.55, 0.1), (0.99, 0.9))
    page.keyboard.type("a blue star")
    (node,) = [n for n in api_form(page).values() if n["class_type"] == "K2Regions"]
    found = json.loads(node["inputs"]["regions"])
    assert [entry["prompt"] for entry in found] == ["a red circle", "a blue star"]
    left, right = (entry["box"] for entry in found)
    assert left == pytest.approx([0, 0.1, 0.45, 0.8], abs=0.02)
    assert right == pytest.approx([0.55, 0.1, 0.45, 0.8], abs=0.02)
    # At the border, exactly.
    assert left[0] == 0 and right[0] + right[2] == pytest.approx(1, abs=1e-3)
    assert "canvas" not in node["inputs"]
    run(page)
    outputs = outputs_of_run(page, server, "SaveImage")
    texts = [text for output in outputs.values() for text in output.get("text", ())]
    assert any(text.startswith("Region 1: 3") for text in texts)


def test_the_picture_to_draw_on(canvas):
    """That of the node's input, of its shape where no latent gives one."""
    page = canvas
    page.evaluate(PICTURE)
    set_regions(page, [{"prompt": "x", "box": [0, 0, 0.5, 0.5]}])
    stage = page.locator(".k2-regions .stage")
    shown = stage.evaluate("stage => getComputedStyle(stage).backgroundImage")
    assert "filename=example.png" in shown and "type=input" in shown
    page.evaluate(
        "() => app.rootGraph.nodes.find(node => node.type === 'LoadImage').disconnectOutput(0)"
    )
    set_regions(page, [])
    assert "example.png" not in stage.evaluate("stage => stage.style.backgroundImage")


def test_move_resize_reorder_and_delete(canvas):
    page = canvas
    entries = [
        {"prompt": "one", "box": [0.1, 0.1, 0.3, 0.3], "strength": 1.5},
        {"prompt": "two", "box": [0.5, 0.5, 0.4, 0.4]},
        {"prompt": "rest", "box": "background"},
    ]
    set_regions(page, entries)
    drag(page, (0.3, 0.3), (0.4, 0.4))
    assert regions(page)[0]["box"] == pytest.approx([0.2, 0.2, 0.3, 0.3], abs=0.01)
    # By the lower right corner, which a chosen region has.
    drag(page, (0.495, 0.495), (0.7, 0.6))
    assert regions(page)[0]["box"] == pytest.approx([0.2, 0.2, 0.5, 0.4], abs=0.02)
    assert regions(page)[0]["strength"] == 1.5 and regions(page)[1:] == entries[1:]
    rows(page).nth(0).get_by_title("Raise").click()
    assert [entry["prompt"] for entry in regions(page)] == ["two", "one", "rest"]
    page.locator(".k2-regions .stage").focus()
    page.keyboard.press("Delete")
    assert [entry["prompt"] for entry in regions(page)] == ["two", "rest"]
    rows(page).nth(1).get_by_title("Delete the region").click()
    assert [entry["prompt"] for entry in regions(page)] == ["two"]
    # The node itself stays.
    assert page.evaluate("() => app.rootGraph.nodes.some(node => node.type === 'K2Regions')")


def test_eight_at_most_and_other_texts_are_left_alone(canvas):
    page = canvas
    boxes = [{"prompt": "x", "box": [0.1 * n, 0, 0.05, 0.1]} for n in range(8)]
    set_regions(page, boxes)
    drag(page, (0.2, 0.5), (0.8, 0.9))
    assert regions(page) == boxes
    set_widgets(page, "K2Regions", regions="[{")
    page.locator(".k2-regions").dispatch_event("pointerenter")
    drag(page, (0.2, 0.5), (0.8, 0.9))
    assert page.evaluate(TEXT) == "[{"
    assert "no JSON list" in page.locator(".k2-regions .hint").inner_text()


def test_the_canvas_has_the_shape_of_the_latent(canvas):
    page = canvas
    set_widgets(page, "K2EmptyLatent", aspect="custom", width=256, height=128)
    set_regions(page, [{"prompt": "x", "box": [0, 0, 0.5, 0.5]}])
    stage = page.locator(".k2-regions .stage").bounding_box()
    assert stage["width"] / stage["height"] == pytest.approx(2, abs=0.02)


def test_the_side_panel_leaves_the_canvas_as_wide_as_the_node(canvas):
    """It gives widgets of a chosen node its own width."""
    page = canvas
    width = "() => document.querySelector('.k2-regions').getBoundingClientRect().width"
    open_panel = "is => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', is)"
    before = page.evaluate(width)
    page.evaluate("""() => app.canvas.selectNode(
        app.rootGraph.nodes.find(node => node.type === 'K2Regions'))""")
    page.evaluate(open_panel, True)
    try:
        page.locator("[data-testid=properties-panel]").wait_for()
        page.evaluate("() => app.canvas.setDirty(true, true)")
        page.wait_for_timeout(300)
        assert page.evaluate(width) == pytest.approx(before, abs=1)
    finally:
        page.evaluate(open_panel, False)
