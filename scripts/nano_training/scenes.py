"""Flat-colour scenes: what they hold, how they are drawn, how people might describe them.

A scene has one or two shapes on a plain background. What a caption leaves out has a fixed meaning
(centred, large, filled, on white), so that all but the briefest describe one picture, up to a small
jitter of place and size. Some combinations are never drawn for training (`is_held_out`): prompts
about those show what the model understood rather than remembered.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (250, 220, 50),
    "green": (45, 160, 70),
    "cyan": (70, 205, 215),
    "blue": (40, 75, 205),
    "purple": (130, 55, 165),
    "pink": (245, 135, 185),
    "black": (25, 25, 30),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
SYNONYMS = {"circle": "disc", "ring": "hoop", "purple": "violet", "black": "jet black"}

# Column and row of a place, as fractions of the picture's sides.
PLACES = {
    "centre": (0.5, 0.5),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
# Radius as a fraction of the picture's shorter side; huge things are in references only.
SIZES = {"large": 0.21, "small": 0.125, "huge": 0.36}

BRIEF = 0.1  # share of captions that are a word or two

# Width and height in pixels, and how often each is drawn for training.
PICTURE_SIZES = {(128, 128): 0.7, (160, 96): 0.15, (96, 160): 0.15}


@dataclass(frozen=True)
class Thing:
    """One shape of a scene, in a colour by its name or as "#rrggbb"."""

    shape: str
    colour: str
    place: str = "centre"
    size: str = "large"
    outlined: bool = False


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; of two, the first is the left or the upper one."""

    things: tuple[Thing, ...]
    background: str = "white"

    @property
    def is_held_out(self) -> bool:
        """Whether training never shows this combination of colours and shapes: one in ten."""
        names = " ".join(f"{thing.colour} {thing.shape}" for thing in self.things)
        if len(self.things) == 1:
            names += f" on {self.background}"
        return zlib.crc32(names.encode()) % 10 == 0


def random_scene(random: Random, held_out: bool = False, things: int | None = None) -> Scene:
    """A scene for training, or one that training never shows."""
    while True:
        scene = _random_scene(random, things or random.choice((1, 1, 1, 2, 2)))
        if scene.is_held_out == held_out:
            return scene


def held_out_prompts(one: int = 80, two: int = 40) -> list[tuple[str, Scene]]:
    """The exam: prompts for scenes of one and of two things that training never shows."""
    random = Random("exam")
    scenes = [random_scene(random, held_out=True, things=1) for _ in range(one)]
    scenes += [random_scene(random, held_out=True, things=2) for _ in range(two)]
    return [(caption(scene, random, brief=0), scene) for scene in scenes]


def _random_scene(random: Random, count: int) -> Scene:
    plain = random.random() < 0.3
    background = "white" if plain else random.choice(list(COLOURS))
    colours = random.sample([name for name in COLOURS if name != background], count)
    if count == 1:
        places = [random.choice(list(PLACES))]
    else:
        places = list(random.choice((("left", "right"), ("top", "bottom"))))
    things = []
    for colour, place in zip(colours, places, strict=True):
        shape = random.choice(SHAPES)
        # A ring is an outline already.
        outlined = shape != "ring" and random.random() < 0.2
        size = "small" if random.random() < 0.3 else "large"
        things.append(Thing(shape, colour, place, size, outlined))
    return Scene(tuple(things), background)


def caption(scene: Scene, random: Random, brief: float = BRIEF) -> str:
    """One of many wordings for a scene. Colours that are "" are not spoken of."""
    if random.random() < brief:
        return _brief(scene, random)
    if len(scene.things) == 2:
        text = _two_things(scene, random)
    else:
        text = _one_thing(scene.things[0], random)
    if scene.background and (scene.background != "white" or random.random() < 0.25):
        text = _with_background(text, _word(scene.background, random), random)
    # A text that begins with its place or background takes no opening.
    frame = random.random() if text.startswith(("a ", "an ", "the ")) else 1.0
    if frame < 0.15:
        opening = ("a picture of ", "an image of ", "a drawing of ", "a flat illustration of ")
        text = random.choice(opening) + text
    elif frame < 0.25:
        opening = (
            "a simple flat picture with clean edges that shows ",
            "minimal vector art in plain colours, showing ",
            "this is a calm and simple composition of ",
        )
        text = random.choice(opening) + text
    if random.random() < 0.15:
        ending = (
            ", flat colours", ", clean edges", ", minimalist", ", and nothing else",
            ", drawn with sharp edges and no shading at all",
        )  # fmt: skip
        text += random.choice(ending)
    if random.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if random.random() < 0.3 else text


