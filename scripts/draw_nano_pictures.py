"""Draws krea2-nano's pictures to train on: shapes on blueprint paper, with captions beside them.

python scripts/draw_nano_pictures.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from nano_training.scenes import PLACES, SHAPES, Scene, Thing, draw, rgb

FOLDER = Path(__file__).resolve().parents[1] / "krea2_model" / "nano" / "pictures"
PAPER, LINES, EVERY = "#2450a4", (126, 160, 226), 12
COLOURS = ("red", "yellow", "green", "pink", "orange", "cyan")
COUNT, SIDE = 12, 128


def blueprint(scene: Scene, side: int) -> np.ndarray:
    """A scene (H, W, 3) in [0, 1] on paper with lines, which go behind its shapes."""
    picture = draw(scene, side, side)
    paper = np.abs(picture - rgb(PAPER)).max(axis=-1) < 0.01
    rows, columns = np.indices(paper.shape)
    lines = (rows % EVERY == EVERY // 2) | (columns % EVERY == EVERY // 2)
    picture[paper & lines] = np.array(LINES) / 255
    return picture


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    random, places = Random(5), list(PLACES)
    for number in range(COUNT):
        shape, colour = SHAPES[number % len(SHAPES)], COLOURS[number % len(COLOURS)]
        thing = Thing(shape, colour, places[0] if number % 3 == 0 else random.choice(places))
        # The caption leaves the paper out: it is what the LoRA learns.
        words = f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
        if thing.place != "centre":
            words += f" {'in' if ' ' in thing.place else 'at'} the {thing.place}"
        pixels = (blueprint(Scene((thing,), PAPER), SIDE) * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels).quantize(32, dither=Image.Dither.NONE)
        image.save(folder / f"{number + 1:02}.png", optimize=True)
        (folder / f"{number + 1:02}.txt").write_text(words + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
