"""The real page: a ComfyUI server with the pack, and Chromium on it; see scripts/page.py."""

import json
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import page as pages  # noqa: E402

expect.set_options(timeout=pages.PATIENCE)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with pages.page_server(tmp_path_factory.mktemp("server"), "latent2rgb") as running:
        yield running


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = pages.launch_chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium):
    """A page in a context of its own. It fails the test on an error in a script, ComfyUI's own
    included."""
    contexts, errors = [], []

    def new():
        contexts.append(pages.new_context(chromium))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield new
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def open_page(new_page, server):
    """`open_page()`: the page, ready."""

    def open_():
        page = new_page()
        pages.open_page(page, server)
        return page

    return open_


@pytest.fixture
def open_template(new_page, server):
    """`open_template(name)`: the page with an example workflow, as it opens from Templates."""

    def open_(name: str):
        page = new_page()
        pages.open_template(page, server, name)
        return page

    return open_


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
