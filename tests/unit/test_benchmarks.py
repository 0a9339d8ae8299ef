"""The numbers of docs/ are those of RESULTS.md, which is written from the saved ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "RESULTS.md"
GPU_RESULTS = ROOT / "benchmarks" / "gpu" / "results.json"


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
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?", tables)  # not of names, such as fp8
    known = set(re.findall(r"\d+(?:\.\d+)?", REPORT.read_text(encoding="utf-8")))
    known |= numbers_of_the_gpu()
    assert len(numbers) >= least
    assert [number for number in numbers if number not in known] == []


def numbers_of_the_gpu() -> set[str]:
    """Whole milliseconds, how many times as long core takes, and what these are of."""
    sections = json.loads(GPU_RESULTS.read_text(encoding="utf-8"))["sections"].values()
    values = [pair for section in sections for row in section["rows"] for pair in row.items()]
    found = {f"{v:.0f}" for name, v in values if name.endswith("_ms") and v is not None}
    ratios = {
        f"{v[0]:.2f}" for name, v in values if isinstance(v, list) and name.endswith("_ratio")
    }
    return found | ratios | {str(v) for name, v in values if name == "pixels"}


def test_the_readme_quotes_the_results():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = re.search(r"Raw takes ([\d.]+ s) where ComfyUI's own code takes ([\d.]+ s)", readme)
    report = REPORT.read_text(encoding="utf-8")
    for name, seconds in zip(("ours", "core"), found.groups(), strict=True):
        assert re.search(rf"^\| {name} \|.*\| {seconds} \|", report, re.MULTILINE), name
