"""results.json: what the check measured, by section, rewritten whole with every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# States of a section. A process that dies leaves "running" behind.
RUNNING, DONE, FAILED, SKIPPED = "running", "done", "failed", "skipped"


class Results:
    """The file in an output folder; several processes write it one after the other."""

    def __init__(self, folder: Path):
        self.path = folder / "results.json"
        self.content: dict[str, Any] = {"run": {}, "sections": {}}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text())

    def begin(self, name: str) -> None:
        self.content["sections"][name] = {"state": RUNNING, "rows": []}
        self.write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.content["sections"][name]["rows"].append(row)
        self.write()

    def end(self, name: str, state: str, seconds: float = 0.0, error: str = "") -> None:
        section = self.content["sections"].setdefault(name, {"rows": []})
        section |= {"state": state, "seconds": round(seconds, 1)}
        if error:
            section["error"] = error
        self.write()

    def rows(self, name: str) -> list[dict[str, Any]]:
        return self.content["sections"].get(name, {}).get("rows", [])

    def state(self, name: str) -> str | None:
        return self.content["sections"].get(name, {}).get("state")

    def write(self) -> None:
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)
