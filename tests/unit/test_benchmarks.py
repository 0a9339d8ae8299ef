"""README's numbers are those of RESULTS.md, and RESULTS.md is what the kept numbers give."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "RESULTS.md"


def test_results_are_those_of_the_kept_numbers(tmp_path):
    copy = tmp_path / "benchmarks"
    copy.mkdir()
    for file in ("__init__.py", "__main__.py", "results.json"):
        (copy / file).write_text((ROOT / "benchmarks" / file).read_text())
    subprocess.run([sys.executable, "-m", "benchmarks", "--report"], cwd=tmp_path, check=True)
    assert (copy / "RESULTS.md").read_text() == REPORT.read_text()


def test_readme_quotes_the_results():
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## Speed and memory")[2].partition("\n## ")[0]
    lines = [line.split("|")[2:-1] for line in section.splitlines() if line.startswith("|")][2:]
    known = set(re.findall(r"\d+(?:\.\d+)?", REPORT.read_text()))
    quoted = [number for line in lines for cell in line
              for number in re.findall(r"\d+(?:\.\d+)?", cell)]  # fmt: skip
    assert len(quoted) > 15
    assert [number for number in quoted if number not in known] == []