def _brief(scene: Scene, random: Random) -> str:
    """A word or two: the only captions that leave open what a picture holds."""
    thing = random.choice(scene.things)
    return random.choice((
        thing.colour,
        thing.shape,
        with_article(thing.shape),
        f"{thing.colour} on {scene.background}",
        f"{scene.background} background",
        "two shapes" if len(scene.things) == 2 else "one shape",
    ))  # fmt: skip


def _one_thing(thing: Thing, random: Random) -> str:
    name = _name(thing, random)
    if thing.place == "centre":
        if random.random() < 0.6:
            return name
        return f"{name} {random.choice(('in the centre', 'in the center', 'in the middle'))}"
    if " " in thing.place:
        vertical, horizontal = thing.place.split()
        where = random.choice((
            f"in the {thing.place}",
            f"in the {thing.place} corner",
            f"at the {thing.place}",
            f"in the {vertical}-{horizontal} corner",
        ))  # fmt: skip
    elif thing.place in ("left", "right"):
        where = random.choice((
            f"on the {thing.place}",
            f"on the {thing.place} side",
            f"at the {thing.place}",
            f"to the {thing.place}",
        ))  # fmt: skip
    else:
        where = random.choice((f"at the {thing.place}", f"near the {thing.place}"))
    if random.random() < 0.15:
        return f"{where}, {name}"
    return f"{name} {where}"


def _two_things(scene: Scene, random: Random) -> str:
    first, second = scene.things
    names = _name(first, random), _name(second, random)
    if first.place == "left":
        wordings = (
            "{0} left of {1}",
            "{0} to the left of {1}",
            "{1} right of {0}",
            "{1} to the right of {0}",
            "{0} on the left and {1} on the right",
            "{1} on the right and {0} on the left",
            "{0} next to {1}, from left to right",
        )
    else:
        wordings = (
            "{0} above {1}",
            "{0} over {1}",
            "{1} below {0}",
            "{1} under {0}",
            "{0} at the top and {1} at the bottom",
            "{1} at the bottom and {0} at the top",
        )
    return random.choice(wordings).format(*names)


def _name(thing: Thing, random: Random) -> str:
    colour, shape = _word(thing.colour, random), _word(thing.shape, random)
    size = "small" if thing.size == "small" else random.choice(("", "", "", "large", "big"))
    if size == "small" and random.random() < 0.2:
        size = "little"
    wording = random.random()
    if thing.outlined:
        if wording < 0.3:
            return f"the outline of {with_article(f'{size} {colour} {shape}')}"
        hollow = random.choice(("outlined", "hollow"))
        return with_article(f"{size} {hollow} {colour} {shape}")
    if colour and wording < 0.08:
        return with_article(f"{size} {shape} in {colour}")
    if colour and wording < 0.14:
        return with_article(f"{size} {shape} that is {colour}")
    return with_article(f"{size} {colour} {shape}")


def _with_background(text: str, colour: str, random: Random) -> str:
    wording = random.choice((
        "{0} on {2} background",
        "{0} on {2} background",
        "{0} on {2} background",
        "{0} against {2} background",
        "{0} on plain {1}",
        "{0} on {1}",
        "{0} on {1}",
        "{0}, {1} background",
        "{0}, the background is {1}",
        "{0} in front of {2} wall",
        "on {2} background, {0}",
    ))  # fmt: skip
    return wording.format(text, colour, with_article(colour))


def _word(word: str, random: Random) -> str:
    return SYNONYMS[word] if word in SYNONYMS and random.random() < 0.1 else word


