"""Checks and words that all arguments share."""

import ast
import re
from pathlib import Path

import pytest

from krea2_model.checks import by_count, counted, there_are

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("krea2_model", "krea2_rendering", "krea2_training", "nodes")
# A number that is 1 now and then, as it stands in the source.
COUNT = re.compile(r"len\(\w+\)|count|\w+\.numel\(\)")


@pytest.mark.parametrize(
    "count, tiles, masses",
    [(0, "0 tiles", "0 masses"), (1, "1 tile", "1 mass"), (2, "2 tiles", "2 masses")],
)
def test_words_go_with_their_counts(count, tiles, masses):
    assert counted(count, "tile") == tiles and counted(count, "mass", "masses") == masses
    assert there_are(count, "tile") == f"There {'is' if count == 1 else 'are'} {tiles}"
    assert by_count(count, "it", "they") == ("it" if count == 1 else "they")


def texts():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node.values


def test_no_message_says_a_part_of_1_pictures():
    """`N of M pictures` where M is a number of them."""
    found = [
        f"{place} {ast.unparse(value.value)}"
        for place, parts in texts()
        for before, value, after in zip(parts, parts[1:], parts[2:], strict=False)
        if isinstance(value, ast.FormattedValue)
        and isinstance(before, ast.Constant)
        and before.value.endswith((" of ", " for "))
        and isinstance(after, ast.Constant)
        and re.match(r" (pictures|images|rows|files|prompts|tiles|areas|captions)\b", after.value)
        and COUNT.fullmatch(ast.unparse(value.value))
    ]
    assert not found
