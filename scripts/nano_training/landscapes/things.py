"""All things that a landscape can hold, by the names of `scene.THINGS`."""

from __future__ import annotations

from collections.abc import Callable

from . import animals, buildings, plants

# The drawing function of each kind, and its height in hundredths of the picture's shorter side.
DRAWN: dict[str, tuple[Callable[..., None], float]] = {
    "house": (buildings.house, 21),
    "windmill": (buildings.windmill, 33),
    "castle": (buildings.castle, 32),
    "lighthouse": (buildings.lighthouse, 40),
    "round tree": (plants.round_tree, 27),
    "fir tree": (plants.fir_tree, 29),
    "palm tree": (plants.palm_tree, 38),
    "cactus": (plants.cactus, 24),
    "sheep": (animals.sheep, 11),
    "cat": (animals.cat, 15),
    "rabbit": (animals.rabbit, 13),
    "cow": (animals.cow, 16),
    "flower": (plants.flower, 10),
    "sailing boat": (buildings.sailing_boat, 24),
    "duck": (animals.duck, 9),
    "fish": (animals.fish, 12),
    "bird": (animals.bird, 9),
    "balloon": (buildings.balloon, 25),
}
