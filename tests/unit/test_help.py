"""The help pages and docs/ beside the code: pictures, and the messages they quote.

tests/comfy/test_help.py compares them with the nodes' schemas.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web/docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
GUIDES = {
    f"docs/{path.stem}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")
}


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


PATTERNS = message_patterns()
QUOTES = [
    (name, quote)
    for name, page in sorted((PAGES | GUIDES).items())
    for quote in re.findall(r"^ *> (.+)$", page, re.MULTILINE)
]


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
