"""The help pages beside the schemas of the nodes: names, order and defaults."""

from pathlib import Path

import pytest

from in_process import NODES

DOCS = Path(__file__).resolve().parents[2] / "web/docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}


def rows(page: str, section: str) -> dict[str, list[str]]:
    """The rows of a section's first table by the name in their first cell, header left out."""
    body = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    table = body.strip().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {first: rest for first, *rest in cells}


def test_every_node_has_a_page_and_every_page_a_node():
    assert sorted(PAGES) == sorted(NODES)


@pytest.mark.parametrize("name", sorted(NODES))
def test_page_names_what_the_schema_has(name):
    schema, page = NODES[name].GET_SCHEMA(), PAGES[name]
    outputs = [each.display_name or each.get_io_type() for each in schema.outputs]
    assert page.startswith(f"# {schema.display_name}\n")
    assert list(rows(page, "Inputs")) == [f"`{each.id}`" for each in schema.inputs]
    assert list(rows(page, "Outputs")) == [f"`{output}`" for output in outputs]


@pytest.mark.parametrize("name", sorted(NODES))
def test_page_gives_the_defaults_of_the_schema(name):
    table = rows(PAGES[name], "Inputs")
    for entry in NODES[name].GET_SCHEMA().inputs:
        default = getattr(entry, "default", None)
        if isinstance(default, bool):
            default = "on" if default else "off"
        if default not in (None, ""):
            assert table[f"`{entry.id}`"][-1] == f"`{default}`", f"{name}: default of {entry.id}"
