"""Reads a picture back: which shape, in which colour, where, on which background.

Plain image analysis with the vocabulary of scenes.py, so that a score does not depend on another
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .scenes import COLOURS, PLACES, SHAPES, Scene, outline, rgb, signed_distance

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32) / 255
_CANVAS = 32
_SMALLEST = 40  # pixels
_CLOSE = 0.2  # distance in RGB; no two named colours are nearer than 0.32


@dataclass(frozen=True)
class Reading:
    """What was found of one thing; `area` in pixels, `centre` as fractions of the sides.

    `colour` is the nearest name for `rgb`, whose parts are in [0, 1]; `overlaps` is how well each
    shape fits, from 0 to 1, and `shape` fits best.
    """

    shape: str
    colour: str
    rgb: tuple[float, float, float]
    centre: tuple[float, float]
    area: int
    overlaps: Mapping[str, float]

    @property
    def place(self) -> str:
        column, row = self.centre
        return min(
            PLACES, key=lambda name: np.hypot(PLACES[name][0] - column, PLACES[name][1] - row)
        )


def seam_step(picture: np.ndarray, columns: Sequence[int], rows: Sequence[int]) -> float:
    """Mean step across seams of a picture (H, W, 3) in [0, 1] above that elsewhere, in 255ths.

    columns, rows: first pixels behind the seams.
    """
    excess = []
    for axis, seams in ((1, columns), (0, rows)):
        steps = 255 * np.abs(np.diff(picture, axis=axis)).mean(axis=(1 - axis, 2))
        is_seam = np.isin(np.arange(len(steps)), np.asarray(seams, dtype=int) - 1)
        excess.append(steps[is_seam] - steps[~is_seam].mean())
    return float(np.concatenate(excess).mean())


def colour_name(colour: np.ndarray) -> str:
    """The nearest name for a colour (3,) in [0, 1]."""
    return list(COLOURS)[int(np.square(_PALETTE - colour).sum(axis=1).argmin())]


def is_colour(found: Sequence[float] | np.ndarray, wanted: str) -> bool:
    """Whether a wanted name is the nearest to a colour, or a wanted "#rrggbb" is close to it."""
    if wanted in COLOURS:
        return colour_name(np.asarray(found)) == wanted
    return bool(np.linalg.norm(np.asarray(found) - rgb(wanted)) < _CLOSE)


def background_colour(picture: np.ndarray) -> np.ndarray:
    """The median of a picture's border, (3,) in [0, 1]."""
    border = (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in border]), axis=0)


def read_thing(picture: np.ndarray, background: np.ndarray | None = None) -> Reading | None:
    """The thing in a picture (H, W, 3) in [0, 1], or None where there is next to nothing."""
    background = background_colour(picture) if background is None else background
    contrast = np.abs(picture - background).max(axis=2)
    mask = contrast > 0.15
    if mask.sum() < _SMALLEST:
        return None
    strong = contrast >= 0.8 * np.quantile(contrast[mask], 0.9)
    colour = np.median(picture[strong], axis=0)
    mask = contrast > 0.5 * np.quantile(contrast[mask], 0.9)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = mask.shape
    centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
    overlaps = _overlaps(mask[top:bottom, left:right])
    shape = max(overlaps, key=lambda name: overlaps[name])
    name = colour_name(colour)
    return Reading(shape, name, tuple(colour.tolist()), centre, int(mask.sum()), overlaps)


def read_two(picture: np.ndarray, side_by_side: bool) -> tuple[Reading | None, Reading | None]:
    """The things in the left and right half of a picture, or in the upper and lower one."""
    background = background_colour(picture)
    first, second = np.array_split(picture, 2, axis=1 if side_by_side else 0)
    return read_thing(first, background), read_thing(second, background)


def judge(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which parts of a scene a picture gets right.

    One thing: background, colour, shape, place. Two: background, colours (both, each on its own
    side) and shapes (likewise).
    """
    result = {"background": is_colour(background_colour(picture), scene.background)}
    if len(scene.things) == 1:
        thing, found = scene.things[0], read_thing(picture)
        result["colour"] = found is not None and is_colour(found.rgb, thing.colour)
        result["shape"] = found is not None and found.shape == thing.shape
        result["place"] = found is not None and found.place == thing.place
        return result
    readings = read_two(picture, scene.things[0].place == "left")
    pairs = list(zip(readings, scene.things, strict=True))
    result["two colours"] = all(f is not None and is_colour(f.rgb, t.colour) for f, t in pairs)
    result["two shapes"] = all(f is not None and f.shape == t.shape for f, t in pairs)
    return result


def shape_margins(picture: np.ndarray, scene: Scene) -> list[float]:
    """How much better each wanted shape of a scene fits than any other, from -1 to 1."""
    if len(scene.things) == 1:
        readings: Sequence[Reading | None] = [read_thing(picture)]
    else:
        readings = read_two(picture, scene.things[0].place == "left")
    margins = []
    for reading, thing in zip(readings, scene.things, strict=True):
        fits = dict(reading.overlaps) if reading is not None else {}
        margins.append(fits.pop(thing.shape) - max(fits.values()) if fits else -1.0)
    return margins


def _overlaps(mask: np.ndarray) -> dict[str, float]:
    """How far each shape's drawing overlaps a mask, both stretched to the same square."""
    mask = _stretch(mask)
    return {
        name: max((mask & template).sum() / (mask | template).sum() for template in templates)
        for name, templates in _templates().items()
    }


@cache
def _templates() -> dict[str, list[np.ndarray]]:
    """Masks of each shape, filled and as outlines of several weights, cut to their extent."""
    templates = {}
    for shape in SHAPES:
        distance = signed_distance(shape, 256, 256, 128, 128, 90)
        masks = [distance < 0]
        if shape != "ring":
            masks += [outline(distance, s) < 0 for s in (14, 20, 30)]
        templates[shape] = [_stretch(mask) for mask in masks]
    return templates


def _stretch(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    rows = np.linspace(rows[0], rows[-1], _CANVAS).round().astype(int)
    columns = np.linspace(columns[0], columns[-1], _CANVAS).round().astype(int)
    return mask[np.ix_(rows, columns)]
