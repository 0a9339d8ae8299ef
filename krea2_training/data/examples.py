"""Training data: pictures and captions of a folder or a table, and the sizes they are trained at.

A folder has pictures of any names; `cat.txt` beside `cat.png` is its caption. Captions of several
lengths are parted by a line of `---`. `cat.mask.png` weighs the loss (white counts, black does
not), `cat.ref1.png` and `cat.ref2.png` are references. A table (.jsonl, .csv, .parquet) has columns
image (or file_name), caption (or text, captions), and perhaps crop (x, y, width, height in pixels),
mask, references.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from PIL.Image import open as open_image

from krea2_model.checks import counted
from krea2_model.images.picture_files import COMPANION, PICTURES, pictures_in
from krea2_model.images.sizes import size_for_area

from ..settings.sections import MAX_REFERENCES, Data
from .tables import TABLES, read_rows, read_text, source_of

# The setting of a caption for all pictures, in messages.
FOR_ALL = 'data.caption for all ("a photo of sks dog"; "" trains without words)'
# Between captions of one picture.
PARTING = "---"
# Widest and tallest picture, as width to height; others are cropped to it.
MAX_ASPECT = 4.0
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Example:
    """A picture to train on, before anything is read of it.

    image, mask, references: paths, or the bytes of a file in a Parquet table.
    crop: left, top, width, height in pixels.
    """

    name: str
    image: Path | bytes
    captions: tuple[str, ...]
    crop: tuple[int, int, int, int] | None = None
    mask: Path | bytes | None = None
    references: tuple[Path | bytes, ...] = ()


@dataclass(frozen=True)
class Sized:
    """An example at one of its training sizes, in pixels."""

    example: Example
    width: int
    height: int


@dataclass(frozen=True)
class Draw:
    """A picture in a batch, and the caption it has there; None is the empty prompt."""

    index: int
    caption: str | None


def read_examples(data: Data, for_all: str = FOR_ALL, setting: str = "data.path") -> list[Example]:
    """The examples of a folder or table. Raises ValueError, naming rows, for those without use.

    for_all: as `captioned` takes it. setting: that names the folder or table.
    """
    path = data.path
    assert path is not None
    if path.is_dir():
        examples = read_folder(path)
    elif path.suffix.lower() in TABLES and path.is_file():
        examples = [_row(row, index, path) for index, row in enumerate(read_rows(path), start=1)]
    else:
        raise ValueError(
            f"{setting} is {path}, which is no folder and no table; expected a folder of pictures, "
            "or a .jsonl, .csv or .parquet file."
        )
    if not examples:
        kinds = ", ".join(sorted(PICTURES))
        raise ValueError(f"{path} holds no pictures; expected at least one of {kinds}.")
    return captioned(examples, data, for_all)


def captioned(examples: Sequence[Example], data: Data, for_all: str = FOR_ALL) -> list[Example]:
    """Examples with the trigger before their captions, and the common one where they have none.

    Raises ValueError for pictures without a caption, naming them. for_all: names that setting.
    """
    bare = [one.name for one in examples if not one.captions]
    if bare and data.caption is None:
        raise ValueError(
            f"{len(bare)} of {counted(len(examples), 'picture')} without a caption: "
            f"{some_of(bare)}. Write one beside each ({Path(bare[0]).stem}.txt), or set {for_all}."
        )
    return [replace(one, captions=_captions_of(one, data)) for one in examples]


def sized(examples: Sequence[Example], data: Data) -> list[Sized]:
    """Every example at each resolution, at the size of its own shape; opens each picture's header.

    Raises ValueError for pictures that cannot be opened, or whose mask or references cannot, naming
    them.
    """
    found: list[Sized] = []
    broken = []
    for example in examples:
        try:
            width, height = example_size(example)
            _check_companions(example)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            broken.append(f"{example.name} ({error})")
            continue
        for side in data.resolution:
            found += [Sized(example, *bucket_size(width, height, side))] * data.repeats
    if broken:
        raise ValueError(
            f"{counted(len(broken), 'picture')} cannot be read: {some_of(broken)}. Replace or "
            "remove them."
        )
    return found


def example_size(example: Example) -> tuple[int, int]:
    """Width and height of a picture as it will be trained, upright and cropped."""
    width, height = _upright_size(example.image)
    if example.crop is None:
        return width, height
    left, top, across, down = example.crop
    if min(left, top) < 0 or min(across, down) < 1 or left + across > width or top + down > height:
        raise ValueError(f"crop {example.crop} lies outside of {width} x {height} px")
    return across, down


def _upright_size(source: Path | bytes) -> tuple[int, int]:
    with open_image(opened(source)) as image:
        width, height = image.size
        is_lying = image.getexif().get(0x0112, 1) >= 5
    return (height, width) if is_lying else (width, height)


def _check_companions(example: Example) -> None:
    """Raise ValueError for a mask or a reference that cannot be used, by its header."""
    references = enumerate(example.references, start=1)
    for name, source in (("mask", example.mask), *((f"reference {n}", s) for n, s in references)):
        try:
            if source is not None:
                open_image(opened(source)).close()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"its {name}: {error}") from error
    if example.crop is None or example.mask is None:
        return
    size, expected = (_upright_size(source) for source in (example.mask, example.image))
    if size != expected:
        raise ValueError(
            f"its mask of {size[0]} x {size[1]} px is cropped with it, and it has {expected[0]} x "
            f"{expected[1]} px"
        )


def opened(source: Path | bytes) -> Path | io.BytesIO:
    """A source as Pillow opens it."""
    return io.BytesIO(source) if isinstance(source, bytes) else source


def bucket_size(width: float, height: float, side: int) -> tuple[int, int]:
    """Width and height, in multiples of 16, of the area side x side and a picture's shape.

    Shapes are grouped in steps of an eighth of the aspect's logarithm to base 2, so that pictures
    of nearly the same shape share batches; what is over is cropped.
    """
    octaves = round(8 * math.log2(min(MAX_ASPECT, max(1 / MAX_ASPECT, width / height)))) / 8
    return size_for_area(2.0 ** (octaves / 2), 2.0 ** (-octaves / 2), (side / 1024) ** 2)


def crop_to(width: int, height: int, bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a picture that training sees in a bucket: left, top, width, height in pixels.

    In its middle, and rounded to whole pixels: what is over is cut off at both ends alike.
    """
    scale = min(width / bucket[0], height / bucket[1])
    across, down = min(width, round(scale * bucket[0])), min(height, round(scale * bucket[1]))
    return (width - across) // 2, (height - down) // 2, across, down


