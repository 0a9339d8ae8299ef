"""Outlines that a picture follows: what the control LoRA learns, and its exam.

The control image shows the edges of things, white on black, as ComfyUI's Canny node draws them. It
says where things are and how large; the caption names colours and shapes, and mostly leaves place
and size out. Things lie anywhere and have any size, while captions alone know nine places and two
sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import numpy as np
from scipy import ndimage

from .scenes import (
    PLACES,
    Scene,
    Thing,
    caption,
    outline,
    paint,
    random_scene,
    rgb,
    signed_distance,
)

_GAP = 3  # pixels between things, and between a thing and the border
# Words that say where a thing in the centre is, or how large a large one.
_OF_PLACE = {"centre", "center", "middle", "large", "big"}
# Thresholds of the edge filter for brightness in [0, 1].
_LOW, _HIGH = 0.1, 0.2


@dataclass(frozen=True)
class Drawn:
    """A scene whose things have places of their own: centre and radius in pixels each."""

    scene: Scene
    spots: tuple[tuple[float, float, float], ...]
    width: int = 128
    height: int = 128

    def distances(self) -> list[np.ndarray]:
        """Of each thing the distance (H, W) to its edge, negative inside."""
        result = []
        for thing, spot in zip(self.scene.things, self.spots, strict=True):
            distance = signed_distance(thing.shape, self.width, self.height, *spot)
            if thing.outlined:
                distance = outline(distance, 0.04 * min(self.width, self.height))
            result.append(distance)
        return result

    def picture(self) -> np.ndarray:
        """(H, W, 3) float32 in [0, 1]."""
        return self._painted(
            rgb(self.scene.background), [rgb(thing.colour) for thing in self.scene.things]
        )

    def outlines(self) -> np.ndarray:
        """The control image (H, W, 3): edges of the things, drawn in black on white."""
        return edges(self.drawing())

    def drawing(self) -> np.ndarray:
        """The things in black on white (H, W, 3), whatever their colours."""
        return self._painted(np.ones(3, np.float32), [np.zeros(3)] * len(self.spots))

    def mask(self) -> np.ndarray:
        """Pixels (H, W) that things cover."""
        return np.minimum.reduce(self.distances()) < 0

    def _painted(self, background: np.ndarray, colours: list[np.ndarray]) -> np.ndarray:
        picture = np.broadcast_to(background, (self.height, self.width, 3)).copy()
        for distance, colour in zip(self.distances(), colours, strict=True):
            paint(picture, distance, colour)
        return picture


@dataclass(frozen=True)
class OutlineCase:
    """A prompt that names colours and shapes, and the picture whose outlines it is to follow."""

    prompt: str
    drawn: Drawn


def edges(picture: np.ndarray, low: float = _LOW, high: float = _HIGH) -> np.ndarray:
    """Edges of a picture (H, W, 3) in [0, 1], white on black, by Canny's method.

    Blur, gradient, the ridge of its magnitude, and of weak edges those that touch a strong one.
    """
    grey = picture.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    grey = ndimage.gaussian_filter(grey, 1.0, truncate=2.0, mode="reflect")
    across, down = (ndimage.sobel(grey, axis=axis, mode="nearest") for axis in (1, 0))
    magnitude = np.hypot(across, down)
    # The direction of the gradient in eighths of a turn, as steps (row, column).
    eighth = np.round(np.arctan2(down, across) / (np.pi / 4)).astype(int) % 8
    steps = np.array(((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)))
    rows, columns = np.indices(magnitude.shape)
    padded = np.pad(magnitude, 1)
    ahead, behind = (
        padded[rows + 1 + sign * steps[eighth, 0], columns + 1 + sign * steps[eighth, 1]]
        for sign in (1, -1)
    )
    # Of two equal neighbours across an edge the left or the upper one counts.
    backward = (eighth >= 3) & (eighth <= 6)
    first, second = np.where(backward, ahead, behind), np.where(backward, behind, ahead)
    ridge = np.where((magnitude > first) & (magnitude >= second), magnitude, 0)
    regions, count = ndimage.label(ridge > low, np.ones((3, 3)))
    strong = np.zeros(count + 1, bool)
    strong[np.unique(regions[ridge > high])] = True
    strong[0] = False
    return np.repeat(strong[regions][..., None], 3, axis=2).astype(np.float32)


def random_drawn(
    random: Random, width: int = 128, height: int = 128, held_out: bool = False, things=None
) -> Drawn:
    """A scene with one or two things anywhere, of any size that fits and apart."""
    scene = random_scene(random, held_out=held_out, things=things)
    side = min(width, height)
    while True:
        most = 0.34 if len(scene.things) == 1 else 0.22
        spots = []
        for _ in scene.things:
            radius = side * random.uniform(0.13, most)
            low, high = radius * 1.1 + _GAP, -(radius * 1.1 + _GAP)
            if width + high <= low or height + high <= low:
                break
            column, row = (random.uniform(low, length + high) for length in (width, height))
            spots.append((column, row, radius))
        if len(spots) == len(scene.things) and _apart(spots):
            break
    if len(spots) == 2:
        # Of two, the first is the left or the upper one, as in the words of a caption.
        axis = 0 if scene.things[0].place == "left" else 1
        spots.sort(key=lambda spot: spot[axis])
    return Drawn(scene, tuple(spots), width, height)


def _apart(spots) -> bool:
    if len(spots) < 2:
        return True
    (x, y, r), (u, v, s) = spots
    return np.hypot(x - u, y - v) > 1.1 * (r + s) + _GAP


def place_of(drawn: Drawn) -> Scene:
    """The scene in the nearest places and sizes that captions have words for; of one thing."""
    (thing,), ((column, row, radius),) = drawn.scene.things, drawn.spots
    where = column / drawn.width, row / drawn.height
    place = min(PLACES, key=lambda name: np.hypot(*np.subtract(PLACES[name], where)))
    size = "small" if radius < 0.165 * min(drawn.width, drawn.height) else "large"
    return replace(drawn.scene, things=(replace(thing, place=place, size=size),))


def without_place(scene: Scene) -> Scene:
    """The scene whose caption says nothing of places and sizes; of one thing."""
    things: tuple[Thing, ...] = tuple(
        replace(thing, place="centre", size="large") for thing in scene.things
    )
    return replace(scene, things=things)


def words_of(drawn: Drawn, random: Random, stated: float = 0.0) -> str:
    """A caption; stated: the share that names the place. Of two things it names their order."""
    if len(drawn.scene.things) == 2:
        things = tuple(replace(thing, size="large") for thing in drawn.scene.things)
        return caption(replace(drawn.scene, things=things), random, brief=0)
    if random.random() < stated:
        return caption(place_of(drawn), random, brief=0)
    while True:
        text = caption(without_place(drawn.scene), random, brief=0)
        if not _OF_PLACE & set(text.lower().rstrip(".").replace(",", " ").split()):
            return text


def outline_exam(count: int = 40) -> list[OutlineCase]:
    """One filled thing somewhere, in a combination of colours that training never shows.

    The prompt says nothing of its place and size.
    """
    random = Random("outline exam")
    cases: list[OutlineCase] = []
    while len(cases) < count:
        drawn = random_drawn(random, held_out=True, things=1)
        if not drawn.scene.things[0].outlined:
            cases.append(OutlineCase(words_of(drawn, random), drawn))
    return cases


def overlap(picture: np.ndarray, drawn: Drawn, background: np.ndarray) -> float:
    """Intersection over union of what differs from the background, and the things' mask."""
    contrast = np.abs(picture - background).max(axis=2)
    if (strong := contrast > 0.15).sum() == 0:
        return 0.0
    found = contrast > 0.5 * np.quantile(contrast[strong], 0.9)
    wanted = drawn.mask()
    return float((found & wanted).sum() / (found | wanted).sum())
