"""Pictures for the VAE alone: overlapping shapes in colours of all kinds."""

from __future__ import annotations

from random import Random

import numpy as np

from .scenes import COLOURS, SHAPES, outline, paint, ruled_paper, signed_distance


def practice_picture(random: Random, size: int) -> np.ndarray:
    """A picture of overlapping shapes in colours of all kinds: more than the scenes hold."""
    if random.random() < 0.12:
        picture = ruled_paper(size, size)
        picture = np.roll(picture, random.randrange(16), axis=0)
        outlined = 1.0
    else:
        picture = np.empty((size, size, 3), dtype=np.float32)
        picture[:] = practice_colour(random)
        outlined = 0.25
    for _ in range(random.choice((1, 1, 2, 2, 3))):
        radius = random.uniform(6, 32)
        distance = signed_distance(
            random.choice(SHAPES), size, size, random.uniform(0, size), random.uniform(0, size),
            radius,
        )  # fmt: skip
        if random.random() < outlined:
            stroke = random.uniform(3, 6)
            distance = outline(distance, stroke)
        paint(picture, distance, practice_colour(random))
    return picture


def practice_colour(random: Random) -> np.ndarray:
    """A colour of the scenes, near one of them, or any."""
    kind = random.random()
    if kind < 0.2:
        return np.array([random.random() for _ in range(3)], dtype=np.float32)
    colour = np.array(random.choice(list(COLOURS.values())), dtype=np.float32) / 255
    if kind < 0.5:
        colour += np.array([random.uniform(-0.1, 0.1) for _ in range(3)], dtype=np.float32)
    return colour.clip(0, 1)
