"""The help pages against the nodes, read without ComfyUI: names, order, defaults, messages.

The nodes are parsed and not imported. What builds an input is followed by hand (`_inputs`), and
anything unknown there is an error, so that no input is overlooked.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web/docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Node(NamedTuple):
    """A schema as the source spells it; `inputs` are names with written-out defaults or None."""

    display_name: str
    inputs: dict[str, str | None]
    outputs: list[str]


def read_nodes() -> dict[str, Node]:
    nodes = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for call in ast.walk(module):
            fields = _keywords(call)
            if "node_id" not in fields:
                continue
            inputs = [pair for item in fields["inputs"].elts for pair in _inputs(item, module)]
            name = fields["node_id"].value
            assert name not in nodes and len(dict(inputs)) == len(inputs), f"{name} is doubled"
            outputs = [_output(output) for output in fields["outputs"].elts]
            nodes[name] = Node(fields["display_name"].value, dict(inputs), outputs)
    return nodes


def _keywords(call: ast.AST) -> dict:
    if not isinstance(call, ast.Call):
        return {}
    return {keyword.arg: keyword.value for keyword in call.keywords}


def _inputs(item, module, loop=None):
    """Name and default of each input that an element of `inputs=[...]` stands for."""
    loop = loop or {}
    match item:
        case ast.Starred(value=ast.GeneratorExp(elt=made, generators=[each])):
            for value in each.iter.elts:
                yield from _inputs(made, module, {each.target.id: value.value})
        case ast.Name(id=name):
            yield from _inputs(_assigned(name, module), module)
        case ast.Call(func=ast.Attribute(attr="Input"), args=[ast.Constant(value=name), *_]):
            yield name, _default(item)
        case ast.Call(func=ast.Attribute(attr="Input"), args=[ast.Name(id=name), *_]):
            yield loop[name], _default(item)
        case ast.Call(func=ast.Name(id=name)):
            yield from _inputs(_returned(name, module), module)
        case _:
            raise AssertionError(f"`{ast.unparse(item)}`: teach _inputs to read this")


def _default(call: ast.Call) -> str | None:
    """A default that is written out, as the page spells it; an empty text needs no spelling."""
    default = _keywords(call).get("default")
    value = default.value if isinstance(default, ast.Constant) else ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) or None


def _assigned(name: str, module: ast.Module):
    for line in module.body:
        if isinstance(line, ast.Assign) and any(ast.unparse(t) == name for t in line.targets):
            return line.value
    raise AssertionError(f"{name} is not assigned in this module")


def _returned(name: str, module: ast.Module):
    for line in module.body:
        if isinstance(line, ast.FunctionDef) and line.name == name:
            return line.body[-1].value
    raise AssertionError(f"{name} is not defined in this module")


def _output(call: ast.Call) -> str:
    """The name a socket shows: its own, or its type's."""
    named = _keywords(call).get("display_name")
    return named.value if named else call.func.value.attr.upper()


def rows(page: str, section: str) -> dict[str, list[str]]:
    """The rows of a section's first table by the name in their first cell, header left out."""
    body = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    table = body.strip().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {first: rest for first, *rest in cells}


def message_patterns() -> list[re.Pattern]:
    """Every longer text in the source as a pattern, with anything where a value is filled in."""
    patterns = []
    for folder in ("nodes", "krea2_model"):
        for path in (ROOT / folder).rglob("*.py"):
            for text in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                fixed = [p.value for p in parts if isinstance(p, ast.Constant)]
                if not all(isinstance(p, str) for p in fixed) or len("".join(fixed)) < 20:
                    continue
                patterns.append(re.compile("".join(map(_pattern, parts)), re.DOTALL))
    return patterns


def _pattern(part) -> str:
    if not isinstance(part, ast.Constant):
        return ".+?"
    return re.sub("%[sdr]", ".+?", re.escape(part.value))


NODES = read_nodes()
PATTERNS = message_patterns()
QUOTES = [
    (name, quote)
    for name, page in [*sorted(PAGES.items()), ("README", README)]
    for quote in re.findall(r"^ *> (.+)$", page, re.MULTILINE)
]


def test_nodes_are_read_whole():
    """What the reader finds for the two nodes that use every way of making inputs."""
    assert list(NODES["K2EmptyLatent"].inputs) == [
        "aspect", "megapixels", "width", "height", "batch", "swap",
    ]  # fmt: skip
    assert NODES["K2EmptyLatent"].outputs == ["LATENT", "width", "height"]
    assert list(NODES["K2Sigmas"].inputs) == [
        "model", "latent", "preset", "steps", "denoise", "shift", "mu", "start_sigma",
    ]  # fmt: skip
    assert NODES["K2Sigmas"].inputs["steps"] == "28"
    assert NODES["K2TextEncode"].inputs["official_length"] == "off"


def test_every_node_has_a_page_and_every_page_a_node():
    table = ast.parse((ROOT / "nodes/__init__.py").read_text(encoding="utf-8"))
    listed = [name.id for name in _assigned("NODES", table).elts]
    assert sorted(PAGES) == sorted(NODES) == sorted(listed)


@pytest.mark.parametrize("name", sorted(NODES))
def test_page_names_what_the_schema_has(name):
    node, page = NODES[name], PAGES[name]
    assert page.startswith(f"# {node.display_name}\n")
    assert list(rows(page, "Inputs")) == [f"`{name}`" for name in node.inputs]
    assert list(rows(page, "Outputs")) == [f"`{name}`" for name in node.outputs]


@pytest.mark.parametrize("name", sorted(NODES))
def test_page_gives_the_defaults_of_the_schema(name):
    table = rows(PAGES[name], "Inputs")
    for field, default in NODES[name].inputs.items():
        if default is not None:
            assert table[f"`{field}`"][-1] == f"`{default}`", f"{name}: default of {field}"


def test_every_page_has_a_small_picture_and_every_picture_a_page():
    """Addresses are relative to web/docs, from where the page fetches them."""
    shown = {name: re.findall(r"!\[.+\]\((.+)\)", page) for name, page in PAGES.items()}
    assert all(shown.values())
    pictures = {str(path.relative_to(DOCS)) for path in (DOCS / "pictures").iterdir()}
    assert {address for addresses in shown.values() for address in addresses} == pictures
    assert all((DOCS / address).stat().st_size < 60_000 for address in pictures)


def test_pages_quote_messages():
    assert len(QUOTES) > 20


@pytest.mark.parametrize("name, quote", QUOTES, ids=[f"{n}-{q[:30]}" for n, q in QUOTES])
def test_quoted_messages_are_those_of_the_code(name, quote):
    assert any(pattern.fullmatch(quote) for pattern in PATTERNS), f"{name}.md quotes: {quote}"