class Order:
    """The batches of a run: each step's can be computed by itself, so a run resumes anywhere.

    An epoch goes through all pictures once, in batches of one size, in an order of its own. Each
    picture takes one of its captions by chance, or none. ranks: processes that share a step's
    pictures, which each have a batch of their own.
    """

    def __init__(
        self, pictures: Sequence[Sized], batch: int, dropout: float, seed: int, ranks: int = 1
    ):
        self.pictures = pictures
        self.batch_size, self.dropout, self.seed, self.ranks = batch, dropout, seed, ranks
        groups: dict[tuple, list[int]] = {}
        for index, one in enumerate(pictures):
            # References join the sequence: pictures share a batch with as many of them.
            key = (one.width, one.height, len(one.example.references))
            groups.setdefault(key, []).append(index)
        self._groups = list(groups.values())
        self.batches_per_epoch = sum(-(-len(g) // (batch * ranks)) for g in self._groups)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, number: int, rank: int = 0) -> list[Draw]:
        """The batch of a number from 0 up, of one of the ranks."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        random = Random(f"captions {self.seed} {number} {rank}")
        own = self._epoch[1][place][rank :: self.ranks]
        return [Draw(index, self._caption(index, random)) for index in own]

    def _batches(self, epoch: int) -> list[list[int]]:
        random = Random(f"order {self.seed} {epoch}")
        batches = []
        size = self.batch_size * self.ranks
        for group in self._groups:
            indices = random.sample(group, len(group))
            # The last batch is filled up, so that every rank has as many and steps weigh the same.
            while len(indices) % size:
                indices.append(random.choice(group))
            batches += [indices[start : start + size] for start in range(0, len(indices), size)]
        random.shuffle(batches)
        return batches

    def _caption(self, index: int, random: Random) -> str | None:
        captions = self.pictures[index].example.captions
        chosen = random.choice(captions)
        return None if random.random() < self.dropout or not chosen else chosen


def digest(examples: Iterable[Example], hash_of: Callable[[Path | bytes], str]) -> str:
    """A hash of pictures and captions, for the metadata of what was trained on them.

    hash_of: `content_hash`, or one that knows the files already.
    """
    total = hashlib.sha256()
    for example in examples:
        total.update(hash_of(example.image).encode())
        total.update("\0".join(example.captions).encode())
    return total.hexdigest()


def content_hash(source: Path | bytes) -> str:
    """SHA-256 of a file's content."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _captions_of(example: Example, data: Data) -> tuple[str, ...]:
    captions = example.captions
    if not captions and data.caption is not None:
        captions = (data.caption,)
    trigger = data.trigger.strip()
    if not trigger:
        return captions
    return tuple(f"{trigger}, {text}" if text else trigger for text in captions)


def read_folder(folder: Path) -> list[Example]:
    """The pictures of a folder, with the captions and companions that lie beside them."""
    files = set(pictures_in(folder))
    companions = {file for file in files if COMPANION.search(file.stem)}
    by_stem = {file.with_suffix(""): file for file in companions}
    examples = []
    for file in sorted(files - companions):
        stem = file.with_suffix("")
        references = [by_stem.get(stem.with_name(f"{stem.name}.ref{n}")) for n in (1, 2)]
        text = file.with_suffix(".txt")
        examples.append(
            Example(
                str(file.relative_to(folder)),
                file,
                split_captions(read_text(text)) if text.is_file() else (),
                mask=by_stem.get(stem.with_name(f"{stem.name}.mask")),
                references=tuple(one for one in references if one is not None),
            )
        )
    return examples


def split_captions(text: str) -> tuple[str, ...]:
    """The captions of a text file: one, or several parted by lines of `---`."""
    parts = re.split(rf"^\s*{PARTING}\s*$", text, flags=re.MULTILINE)
    return tuple(part.strip() for part in parts if part.strip())


def _row(row: Mapping[str, Any], number: int, path: Path) -> Example:
    where = f"{path.name}, row {number}"
    source = _first(row, "image", "file_name", "path")
    if source is None:
        raise ValueError(f"{where} has no picture; expected a column image (or file_name).")
    captions = _several(row, where, "a text", str, "captions", "caption", "text", "prompt")
    references = _several(row, where, "a picture", (str, bytes, dict), "references", "reference")
    if len(references) > MAX_REFERENCES:
        raise ValueError(
            f"{where} has {len(references)} references; expected at most {MAX_REFERENCES}."
        )
    mask = row.get("mask")
    return Example(
        f"row {number}" if not isinstance(source, str) else source,
        source_of(source, where, path),
        tuple(text.strip() for text in captions if text.strip()),
        _crop(row.get("crop"), where),
        None if mask in (None, "") else source_of(mask, where, path),
        tuple(source_of(one, where, path) for one in references),
    )


def _several(
    row: Mapping[str, Any], where: str, what: str, kind: type | tuple[type, ...], *names: str
) -> list[Any]:
    """The entries of the first of some columns that has any: one, or a list of them.

    what: one is, for messages. Empty entries are left out.
    """
    value = _first(row, *names)
    entries = [value] if isinstance(value, kind) or not isinstance(value, list) else value
    entries = [entry for entry in entries if entry is not None]
    if wrong := [entry for entry in entries if not isinstance(entry, kind)]:
        name = next(name for name in names if row.get(name) is value)
        raise ValueError(
            f"{where}: {name} has {str(wrong[0])[:60]}; expected {what}, or a list of them."
        )
    return entries


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _crop(value: Any, where: str) -> tuple[int, int, int, int] | None:
    if value in (None, ""):
        return None
    if isinstance(value, str):
        value = re.split(r"[,\s]+", value.strip(" []()"))
    try:
        left, top, width, height = (int(part) for part in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: crop is {value!r}; expected x, y, width, height in pixels."
        ) from error
    return left, top, width, height


def some_of(names: Sequence[str]) -> str:
    """The first of some names, for a message, and the number of the others."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
