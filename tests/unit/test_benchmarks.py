"""The numbers of docs/ are those of RESULTS.md, which is written from the saved ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "RESULTS.md"


def test_results_are_those_of_the_kept_numbers(tmp_path):
    copy = tmp_path / "benchmarks"
    copy.mkdir()
    for file in ("__init__.py", "__main__.py", "results.json"):
        (copy / file).write_text((ROOT / "benchmarks" / file).read_text())
    subprocess.run([sys.executable, "-m", "benchmarks", "--report"], cwd=tmp_path, check=True)
    assert (copy / "RESULTS.md").read_text() == REPORT.read_text()


@pytest.mark.parametrize("page, least", [("speed", 40), ("memory", 8)])
def test_pages_quote_the_results(page, least):
    """Every number in the tables of these pages, headings included."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    numbers = re.findall(r"\d+(?:\.\d+)?", tables)
    known = set(re.findall(r"\d+(?:\.\d+)?", REPORT.read_text(encoding="utf-8")))
    assert len(numbers) >= least
    assert [number for number in numbers if number not in known] == []


def test_the_readme_quotes_the_results():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = re.search(r"Raw takes ([\d.]+ s) where ComfyUI's own code takes ([\d.]+ s)", readme)
    report = REPORT.read_text(encoding="utf-8")
    for name, seconds in zip(("ours", "core"), found.groups(), strict=True):
        assert re.search(rf"^\| {name} \|.*\| {seconds} \|", report, re.MULTILINE), name
