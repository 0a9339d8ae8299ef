"""Scenes as plain training data: a folder of pictures with captions, for `krea2 pretrain`.

    python scripts/nano_training/write_folder.py FOLDER --pictures 8000

The scenes are those that nano Raw learns from, none of the exam's. Picture and captions depend on
the picture's number alone, so a longer folder begins with the shorter one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from nano_training.scenes import PICTURE_SIZES, caption, draw, random_scene, tokens_of_things  # noqa: E402

CAPTIONS = 2
CHUNK = 100  # pictures that a process draws at a time
BACKGROUND = 64  # of 255 in masks: things weigh four times as much


def write_folder(
    folder: Path,
    pictures: int,
    captions: int = CAPTIONS,
    side: int = 128,
    workers: int = 0,
    masks: bool = False,
) -> None:
    """Write so many pictures (PNG) with so many captions each, on all cores.

    side: of the square ones; others have nearly their area. workers: processes that draw; 0 draws
        in this one. masks: a mask beside each picture, for a loss that leans towards things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, pictures, CHUNK)
    write = partial(_write_chunk, folder, pictures, captions, side, masks)
    if workers < 2:
        list(map(write, starts))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write, starts))


def _write_chunk(
    folder: Path, pictures: int, captions: int, side: int, masks: bool, start: int
) -> None:
    for number in range(start, min(start + CHUNK, pictures)):
        random = Random(f"folder {number}")
        scene = random_scene(random)
        texts = [caption(scene, random) for _ in range(captions)]
        size = random.choices(list(PICTURE_SIZES), weights=PICTURE_SIZES.values())[0]
        width, height = (side * pixels // 128 for pixels in size)
        picture = draw(scene, width, height, random)
        pixels = (picture * 255).round().astype(np.uint8)
        stem = folder / f"{number:06}"
        # Flat colours are small at any level; a low one is the fastest.
        Image.fromarray(pixels).save(stem.with_suffix(".png"), compress_level=1)
        if masks:
            tokens = np.where(tokens_of_things(picture), 255, BACKGROUND).astype(np.uint8)
            mask = tokens.repeat(16, axis=0).repeat(16, axis=1)
            Image.fromarray(mask).save(f"{stem}.mask.png", compress_level=1)
        stem.with_suffix(".txt").write_text("\n---\n".join(texts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="of each picture")
    parser.add_argument("--side", type=int, default=128, help="in pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--masks", action="store_true", help="that lean towards things")
    options = parser.parse_args()
    write_folder(
        options.folder, options.pictures, options.captions, options.side, options.workers,
        options.masks,
    )  # fmt: skip


if __name__ == "__main__":
    main()