def with_article(words: str) -> str:
    words = " ".join(words.split())
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw(
    scene: Scene,
    width: int = 128,
    height: int = 128,
    random: Random | None = None,
    notebook: bool = False,
) -> np.ndarray:
    """The picture of a scene, (H, W, 3) float32 in [0, 1], with anti-aliased edges.

    random: jitters places by up to 3 % of the sides and radii by up to 6 %; None draws the exact
        scene.
    notebook: draws outlines on ruled paper, whatever the background and the fill: the style that
        the nano LoRA learns.
    """
    picture = np.broadcast_to(rgb(scene.background), (height, width, 3)).copy()
    if notebook:
        picture = ruled_paper(width, height)
    for thing in scene.things:
        column, row = PLACES[thing.place]
        radius = SIZES[thing.size] * min(width, height)
        if random is not None:
            column += random.uniform(-0.03, 0.03)
            row += random.uniform(-0.03, 0.03)
            radius *= random.uniform(0.94, 1.06)
        distance = signed_distance(thing.shape, width, height, column * width, row * height, radius)
        if thing.outlined or (notebook and thing.shape != "ring"):
            stroke = 0.04 * min(width, height)
            distance = outline(distance, stroke)
        paint(picture, distance, rgb(thing.colour))
    return picture


def tokens_of_things(picture: np.ndarray) -> np.ndarray:
    """Tokens (rows, columns) bool, 16 px a side, of a picture (H, W, 3) in [0, 1]: those that show
    more than background."""
    contrast = np.abs(picture - picture[0, 0]).max(axis=2) > 0.1
    rows, columns = contrast.shape[0] // 16, contrast.shape[1] // 16
    return contrast.reshape(rows, 16, columns, 16).any(axis=(1, 3))


def rgb(colour: str) -> np.ndarray:
    """A colour by its name or as "#rrggbb": (3,) float32 in [0, 1]."""
    values = COLOURS[colour] if colour in COLOURS else tuple(bytes.fromhex(colour[1:]))
    return np.array(values, dtype=np.float32) / 255


def ruled_paper(width: int, height: int) -> np.ndarray:
    """Cream paper with a pale blue line of 2 px every 16 px."""
    picture = np.empty((height, width, 3), dtype=np.float32)
    picture[:] = np.array((250, 243, 220), dtype=np.float32) / 255
    for row in (14, 15):
        picture[row::16] = np.array((150, 185, 225), dtype=np.float32) / 255
    return picture


def paint(picture: np.ndarray, distance: np.ndarray, colour: Sequence[float] | np.ndarray) -> None:
    """Fill, in place, where a distance in pixels is negative."""
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    picture *= 1 - cover
    picture += cover * np.asarray(colour, dtype=np.float32)


def outline(distance: np.ndarray, stroke: float) -> np.ndarray:
    """The distance to a shape's outline of `stroke` pixels, which lies inside its edge."""
    return np.abs(distance + stroke / 2) - stroke / 2


def signed_distance(
    shape: str, width: int, height: int, column: float, row: float, radius: float
) -> np.ndarray:
    """Distance in pixels from each pixel's centre to a shape's edge, negative inside: (H, W)."""
    x = (np.arange(width, dtype=np.float32) + 0.5 - column)[None, :]
    y = (np.arange(height, dtype=np.float32) + 0.5 - row)[:, None]
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "triangle":
        # Three half planes; the centroid is at the place.
        sides = (np.pi / 2, np.pi / 2 + 2 * np.pi / 3, np.pi / 2 - 2 * np.pi / 3)
        planes = [x * np.cos(side) + y * np.sin(side) for side in sides]
        return np.maximum.reduce(planes) - 0.56 * radius
    if shape == "star":
        return _star_distance(x, y, 1.1 * radius)
    raise ValueError(f"shape is {shape!r}; expected one of {SHAPES}.")


def _star_distance(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """A five-pointed star, tip upwards: fold a tenth of the turn, then one straight edge."""
    angle = np.arctan2(x, -y)
    tenth = np.pi / 5
    folded = np.abs((angle + tenth) % (2 * tenth) - tenth)
    distance = np.hypot(x, y)
    px, py = distance * np.cos(folded), distance * np.sin(folded)
    inner = 0.42 * radius
    tip = np.array((radius, 0.0))
    notch = np.array((inner * np.cos(tenth), inner * np.sin(tenth)))
    edge = notch - tip
    normal = np.array((edge[1], -edge[0])) / np.hypot(*edge)
    return ((px - tip[0]) * normal[0] + (py - tip[1]) * normal[1]).astype(np.float32)
