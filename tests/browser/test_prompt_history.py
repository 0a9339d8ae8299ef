"""The menu of prompts of earlier runs, in both of the page's ways to draw nodes."""

import json

import pytest

from conftest import run, set_widgets

FILE = "user/default/krea2kit/prompt_history.json"
SETTING = "Krea2Kit.PromptHistory"
NODE = "app.rootGraph.nodes.find(node => node.type === 'K2TextEncode')"
SELECT = f"() => {{ app.canvas.deselectAll(); app.canvas.selectNode({NODE}); }}"
VALUE = f"name => {NODE}.widgets.find(widget => widget.name === name).value"
OPEN = "() => app.extensionManager.command.execute('Krea2Kit.OpenPromptHistory')"


@pytest.fixture
def graph(both_kinds, load_template, server):
    page = load_template("krea2_nano_first_image")
    file = server.base / FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"prompt": [], "negative": []}')
    set_widgets(page, "K2Sampler", preset="custom", steps=1, guidance=0.0)
    return page


@pytest.fixture
def kept(server):
    return lambda: json.loads((server.base / FILE).read_text(encoding="utf-8"))


def write(server, prompts, negatives=()):
    content = json.dumps({"prompt": prompts, "negative": list(negatives)})
    (server.base / FILE).write_text(content, encoding="utf-8")


def send(page, prompt, negative=""):
    """Run, until the page has kept the prompt."""
    set_widgets(page, "K2TextEncode", prompt=prompt, negative=negative)
    with page.expect_response(lambda answer: "prompt_history" in answer.url
                              and answer.request.method == "POST"):  # fmt: skip
        run(page)


def menu(page):
    page.evaluate(SELECT)
    page.evaluate(OPEN)
    found = page.locator(".k2-history")
    found.wait_for()
    return found


def texts(found):
    return found.locator(".text").all_inner_texts()


def test_prompts_of_runs_are_kept_and_put_in_again(graph, kept):
    page = graph
    send(page, "a red {circle|star}", "blue")
    send(page, "a green ring")
    send(page, "a red {circle|star}")
    # As typed, each once, the newest first.
    assert kept() == {"prompt": ["a red {circle|star}", "a green ring"], "negative": ["blue"]}
    found = menu(page)
    page.wait_for_function("() => document.querySelectorAll('.k2-history .text').length === 2")
    found.get_by_role("button", name="a green ring").click()
    assert page.evaluate(VALUE, "prompt") == "a green ring"
    assert page.evaluate(VALUE, "negative") == "" and found.is_hidden()
    found = menu(page)
    found.get_by_role("button", name="Negatives").click()
    found.get_by_role("button", name="blue").click()
    assert page.evaluate(VALUE, "negative") == "blue"


def test_search_delete_and_clear(graph, server, kept):
    page = graph
    write(server, [f"a fox number {number}" for number in range(20)] + ["an owl"], ["snow"])
    found = menu(page)
    page.wait_for_function("() => document.querySelectorAll('.k2-history .text').length === 21")
    page.keyboard.type("number 1 FOX")
    assert len(texts(found)) == 11 and found.get_by_text("11 of 21").is_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.evaluate(VALUE, "prompt") == "a fox number 10"
    found = menu(page)
    page.keyboard.type("owl")
    page.wait_for_function("() => document.querySelectorAll('.k2-history .text').length === 1")
    found.get_by_title("Delete", exact=True).click()
    found.get_by_text("None has these words.").wait_for()
    assert "an owl" not in kept()["prompt"] and len(kept()["prompt"]) == 20
    found.get_by_role("button", name="Clear").click()
    assert len(kept()["prompt"]) == 20, "asked first"
    found.get_by_role("button", name="Delete all?").click()
    found.get_by_text("Those of the next run are kept here.").wait_for()
    assert kept() == {"prompt": [], "negative": ["snow"]}
    page.keyboard.press("Escape")
    assert found.is_hidden()


def test_a_hundred_at_most_and_files_of_others(graph, server, kept):
    page = graph
    write(server, [f"prompt {number}" for number in range(100)])
    send(page, "one more")
    assert kept()["prompt"] == ["one more", *(f"prompt {number}" for number in range(99))]
    (server.base / FILE).write_text('{"prompt": [5, "x", "x", ""], "negative": "a"}')
    found = menu(page)
    page.wait_for_function("() => document.querySelectorAll('.k2-history .text').length === 1")
    assert texts(found) == ["x"]
    page.mouse.click(5, 300)
    assert found.is_hidden()


def test_off_keeps_and_offers_nothing(graph, kept):
    page = graph
    set_to = "([name, is]) => app.extensionManager.setting.set(name, is)"
    page.evaluate(set_to, [SETTING, False])
    try:
        set_widgets(page, "K2TextEncode", prompt="a secret")
        with page.expect_response(lambda answer: answer.url.endswith("/prompt")):
            run(page)
        page.evaluate(SELECT)
        page.wait_for_timeout(300)
        assert page.locator("[data-testid=selection-toolbox] .pi-history").count() == 0
        page.evaluate(OPEN)
        assert page.locator(".k2-history").count() == 0
        assert kept()["prompt"] == []
    finally:
        page.evaluate(set_to, [SETTING, True])


def test_the_button_above_a_selected_node_opens_it(graph):
    page = graph
    page.evaluate(SELECT)
    page.locator(".pi-history").first.click()
    page.locator(".k2-history").wait_for()
    page.keyboard.press("Escape")


def test_without_the_server_s_data_the_page_keeps_them(graph):
    page = graph
    page.route("**/userdata/**", lambda route: route.fulfill(status=500))
    try:
        set_widgets(page, "K2TextEncode", prompt="kept in the page")
        with page.expect_response(lambda answer: answer.url.endswith("/prompt")):
            run(page)
        found = menu(page)
        found.get_by_role("button", name="kept in the page").wait_for()
        page.keyboard.press("Escape")
    finally:
        page.unroute("**/userdata/**")
