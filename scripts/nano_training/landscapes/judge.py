"""Reads a landscape back: is it the one that a prompt asks for?

Each question (which time of day, which ground, is there a red house on the left ...) is answered by
comparison: the landscape asked for and its alternatives are drawn several times, and the picture
has to be nearest to the landscape asked for. What is compared are statistics that do not depend on
exact places: mean colours of broad regions, colours of thirds as histograms, fine detail by rows.
Each statistic counts by how little it varies among drawings of the same landscape. So the score
depends on no other model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

from .drawing import draw
from .scene import (
    BACKDROPS,
    GROUNDS,
    LAND,
    SIDES,
    STYLES,
    THINGS,
    TIMES,
    WATER,
    WEATHERS,
    Landscape,
    Part,
)

DRAWINGS = {"rows": 12, "detail": 10, "regions": 4, "thirds": 8, "sky thirds": 4}  # of each scene
TOO_SMALL = ("bird", "rabbit")  # to be told from what else varies at their place
_GRID = 64  # pictures are compared at this many pixels a side
_FINE_GRID = 128  # and their style at this many
_LEVELS = 5  # of each channel in a histogram

Features = Callable[[np.ndarray], np.ndarray]


def judge_landscape(
    picture: np.ndarray, scene: Landscape, asked: Collection[str] | None = None
) -> dict[str, bool]:
    """Which parts of a landscape a picture (H, W, 3) in [0, 1] gets right.

    time, ground, backdrop, weather, light (sun or moon, and its side), style, and each of the
    first three things by number: "thing 1" is right where its kind and colour are on its side.
    Birds and rabbits are too small to be asked for.

    asked: the questions to answer; None answers all.
    """
    height, width = picture.shape[:2]
    result = {}
    for question, (scenes, name) in questions(scene).items():
        if asked is not None and question not in asked:
            continue
        features = _FEATURES[name]
        # Half the size has the same proportions and takes less time to draw.
        half = 2 if min(width, height) >= 192 else 1
        means, weights = _statistics(scenes, name, width // half, height // half)
        found = features(_resized(picture, _grid(name)))
        distances = (np.square(found - means) * weights).sum(axis=1)
        result[question] = bool(distances.argmin() == 0)
    return result


def questions(scene: Landscape) -> dict[str, tuple[tuple[Landscape, ...], str]]:
    """The landscape and its alternatives by question, and the statistics that tell them apart."""
    found = {
        "ground": (_varied(scene, "ground", GROUNDS), "regions"),
        "backdrop": (_varied(scene, "backdrop", BACKDROPS), "rows"),
        "weather": (_varied(scene, "weather", WEATHERS), "rows"),
        "style": (_varied(scene, "style", STYLES), "detail"),
    }
    if scene.style != "neon":
        found["time"] = (_times(scene), "regions")
    if scene.light:
        others = [replace(scene, side=side) for side in SIDES if side != scene.side]
        hidden = replace(scene, light="", side="")
        found["light"] = ((scene, *others, hidden), "sky thirds")
    for index, part in enumerate(scene.parts[:3]):
        if part.kind in TOO_SMALL:
            continue
        others = [_with(scene, index, other) for other in _other_parts(part)]
        found[f"thing {index + 1}"] = ((scene, *others, _with(scene, index, None)), "thirds")
    return found


def _varied(scene: Landscape, name: str, values: tuple[str, ...]) -> tuple[Landscape, ...]:
    """The landscape, and those that differ in one field."""
    others = [value for value in values if value != getattr(scene, name)]
    return scene, *(replace(scene, **{name: value}) for value in others)


def _times(scene: Landscape) -> tuple[Landscape, ...]:
    """The landscape at all times of day, with the sun or the moon as it has to be."""
    others = []
    for time in TIMES:
        if time != scene.time:
            light = "moon" if time == "night" else "sun"
            others.append(replace(scene, time=time, light=light if scene.light else ""))
    return scene, *others


def _with(scene: Landscape, index: int, part: Part | None) -> Landscape:
    """The landscape with another part in one's place, or without it."""
    parts = list(scene.parts)
    parts[index : index + 1] = [part] if part else []
    return replace(scene, parts=tuple(parts))


