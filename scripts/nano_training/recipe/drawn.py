"""Pictures and captions in chunks, drawn by worker processes ahead of the training.

Nothing here imports torch, so that a worker starts in a second. A chunk depends on its kind, index
and sizes alone. Workers leave pictures in files: they are large, and the system keeps in memory
what is read soon.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ..landscapes.drawing import draw as draw_landscape
from ..landscapes.scene import PICTURE_SIZES, random_landscape
from ..landscapes.words import caption as landscape_caption
from ..practice import practice_picture
from ..references import can_be_told_apart, coloured, layout, mean_palette, random_palette
from ..references import random_reference as reference_scene
from ..scenes import Scene, caption, draw, random_scene

# Of scenes; today's exam is at 128 px.
SCENE_SIZES = {(128, 128): 0.35, (160, 96): 0.1, (96, 160): 0.1, (256, 256): 0.35,
               (320, 192): 0.05, (192, 320): 0.05}  # fmt: skip
PRACTICE_SIDE = 128
TOKEN = 16  # pixels a side


@dataclass
class Chunk:
    """Pictures (N, H, W, 3) uint8 of one size, captions, and where details are (N, H/16, W/16).

    references: further pictures that belong to each, (N, h, w, 3) uint8 each.
    """

    kind: str
    pictures: np.ndarray
    captions: list[str]
    details: np.ndarray
    references: list[np.ndarray]


def draw_chunk(kind: str, index: int, count: int, of: int = 1) -> Chunk:
    """A chunk by its kind and index. of: how many chunks there will be, for kinds that change."""
    random = Random(f"{kind} {index}")
    if kind == "practice":
        pictures = [practice_picture(random, PRACTICE_SIDE) for _ in range(count)]
        return _chunk(kind, pictures, [""] * count)
    if kind == "landscapes":
        size = _choice(PICTURE_SIZES, random)
        landscapes = [random_landscape(random) for _ in range(count)]
        pictures = [draw_landscape(scene, *size, random) for scene in landscapes]
        return _chunk(kind, pictures, [landscape_caption(scene, random) for scene in landscapes])
    size = _choice(SCENE_SIZES, random)
    if kind == "references":
        return _references(index, count, of, size, random)
    scenes = [random_scene(random) for _ in range(count)]
    pictures = [draw(scene, *size, random, kind == "notebook") for scene in scenes]
    return _chunk(kind, pictures, [caption(scene, random) for scene in scenes])


def _references(index: int, count: int, of: int, size: tuple[int, int], random: Random) -> Chunk:
    """Layouts in the colours of other pictures, as `train_reference` explains; easy ones first."""
    kind = random.random()
    shown = 0 if kind < 0.15 else 2 if kind < 0.32 else 1
    white = 0.5 * (1 - index / max(1, of))
    pictures, captions = [], []
    columns: list[list[np.ndarray]] = [[] for _ in range(shown)]
    other_size = _choice(SCENE_SIZES, random)
    for _ in range(count):
        asked, scene, others = _case(shown, white, random)
        pictures.append(draw(scene, *size, random))
        # A colour that only the caption says is not to be guessed in spite of a reference.
        stated = bool(asked.background) or any(thing.colour for thing in asked.things)
        empty = random.random() < 0.1 and (not shown or not stated)
        captions.append("" if empty else caption(asked, random, brief=0))
        for column, other in zip(columns, others, strict=True):
            column.append(draw(other, *other_size, random))
    chunk = _chunk("references", pictures, captions)
    chunk.references = [_pixels(column) for column in columns]
    return chunk


def _case(count: int, white: float, random: Random) -> tuple[Scene, Scene, list[Scene]]:
    """What a caption says, the picture that it asks for, and `count` references."""
    while True:
        asked = random_scene(random)
        if count == 0:
            return asked, asked, []
        whole = random.random() < 0.5 and asked.background != "white"
        # A few state the background or the colours of things in spite of the reference.
        states = random.random() < 0.12
        asked = layout(asked, background=not (states and whole), things=not states)
        palettes = [random_palette(random, white=white)] * count
        if count > 1 and random.random() < 0.5:
            palettes = [random_palette(random, white=white) for _ in range(count)]
        scene = coloured(asked, mean_palette(palettes))
        if can_be_told_apart(scene) and not scene.is_held_out:
            return asked, scene, [reference_scene(palette, random) for palette in palettes]


def details_of(picture: np.ndarray) -> np.ndarray:
    """Tokens (H/16, W/16) bool within which colours differ: edges and small things."""
    rows, columns = picture.shape[0] // TOKEN, picture.shape[1] // TOKEN
    blocks = picture[: rows * TOKEN, : columns * TOKEN]
    blocks = blocks.reshape(rows, TOKEN, columns, TOKEN, 3)
    return (blocks.max(axis=(1, 3)) - blocks.min(axis=(1, 3))).max(axis=-1) > 0.25


def things_of(picture: np.ndarray) -> np.ndarray:
    """Tokens (H/16, W/16) bool that show more than the background of the first pixel."""
    contrast = np.abs(picture - picture[0, 0]).max(axis=2) > 0.1
    rows, columns = picture.shape[0] // TOKEN, picture.shape[1] // TOKEN
    return contrast.reshape(rows, TOKEN, columns, TOKEN).any(axis=(1, 3))


def _chunk(kind: str, pictures: list[np.ndarray], captions: list[str]) -> Chunk:
    where = details_of if kind == "landscapes" else things_of
    details = np.stack([where(picture) for picture in pictures])
    return Chunk(kind, _pixels(pictures), captions, details, [])


def _pixels(pictures: list[np.ndarray]) -> np.ndarray:
    return (np.stack(pictures) * 255).round().astype(np.uint8)


def _choice(sizes: dict[tuple[int, int], float], random: Random) -> tuple[int, int]:
    return random.choices(list(sizes), list(sizes.values()))[0]


def write_chunk(folder: Path, kind: str, index: int, count: int, of: int) -> Path:
    """Draw a chunk into a file, whole or not at all; one that is there already stays."""
    path = folder / f"{kind}_{index}_{count}.npz"
    if not path.is_file():
        chunk = draw_chunk(kind, index, count, of)
        arrays = {f"reference_{i}": pixels for i, pixels in enumerate(chunk.references)}
        words = np.frombuffer(json.dumps(chunk.captions).encode(), np.uint8)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, pictures=chunk.pictures, details=chunk.details, words=words, **arrays)
        partial.replace(path)
    return path


def read_chunk(path: Path) -> Chunk:
    with np.load(path) as arrays:
        captions = json.loads(arrays["words"].tobytes())
        names = sorted(name for name in arrays if name.startswith("reference_"))
        references = [arrays[name] for name in names]
        kind = path.name.split("_")[0]
        return Chunk(kind, arrays["pictures"], captions, arrays["details"], references)


class Artists:
    """Worker processes that draw chunks in the order of the requests; without any, this process.

    `take` gives a chunk as soon as one is ready.
    """

    def __init__(self, folder: Path, workers: int):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context)
        self.requests: dict[str, list[Future | tuple]] = {}

    def request(self, kind: str, chunks: int, count: int, queue: str = "") -> None:
        """Have chunks drawn. queue: under which name they are taken, by default the kind's.

        A chunk that is asked for in two queues is drawn once.
        """
        requests = self.requests.setdefault(queue or kind, [])
        for index in range(chunks):
            task = (self.folder, kind, index, count, chunks)
            requests.append(self.pool.submit(write_chunk, *task) if self.pool else task)

    def waiting(self, queue: str) -> int:
        """Chunks of a queue that have been requested and not been taken."""
        return len(self.requests.get(queue, ()))

    def take(self, queue: str, wait: bool = False) -> Chunk | None:
        """The next chunk of a queue; None where none is ready, or, with `wait`, left."""
        requests = self.requests.get(queue, [])
        if not requests:
            return None
        first = requests[0]
        if isinstance(first, tuple):
            path = write_chunk(*requests.pop(0))
        elif wait or first.done():
            path = requests.pop(0).result()
        else:
            return None
        return read_chunk(path)

    def map(self, function: Callable[..., Any], *columns: list) -> list:
        """A function over arguments, on all workers."""
        return list((self.pool.map if self.pool else map)(function, *columns))

    def cancel(self) -> None:
        """Draw no more, so that the workers are free for other work."""
        for requests in self.requests.values():
            for request in requests:
                if isinstance(request, Future):
                    request.cancel()
            requests.clear()

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
