"""What a run leaves beside the weights: one JSON file with all numbers, and one picture of sheets.

Both are written anew whenever something is added, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from krea2_model.images.contact_sheet import contact_sheet

COLUMNS = 8
CELL = 160


class Report:
    """Numbers and sample sheets of a run in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.numbers: dict[str, Any] = {}
        self.sheets: list[np.ndarray] = []

    def add(self, name: str, value: Any) -> None:
        """Add a number, or anything that JSON has."""
        self.numbers[name] = value
        self.numbers["seconds"] = round(time.monotonic() - self.started, 1)
        self._replace("report.json", json.dumps(self.numbers, indent=1).encode())

    def add_losses(self, stage: str, log: Path) -> None:
        """Add the losses of a stage, at most fifty of them."""
        if log.is_file():
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            self.add(f"{stage} losses", lines[:: max(1, len(lines) // 50)])

    def add_sheet(self, pictures: list[np.ndarray]) -> None:
        """Add a sheet of pictures (H, W, 3) in [0, 1], in rows of eight."""
        self.sheets.append(contact_sheet(pictures, columns=COLUMNS, cell=CELL))
        width = max(sheet.shape[1] for sheet in self.sheets)
        rows = [
            np.pad(sheet, ((0, 12), (0, width - sheet.shape[1]), (0, 0)), constant_values=1)
            for sheet in self.sheets
        ]
        image = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
        partial = self.folder / "sheets.partial.png"
        image.save(partial)
        partial.replace(self.folder / "sheets.png")

    def _replace(self, name: str, content: bytes) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(self.folder / name)