def _other_parts(part: Part) -> list[Part]:
    """Parts that a picture might show instead: elsewhere, in other colours, of other kinds."""
    others = [replace(part, side=side) for side in SIDES if side != part.side]
    habitat, colours = THINGS[part.kind]
    others += [replace(part, colour=colour) for colour in colours if colour != part.colour]
    similar = {LAND: ("house", "round tree", "sheep", "fir tree"), WATER: ("sailing boat", "duck")}
    for kind in similar.get(habitat, ("bird", "balloon")):
        if kind != part.kind:
            others.append(replace(part, kind=kind, colour=THINGS[kind][1][0]))
    return others


@lru_cache(4096)
def _statistics(
    scenes: tuple[Landscape, ...], name: str, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means (scenes, N) of the features of several drawings, and the weight (N,) of each."""
    features = _FEATURES[name]
    drawn = np.stack(
        [
            [
                features(_resized(_drawing(scene, width, height, index), _grid(name)))
                for index in range(DRAWINGS[name])
            ]
            for scene in scenes
        ]
    )
    within = drawn.var(axis=1, ddof=1).mean(axis=0)
    means = drawn.mean(axis=1)
    # What hardly varies in few drawings may vary in others.
    weights = 1 / (within + 0.1 * within.mean() + 1e-5)
    return means, weights


@lru_cache(1024)
def _drawing(scene: Landscape, width: int, height: int, index: int) -> np.ndarray:
    return draw(scene, width, height, Random(f"drawing {index}"))


def _grid(name: str) -> int:
    return _FINE_GRID if name == "detail" else _GRID


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture at the size of comparison, (side, side, 3), by area means."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    return np.asarray(image.resize((side, side), Image.BOX), dtype=np.float32) / 255


def _regions(picture: np.ndarray) -> np.ndarray:
    """Mean colours of an 8 by 8 grid."""
    return picture.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)).reshape(-1)


def _rows(picture: np.ndarray) -> np.ndarray:
    """Of 32 bands from top to bottom: mean colour, spread along the row, and fine detail."""
    bands = picture.reshape(32, 2 * _GRID, 3)
    fine = np.abs(np.diff(picture, axis=1)).reshape(32, -1, 3)
    parts = (bands.mean(axis=1), bands.std(axis=1), 2 * fine.mean(axis=1))
    return np.concatenate(parts, axis=1).reshape(-1)


def _detail(picture: np.ndarray) -> np.ndarray:
    """Edges by strength, in both directions and across, darkness, and saturation by quantiles."""
    down, along = np.abs(np.diff(picture, axis=0)), np.abs(np.diff(picture, axis=1))
    second = np.abs(np.diff(picture, n=2, axis=1))
    shares = np.linspace(0.1, 0.98, 16)
    values = [np.quantile(part.mean(axis=2), shares) for part in (down, along, second)]
    bright, grey = picture.max(axis=2), picture.min(axis=2)
    values += [np.quantile(part, shares) for part in (bright, grey, bright - grey)]
    return np.concatenate([*values, picture.reshape(4, _FINE_GRID // 4, -1).mean(axis=(1, 2))])


def _thirds(picture: np.ndarray) -> np.ndarray:
    """Colours of six fields, three beside each other in the sky and three below, as histograms."""
    row = round(0.57 * _GRID)
    return np.concatenate([_side_histograms(picture[:row]), _side_histograms(picture[row:])])


def _sky_thirds(picture: np.ndarray) -> np.ndarray:
    return _side_histograms(picture[: round(0.55 * _GRID)])


def _side_histograms(picture: np.ndarray) -> np.ndarray:
    edges = (0, round(0.35 * _GRID), round(0.65 * _GRID), _GRID)
    return np.concatenate(
        [_histogram(picture[:, left:right]) for left, right in zip(edges, edges[1:], strict=False)]
    )


def _histogram(picture: np.ndarray) -> np.ndarray:
    """Root shares of colours; each pixel counts for its neighbouring levels (125 in all)."""
    place = picture.reshape(-1, 3) * (_LEVELS - 1)
    low = np.minimum(place.astype(np.intp), _LEVELS - 2)
    rest = place - low
    total = np.zeros(_LEVELS**3)
    for corner in np.ndindex(2, 2, 2):
        share = np.prod([rest[:, c] if up else 1 - rest[:, c] for c, up in enumerate(corner)], 0)
        index = low + np.array(corner)
        flat = (index[:, 0] * _LEVELS + index[:, 1]) * _LEVELS + index[:, 2]
        total += np.bincount(flat, share, _LEVELS**3)
    return np.sqrt(total / len(place))


_FEATURES: dict[str, Features] = {
    "regions": _regions,
    "rows": _rows,
    "detail": _detail,
    "thirds": _thirds,
    "sky thirds": _sky_thirds,
}
