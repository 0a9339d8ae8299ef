"""A ComfyUI with the pack and its page in Chromium, for tests/browser and draw_help_pictures.py.

Needs playwright, Chromium (`CHROMIUM` names it, else it is looked for) and ComfyUI in COMFYUI_PATH.
No model files are there, so krea2-nano does what is run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Playwright

from headless import ROOT, ComfyServer

PACK_FOLDER = "comfyui-krea2-kit"
# Milliseconds: two busy cores may take their time.
PATIENCE = 60_000

# The page opens a workflow of its own first, and takes a selection away with it.
IS_READY = """() => window.app?.extensionManager?.workflow.activeWorkflow && app.rootGraph
    && LiteGraph.registered_node_types.K2Loader && !app.extensionManager.workflow.isBusy"""

HAS_TYPES = "types => app.rootGraph.nodes.map(node => node.type).sort().join() === types"


def page_server(base: Path, previews: str) -> ComfyServer:
    """A server that keeps its files in `base`, an input image among them; not yet started."""
    (base / "input").mkdir(parents=True)
    Image.linear_gradient("L").save(base / "input" / "example.png")
    # Else a newcomer is met by the template browser, over everything.
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    return ComfyServer(
        os.environ["COMFYUI_PATH"],
        base,
        packs={PACK_FOLDER: ROOT},
        extra_args=["--cpu", "--preview-method", previews],
    )


def launch_chromium(playwright: Playwright) -> Browser:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)))
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


def new_context(browser: Browser, width: int = 1280, height: int = 800) -> BrowserContext:
    """A visitor of its own, as drafts are restored, who does not reach beyond this machine."""
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(PATIENCE)
    context.route("**/*api.comfy.org/**", lambda route: route.abort())
    return context


def open_page(page: Page, server: ComfyServer, query: str = "") -> None:
    page.goto(f"http://{server.address}/{query}")
    page.wait_for_function(IS_READY)


def open_template(page: Page, server: ComfyServer, name: str) -> None:
    """Open an example workflow as Templates does."""
    file = ROOT / "example_workflows" / f"{name}.json"
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    # By type, since ComfyUI's first workflow may have as many.
    types = sorted(node["type"] for node in nodes)
    open_page(page, server, f"?template={name}&source={PACK_FOLDER}")
    page.wait_for_function(HAS_TYPES, arg=",".join(types))
    page.wait_for_function(IS_READY)
