"""Pairs of pictures of one prompt, of which the first is preferred.

A folder has `fox.better.png` and `fox.worse.png`, with the prompt in `fox.txt` or in the settings
that krea2 writes into pictures. A table (.jsonl, .csv, .parquet) has columns prompt, chosen and
rejected: paths relative to it, or the bytes of files. `krea2 pick` makes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea2_model.checks import counted
from krea2_model.images.picture_files import pictures_in

from ..settings.checks import check, check_side
from .examples import (
    Example,
    Sized,
    bucket_size,
    example_size,
    some_of,
)
from .tables import TABLES, read_rows, read_text, source_of

BETTER, WORSE = ".better", ".worse"
# Widths to heights of a pair may differ by so much: both are cropped to one.
_MOST_ASPECT = 1.5


@dataclass(frozen=True)
class Pairs:
    """path: a folder or a table. resolution: side of a square of the area of the pictures.

    cache: folder of the encoded pictures and prompts; None is "cache" in the run's folder.
    """

    path: Path | None = None
    resolution: int = 1024
    cache: Path | None = None

    def __post_init__(self):
        check(self.path is not None, "pairs.path", self.path, "a folder or a table of pairs")
        check_side("pairs.resolution", self.resolution)


@dataclass(frozen=True)
class Pair:
    """Two pictures at one size, for a prompt."""

    prompt: str
    chosen: Sized
    rejected: Sized


def read_pairs(pairs: Pairs) -> list[Pair]:
    """The pairs of a folder or table; opens each picture's header.

    Raises ValueError, naming them, for pairs that are not whole, and pictures that cannot be read.
    """
    path = pairs.path
    assert path is not None
    if path.is_dir():
        examples = _read_folder(path)
    elif path.suffix.lower() in TABLES and path.is_file():
        rows = enumerate(read_rows(path), start=1)
        examples = [_row(row, f"{path.name}, row {number}", path) for number, row in rows]
    else:
        raise ValueError(
            f"pairs.path is {path}, which is no folder and no table; expected a folder of "
            "NAME.better.png and NAME.worse.png, or a .jsonl, .csv or .parquet file."
        )
    if not examples:
        raise ValueError(
            f"{path} holds no pairs; expected NAME.better.png and NAME.worse.png of each, or a row "
            "of a table. krea2 pick makes one by clicks."
        )
    return [_sized(*one, pairs.resolution) for one in examples]


def prompt_in(picture: Path) -> str | None:
    """The prompt in a picture's own settings, by krea2 or by ComfyUI with this pack's nodes."""
    # Here, because the settings of a run import no torch.
    from krea2_model.cli.generate import settings_in

    try:
        prompt = settings_in(picture).get("prompt")
    except ValueError:
        return None
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def _read_folder(folder: Path) -> list[tuple[Example, Example]]:
    files = pictures_in(folder)
    by_side = {
        side: {f.with_suffix("").with_suffix(""): f for f in files if f.stem.endswith(side)}
        for side in (BETTER, WORSE)
    }
    better, worse = by_side.values()
    if alone := sorted(str(stem.relative_to(folder)) for stem in better.keys() ^ worse.keys()):
        raise ValueError(
            f"{counted(len(alone), 'picture')} in {folder} without the other: {some_of(alone)}. "
            "Each needs NAME.better.png and NAME.worse.png."
        )
    found: list[tuple[Example, Example]] = []
    bare = []
    for stem, chosen in better.items():
        text = stem.with_suffix(".txt")
        prompt = read_text(text).strip() if text.is_file() else prompt_in(chosen)
        if not prompt:
            bare.append(str(stem.relative_to(folder)))
            continue
        first, second = (Example(f.name, f, (prompt,)) for f in (chosen, worse[stem]))
        found.append((first, second))
    if bare:
        raise ValueError(
            f"{counted(len(bare), 'pair')} in {folder} without a prompt: {some_of(bare)}. Write it "
            f"into {Path(bare[0]).name}.txt beside the pictures."
        )
    return found


def _row(row: dict[str, Any], where: str, table: Path) -> tuple[Example, Example]:
    missing = [name for name in ("prompt", "chosen", "rejected") if not row.get(name)]
    if missing:
        raise ValueError(
            f"{where} has no {', '.join(missing)}; expected columns prompt, chosen and rejected."
        )
    if not isinstance(row["prompt"], str):
        raise ValueError(f"{where}: prompt is {str(row['prompt'])[:60]}; expected a text.")
    prompt = row["prompt"].strip()
    chosen, rejected = (source_of(row[name], where, table) for name in ("chosen", "rejected"))
    return (
        Example(f"{where}, chosen", chosen, (prompt,)),
        Example(f"{where}, rejected", rejected, (prompt,)),
    )


def _sized(chosen: Example, rejected: Example, side: int) -> Pair:
    sizes = []
    for example in (chosen, rejected):
        try:
            sizes.append(example_size(example))
        except (OSError, ValueError) as error:
            raise ValueError(f"{example.name} cannot be read as a picture ({error}).") from error
    (width, height), (other_width, other_height) = sizes
    ratio = width / height / (other_width / other_height)
    if max(ratio, 1 / ratio) > _MOST_ASPECT:
        raise ValueError(
            f"The pictures of {chosen.name} are {width} x {height} and {other_width} x "
            f"{other_height} px; expected one shape, so that the shape is not what is preferred."
        )
    size = bucket_size(width, height, side)
    return Pair(chosen.captions[0], Sized(chosen, *size), Sized(rejected, *size))
