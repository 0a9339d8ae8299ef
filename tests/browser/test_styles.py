"""The picker of Krea 2 Styles, in both of the page's ways to draw nodes."""

import pytest

from conftest import api_form, outputs_of_run, run, set_widgets

ADD = """() => {
    const find = type => app.rootGraph.nodes.find(node => node.type === type);
    const node = LiteGraph.createNode('K2Styles');
    node.pos = [40, 60];
    app.rootGraph.add(node);
    const slot = (node, name) => node.inputs.findIndex(input => input.name === name);
    const loader = find('K2Loader'), sampler = find('K2Sampler');
    ['model', 'clip', 'vae'].forEach(
        (name, output) => loader.connect(output, node, slot(node, name)));
    ['model', 'positive', 'negative'].forEach(
        (name, output) => node.connect(output, sampler, slot(sampler, name)));
    node.widgets.find(widget => widget.name === 'prompt').value = 'a red star';
    for (const other of app.rootGraph.nodes) if (other !== node) other.pos = [900, 60];
    // So that all of it is seen.
    app.canvas.ds.scale = 0.8;
    app.canvas.ds.offset = [80, 60];
    app.canvas.setDirty(true, true);
}"""
TEXT = """() => app.rootGraph.nodes.find(node => node.type === 'K2Styles')
    .widgets.find(widget => widget.name === 'styles').value"""


@pytest.fixture
def picker(both_kinds, load_template):
    """The page with a Krea 2 Styles in front of the sampler of the first template."""
    page = load_template("krea2_nano_first_image")
    page.evaluate(ADD)
    page.locator(".k2-styles .card").first.wait_for()
    return page


def card(page, name):
    return page.locator(".k2-styles .card").filter(has_text=name)


def test_click_styles_weigh_them_and_run(picker, server, request):
    page = picker
    # Else ComfyUI has the second run's result already, and its history holds no report.
    weight = 0.6 if "Vue" in request.node.name else 0.5
    assert page.locator(".k2-styles .card").count() >= 12
    card(page, "nano notebook").click()
    page.locator(".k2-styles input[type=search]").fill("nano black")
    assert page.locator(".k2-styles .card").count() == 1
    card(page, "nano black ground").click()
    page.get_by_title("Weight of nano black ground").fill(str(weight))
    assert page.evaluate(TEXT) == f"nano notebook: 1\nnano black ground: {weight}"
    (node,) = [n for n in api_form(page).values() if n["class_type"] == "K2Styles"]
    assert node["inputs"]["styles"] == page.evaluate(TEXT) and "picker" not in node["inputs"]
    run(page)
    outputs = outputs_of_run(page, server, "SaveImage")
    texts = [text for output in outputs.values() for text in output.get("text", ())]
    assert any(text.startswith("nano notebook 1: LoRA") for text in texts)
    page.get_by_title("Leave nano notebook out").click()
    assert page.evaluate(TEXT) == f"nano black ground: {weight}"
    card(page, "nano black ground").click()
    assert page.evaluate(TEXT) == ""


def test_thumbnails_are_shown(picker):
    image = card(picker, "Woodcut").locator("img")
    image.scroll_into_view_if_needed()
    picker.wait_for_function(
        "image => image.complete && image.naturalWidth === 128", arg=image.element_handle()
    )


def test_text_from_elsewhere(picker):
    """Styles that are not there are marked, and what the picker cannot write is left alone."""
    page = picker
    set_widgets(page, "K2Styles", styles="Woodcut\nGone: 0.3")
    page.locator(".k2-styles").dispatch_event("pointerenter")
    assert "chosen" in card(page, "Woodcut").get_attribute("class")
    missing = page.locator(".k2-styles .row.missing")
    assert missing.count() == 1 and "Gone" in missing.inner_text()
    text = '{"Woodcut": 0.5}'
    set_widgets(page, "K2Styles", styles=text)
    page.locator(".k2-styles").dispatch_event("pointerenter")
    assert card(page, "Pastel").is_disabled()
    assert "not lines of name: weight" in page.locator(".k2-styles .hint").inner_text()
    assert page.evaluate(TEXT) == text


def test_a_style_that_is_saved_appears(picker, server):
    folder = server.base / "user" / "krea2_styles" / "Fresh"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "style.json").write_text('{"words": "fresh"}', encoding="utf-8")
    # Whatever panels of the page lie above the node.
    picker.get_by_title("Read the library again").dispatch_event("click")
    card(picker, "Fresh").wait_for()
    assert card(picker, "Fresh").locator(".blank").inner_text() == "F"
