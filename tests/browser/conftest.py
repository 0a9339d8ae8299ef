"""The real page: a ComfyUI server with the pack, and Chromium on it.

Needs playwright, Chromium (`CHROMIUM` names it, else it is looked for) and ComfyUI in COMFYUI_PATH;
see scripts/test.sh. No model files are there, so krea2-nano does what is run.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from headless import ComfyServer  # noqa: E402

PACK_FOLDER = "comfyui-krea2-kit"
# Two busy cores may take their time.
PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)

# The page opens a workflow of its own first, and takes a selection away with it.
IS_READY = """() => window.app?.extensionManager?.workflow.activeWorkflow && app.rootGraph
    && LiteGraph.registered_node_types.K2Loader && !app.extensionManager.workflow.isBusy"""


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    (base / "input").mkdir()
    Image.linear_gradient("L").save(base / "input" / "example.png")
    # Else a newcomer is met by the template browser, over everything.
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    flags = ["--cpu", "--preview-method", "latent2rgb"]
    packs = {PACK_FOLDER: ROOT}
    comfyui = os.environ["COMFYUI_PATH"]
    with ComfyServer(comfyui, base, packs=packs, extra_args=flags) as running:
        yield running


@pytest.fixture(scope="session")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, chromium):
    """`open_page("?template=...")`: the page in a context of its own, ready. It fails the test on
    an error in a script, ComfyUI's own included."""
    contexts, errors = [], []

    def open_(query: str = ""):
        context = chromium.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        context.route("**/*api.comfy.org/**", lambda route: route.abort())
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://{server.address}/{query}")
        page.wait_for_function(IS_READY)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def open_template(open_page):
    """`open_template(name)`: the page with an example workflow, as it opens from Templates."""

    def open_(name: str):
        page = open_page(f"?template={name}&source={PACK_FOLDER}")
        count = len(read_json(ROOT / "example_workflows" / f"{name}.json")["nodes"])
        page.wait_for_function("count => app.rootGraph.nodes.length === count", arg=count)
        page.wait_for_function(IS_READY)
        return page

    return open_


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
