"""A page of the pictures that go: by reason, and duplicates beside the picture that is kept."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from krea2_model.replacing import replacing

from .limits import REASONS
from .table import Row

_TEMPLATE = "sheet.html"
# Pictures of a reason that are shown: a page with more would not open.
SHOWN = 500

# Thumbnails of files, as JPEG, by name; None for those that cannot be read.
Thumbnails = Callable[[Sequence[str]], Mapping[str, bytes | None]]


def write_sheet(path: Path, rows: Sequence[Row], summary: str, thumbnails: Thumbnails) -> None:
    """Write the page. Nothing in it is fetched from elsewhere: thumbnails are inside."""
    by_reason: dict[str, list[Row]] = {reason: [] for reason in REASONS}
    for row in rows:
        for reason in row.reasons:
            by_reason[reason].append(row)
    shown = {reason: gone[:SHOWN] for reason, gone in by_reason.items()}
    files = [name for gone in shown.values() for row in gone for name in _names(row)]
    small = thumbnails(list(dict.fromkeys(files)))
    by_file = {row.file: row for row in rows}
    sections = []
    for reason, gone in by_reason.items():
        if gone:
            more = len(gone) - len(shown[reason])
            title = f"{reason}: {len(gone)}" + (f" (the first {SHOWN} are shown)" if more else "")
            groups = _groups(shown[reason], by_file)
            cells = "".join(_group(group, small) for group in groups)
            sections.append(f"<h2>{escape(title)}</h2>\n<div class='groups'>{cells}</div>\n")
    text = Path(__file__).with_name(_TEMPLATE).read_text(encoding="utf-8")
    text = text.replace("SUMMARY", escape(summary), 1)
    with replacing(path) as partial:
        partial.write_text(text.replace("SECTIONS", "".join(sections), 1), encoding="utf-8")


def _names(row: Row) -> Iterable[str]:
    return (row.file,) if row.duplicate_of is None else (row.duplicate_of, row.file)


def _groups(gone: Sequence[Row], by_file: Mapping[str, Row]) -> list[list[Row]]:
    """Duplicates of one picture together, behind it; every other picture by itself."""
    groups: dict[str, list[Row]] = {}
    for row in gone:
        of = row.duplicate_of
        if of is None:
            groups[row.file] = [row]
        else:
            groups.setdefault(of, [by_file[of]]).append(row)
    return list(groups.values())


def _group(rows: Sequence[Row], thumbnails: Mapping[str, bytes | None]) -> str:
    return f"<div class='group'>{''.join(_figure(row, thumbnails[row.file]) for row in rows)}</div>"


def _figure(row: Row, thumbnail: bytes | None) -> str:
    measures = row.measures
    name = escape(row.file)
    image = "<div class='none'>cannot be read</div>"
    if thumbnail is not None:
        data = base64.b64encode(thumbnail).decode("ascii")
        image = f"<img alt='{name}' src='data:image/jpeg;base64,{data}'>"
    size = f"{measures.width} x {measures.height}" if not measures.error else measures.error
    numbers = (
        f"entropy {measures.entropy:.1f}, black {measures.black:.0%}, white {measures.white:.0%}, "
        f"border {measures.border:.0%}"
    )
    state = "kept" if row.kept else "gone"
    why = "kept" if row.kept else ", ".join(row.reasons)
    return (
        f"<figure class='{state}' title='{escape(numbers)}'>{image}<figcaption><b>{name}</b><br>"
        f"{escape(size)}<br>{escape(why)}</figcaption></figure>"
    )
