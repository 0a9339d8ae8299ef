"""Krea 2 Grid on the page, in both of its ways to draw nodes: pictures as they come, compared."""

import itertools

import pytest

from conftest import api_form, run, set_widgets

NANO = "krea2-nano (built in)"
STATE = """() => app.nodeOutputs[app.rootGraph.nodes.find(node => node.type === 'K2Grid').id]
    ?.k2_grid?.[0]"""
CLIP = "() => document.querySelector('.k2-compare img:nth-child(2)').style.clipPath"
SHOWN = """() => [...document.querySelectorAll('.k2-compare img')].map(
    image => image.hidden ? '' : new URL(image.src).searchParams.get('filename'))"""
# So that all of the node is seen; the table of the page's other nodes lies beside it.
VIEW = """() => {
    const node = app.rootGraph.nodes.find(node => node.type === 'K2Grid');
    app.canvas.ds.scale = 0.6;
    app.canvas.ds.offset = [120 - node.pos[0], 120 - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""
NUMBERS = itertools.count(1)


@pytest.fixture
def grid(both_kinds, load_template):
    """The page with the template on krea2-nano, one step a picture."""
    page = load_template("krea2_grid")
    page.set_viewport_size({"width": 1280, "height": 1200})
    set_widgets(page, "K2Loader", model=NANO)
    set_widgets(page, "K2EmptyLatent", aspect="custom", width=64, height=64)
    # Others for each test: ComfyUI has the last run's result already.
    seed = 10 * next(NUMBERS)
    set_widgets(
        page, "K2Grid", preset="custom", steps=1, guidance=0.0, prompt="a red circle",
        x_axis="seed", x_values=f"{seed}-{seed + 2}", y_axis="prompt part",
        y_values="circle\nstar",
    )  # fmt: skip
    page.evaluate(VIEW)
    return page


def cells(page):
    return page.locator(".k2-grid .cell")


def paint(page):
    (node,) = [n for n in api_form(page).values() if n["class_type"] == "K2Grid"]
    first = node["inputs"]["x_values"].partition("-")[0]
    run(page)
    # The page keeps the outputs of runs before it.
    page.wait_for_function(f"first => ({STATE})()?.labels.x[0] === `seed: ${{first}}`", arg=first)
    page.wait_for_function("() => document.querySelectorAll('.k2-grid .cell img').length === 6")
    return page.evaluate(STATE)


def names(state):
    return [cell["file"]["filename"] for cell in state["cells"]]


def test_pictures_are_shown_with_their_labels_and_compared(grid):
    page = grid
    files = names(paint(page))
    labels = page.locator(".k2-grid .label").all_inner_texts()
    assert [text.partition(":")[0] for text in labels] == ["seed"] * 3 + ["circle"] * 2
    assert cells(page).nth(5).get_attribute("aria-label").endswith(", circle: star")
    # The first two at the beginning; a click replaces A, the next one B.
    assert page.evaluate(SHOWN) == [files[1], files[0]]
    cells(page).nth(3).click()
    assert page.evaluate(SHOWN) == [files[1], files[3]]
    cells(page).nth(5).click()
    assert page.evaluate(SHOWN) == [files[5], files[3]]
    # Of one row, so that their seeds tell them apart.
    assert page.locator(".k2-compare .tag.a").inner_text().split()[:2] == ["A", "seed:"]
    assert "circle" not in page.locator(".k2-compare .tag.a").inner_text()
    assert cells(page).all_inner_texts() == ["", "", "", "A", "", "B"]
    page.get_by_role("button", name="Swap").click()
    assert page.evaluate(SHOWN) == [files[3], files[5]]


def test_the_line_follows_the_pointer_and_the_keys(grid):
    page = grid
    paint(page)
    stage = page.locator(".k2-compare")
    stage.hover(trial=True)
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"], steps=3)
    assert stage.get_attribute("role") == "slider"
    assert int(stage.get_attribute("aria-valuenow")) == pytest.approx(25, abs=2)
    assert float(page.evaluate(CLIP).split()[1].rstrip("%")) == pytest.approx(75, abs=2)
    page.mouse.move(5, 5)
    stage.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert stage.get_attribute("aria-valuenow") == "5"
    assert page.evaluate("() => app.rootGraph.nodes.some(node => node.type === 'K2Grid')")


def test_flip_shows_one_at_a_time(grid):
    page = grid
    files = names(paint(page))
    page.get_by_role("button", name="Flip").click()
    stage = page.locator(".k2-compare")
    assert page.evaluate(SHOWN)[1] == files[0] and "0%" in page.evaluate(CLIP)
    stage.click()
    assert page.evaluate(SHOWN)[1] == files[1]
    page.keyboard.press(" ")
    assert page.evaluate(SHOWN)[1] == files[0]
    tags = page.locator(".k2-compare .tag").all()
    assert [tag.is_visible() for tag in tags] == [True, False]


def test_cells_by_the_keyboard(grid):
    page = grid
    files = names(paint(page))
    cells(page).first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("b")
    assert page.evaluate(SHOWN) == [files[4], files[0]]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.evaluate(SHOWN) == [files[4], files[1]]


def test_a_cancelled_run_shows_what_is_painted_and_the_next_runs(grid):
    page = grid
    set_widgets(page, "K2Grid", steps=60)
    run(page)
    page.wait_for_function(
        "() => document.querySelector('.k2-grid .hint')?.textContent.startsWith('1 of 6')"
    )
    page.evaluate("() => app.api.interrupt(null)")
    hint = page.locator(".k2-grid .hint")
    page.wait_for_function(
        "() => document.querySelector('.k2-grid .hint').textContent.includes('was stopped')"
    )
    made = int(hint.inner_text().split()[0])
    assert 1 <= made < 6 and page.locator(".k2-grid .cell img").count() == made
    assert page.get_by_role("link", name="Sheet").is_visible()
    page.wait_for_function("() => !app.runningNodeId")
    set_widgets(page, "K2Grid", steps=1)
    assert len(names(paint(page))) == 6


def test_values_of_an_axis_that_is_off_are_hidden_and_names_are_offered(grid):
    page = grid
    hidden = """name => app.rootGraph.nodes.find(node => node.type === 'K2Grid')
        .widgets.find(widget => widget.name === name).hidden"""
    choose = """([name, value]) => {
        const node = app.rootGraph.nodes.find(node => node.type === 'K2Grid');
        const widget = node.widgets.find(widget => widget.name === name);
        widget.value = value;
        widget.callback(value);
    }"""
    offer = page.locator(".k2-grid select")
    page.evaluate(choose, ["z_axis", "lora"])
    page.wait_for_function(f"() => !({hidden})('z_values')")
    style = "z lora: krea2-nano notebook (built in)"
    offer.select_option(label=style)
    offer.select_option(label="z lora: none")
    (node,) = [n for n in api_form(page).values() if n["class_type"] == "K2Grid"]
    assert node["inputs"]["z_values"] == "krea2-nano notebook (built in)\nnone"
    assert "pictures" not in node["inputs"]
    page.evaluate(choose, ["z_axis", "style"])
    offer.select_option(label="z style: Ink wash")
    (node,) = [n for n in api_form(page).values() if n["class_type"] == "K2Grid"]
    assert node["inputs"]["z_values"].endswith("\nInk wash")
    page.evaluate(choose, ["z_axis", "none"])
    page.wait_for_function(f"() => ({hidden})('z_values')")
    assert offer.is_hidden()
