"""The real page: a ComfyUI server with the pack, and Chromium on it; see scripts/page.py."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "scripts")]

import page as pages  # noqa: E402

NANO_LORA = ROOT / "krea2_model" / "nano" / "krea2_nano_notebook_lora.safetensors"
API_FORM = "async () => (await app.graphToPrompt()).output"
FEW_STEP_LORA = "krea2_turbo_distill_4step.safetensors"

expect.set_options(timeout=pages.PATIENCE)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    loras = base / "models" / "loras"
    loras.mkdir(parents=True)
    shutil.copyfile(NANO_LORA, loras / FEW_STEP_LORA)
    with pages.page_server(base, "latent2rgb") as running:
        yield running


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = pages.launch_chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def errors():
    """Errors in the scripts of any page, ComfyUI's own included."""
    return []


@pytest.fixture(autouse=True)
def _no_errors(errors):
    yield
    seen = errors.copy()
    errors.clear()
    assert not seen


@pytest.fixture(scope="session")
def new_page(chromium, errors):
    """A page in a context of its own, so that no draft is restored."""
    contexts = []

    def new():
        contexts.append(pages.new_context(chromium))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield new
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(new_page, server):
    """One page for the tests of a file, since a start takes seconds; each loads a workflow.

    Not for all: tests leave dialogs and panels open, which lie over the nodes of others.
    """
    page = new_page()
    pages.open_page(page, server)
    return page


@pytest.fixture(params=[False, True], ids=["LiteGraph", "Vue nodes"])
def both_kinds(page, request):
    """The test runs with each of the two kinds of nodes that the page draws."""
    use = "is => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', is)"
    page.evaluate(use, request.param)
    yield
    page.evaluate(use, False)


@pytest.fixture
def load_template(page):
    """`load_template(name)`: the page with an example workflow, read as Templates reads it."""

    def load(name: str):
        page.evaluate(
            """async ([pack, name]) => {
                const answer = await fetch(`/api/workflow_templates/${pack}/${name}.json`);
                const options = {openSource: "template"};
                await app.loadGraphData(await answer.json(), true, true, name, options);
            }""",
            [pages.PACK_FOLDER, name],
        )
        page.wait_for_function(pages.IS_READY)
        return page

    return load


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def api_form(page) -> dict:
    """The graph as Run would send it, as the twins in tests/workflows spell it."""
    return {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in page.evaluate(API_FORM).items()
    }


def set_widgets(page, node_type: str, **values):
    page.evaluate(
        """([type, values]) => {
            const node = app.rootGraph.nodes.find(node => node.type === type);
            for (const [name, value] of Object.entries(values))
                node.widgets.find(widget => widget.name === name).value = value;
        }""",
        [node_type, values],
    )


def run(page):
    page.get_by_test_id("queue-button").click()


def outputs_of_run(page, server, node_type: str) -> dict:
    """The newest job's outputs, once a node of this type shows a picture."""
    page.wait_for_function(
        """type => app.rootGraph.nodes.some(node => node.type === type
            && app.nodeOutputs[node.id]?.images?.length)""",
        arg=node_type,
    )
    page.wait_for_function("() => !app.runningNodeId")
    (entry,) = server.request("/history?max_items=1").values()
    return entry["outputs"]
