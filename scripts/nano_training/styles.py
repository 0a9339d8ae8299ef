"""The exam of style transfer: the layout of a prompt on the background of a style picture.

Prompts name a thing and its place, no background, which nano then paints white. The style picture
shows another thing elsewhere, on a coloured background.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from .judge import background_colour, judge, read_thing
from .scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    rgb,
    ruled_paper,
    signed_distance,
)

# Farthest colour, in RGB, of a pixel that shows a thing's own.
_NEAR = 0.25


@dataclass(frozen=True)
class StyleCase:
    """A prompt for a scene on white, and the scene of its style picture."""

    prompt: str
    scene: Scene
    style: Scene


def style_exam(count: int = 40, seed: str = "style exam") -> list[StyleCase]:
    """Cases whose thing on the style's background is a combination that training never shows."""
    random, cases = Random(seed), []
    colours = [colour for colour in COLOURS if colour != "white"]
    while len(cases) < count:
        background, colour, other = random.sample(colours, 3)
        shapes, places = random.sample(SHAPES, 2), random.sample(list(PLACES), 2)
        asked = Thing(shapes[0], colour, places[0])
        if not Scene((asked,), background).is_held_out:
            continue
        scene = Scene((asked,), "white")
        shown = Scene((Thing(shapes[1], other, places[1]),), background)
        cases.append(StyleCase(caption(scene, random, brief=0), scene, shown))
    return cases


def colour_moved(picture: np.ndarray, plain: np.ndarray, case: StyleCase) -> float:
    """How far the background has moved from that of a plain picture to the style's; 1 is all."""
    start = background_colour(plain)
    way = rgb(case.style.background) - start
    return float((background_colour(picture) - start) @ way / (way @ way))


def texture_moved(picture: np.ndarray) -> float:
    """The share of ruled paper's lines that a picture has; 1 is all."""
    lines = ruled_paper(*picture.shape[1::-1])
    wanted, found = (rows.mean(axis=(1, 2)) for rows in (lines, picture))
    wanted = wanted - wanted.mean()
    return float((found - found.mean()) @ wanted / (wanted @ wanted))


def keeps_layout(picture: np.ndarray, case: StyleCase) -> bool:
    """True if the thing has the prompt's shape and place."""
    found = judge(picture, case.scene)
    return found["shape"] and found["place"]


def keeps_layout_on_lines(picture: np.ndarray, case: StyleCase) -> bool:
    """The same on ruled paper, read against the ends of each row of pixels.

    Against a single colour the lines themselves count as things: then only 57 % of pictures that
    are drawn as they should be pass.
    """
    ends = np.concatenate((picture[:, :4], picture[:, -4:]), axis=1)
    found, thing = read_thing(picture, np.median(ends, axis=1, keepdims=True)), case.scene.things[0]
    return found is not None and (found.shape, found.place) == (thing.shape, thing.place)


def keeps_colour(picture: np.ndarray, case: StyleCase) -> bool:
    """True if the thing has the prompt's colour."""
    return judge(picture, case.scene)["colour"]


def leaks(picture: np.ndarray, case: StyleCase) -> bool:
    """True if the colour of the style's thing covers 1 % of the picture beside the prompt's."""
    height, width = picture.shape[:2]
    (asked,), (shown,) = case.scene.things, case.style.things
    column, row = PLACES[asked.place]
    radius = SIZES[asked.size] * min(width, height)
    distance = signed_distance(asked.shape, width, height, column * width, row * height, radius)
    near = np.linalg.norm(picture - rgb(shown.colour), axis=2) < _NEAR
    return bool((near & (distance > 4)).mean() > 0.01)
