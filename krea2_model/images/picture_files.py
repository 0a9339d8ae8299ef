"""Files that are read as pictures."""

from __future__ import annotations

import re
from pathlib import Path

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"))
# Ends of the stems of files that belong to a training picture: its mask and its references.
COMPANION = re.compile(r"\.(mask|ref[12])$")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in and below a folder, in order, without those in hidden places of it."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    return sorted(f for f in files if not _is_hidden(f.relative_to(folder)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
