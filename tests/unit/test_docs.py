"""README.md and docs/: links lead to files and headings, and the lists are complete."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(([^)\s]+)(?: "[^"]*")?\)|\b(?:src|href)="([^"]+)"')


def links(page: Path) -> list[str]:
    """The relative addresses of links and images, code left out."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    addresses = ["".join(match) for match in LINK.findall(text)]
    return [address for address in addresses if not re.match("[a-z]+:", address)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for address in links(page):
        path, _, anchor = address.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page.name} links {address}"
        assert not anchor or anchor in anchors(target), f"{page.name} links {address}"


def test_the_index_links_every_page():
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert sorted(links(DOCS / "README.md")) == sorted(pages)


def test_every_node_and_template_is_listed():
    text = (DOCS / "nodes.md").read_text(encoding="utf-8")
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, node in nodes.items():
        assert f"| [{node['display_name']}](../web/docs/{name}.md) |" in text
    for workflow in (ROOT / "example_workflows").glob("*.json"):
        assert f"| {workflow.stem} |" in text
