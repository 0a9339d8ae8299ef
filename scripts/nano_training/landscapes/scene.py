"""Landscapes: what they hold, how they are drawn at random, and the exam about them.

A landscape has a time of day with the sun or the moon on one side, a ground, a backdrop at the
horizon, weather, a season where meadows show it, up to four kinds of things, and a style.
`drawing.draw` paints it and `words.caption` describes it. Some combinations are
never drawn for training (`Landscape.is_held_out`), so that prompts about them show understanding.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random

TIMES = ("day", "dawn", "sunset", "night")
LIGHTS = ("sun", "moon", "")
SIDES = ("left", "centre", "right")
GROUNDS = ("meadow", "field", "desert", "beach", "sea", "lake")
BACKDROPS = ("mountains", "hills", "city", "")
WEATHERS = ("clear", "clouds", "rain", "snow", "fog")
SEASONS = ("spring", "summer", "autumn", "winter")
STYLES = ("flat", "outlined", "watercolour", "pastel", "neon", "paper cut", "pixel art")

# Where things stand, and the colours that they come in; "" has colours of its own.
LAND, WATER, SKY = "land", "water", "sky"
PAINTS = ("red", "yellow", "blue", "white")
THINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "house": (LAND, PAINTS),
    "windmill": (LAND, ("",)),
    "castle": (LAND, ("",)),
    "lighthouse": (LAND, ("",)),
    "round tree": (LAND, ("",)),
    "fir tree": (LAND, ("",)),
    "palm tree": (LAND, ("",)),
    "cactus": (LAND, ("",)),
    "sheep": (LAND, ("",)),
    "cat": (LAND, ("orange", "black", "white")),
    "rabbit": (LAND, ("",)),
    "cow": (LAND, ("",)),
    "flower": (LAND, ("red", "yellow", "pink", "white")),
    "sailing boat": (WATER, PAINTS),
    "duck": (WATER, ("",)),
    "fish": (WATER, ("",)),
    "bird": (SKY, ("",)),
    "balloon": (SKY, ("red", "yellow", "blue")),
}
BUILDINGS = ("house", "windmill", "castle", "lighthouse")
TREES = ("round tree", "fir tree", "palm tree", "cactus")
ANIMALS = ("sheep", "cat", "rabbit", "cow", "duck", "fish")
MOST = {
    "round tree": 3,
    "fir tree": 4,
    "palm tree": 2,
    "cactus": 3,
    "sheep": 3,
    "cat": 1,
    "rabbit": 2,
    "cow": 2,
    "duck": 3,
    "fish": 2,
    "flower": 7,
    "bird": 5,
    "sailing boat": 2,
    "house": 2,
}

# Width and height in pixels, and how often each is drawn for training.
PICTURE_SIZES = {(256, 256): 0.55, (128, 128): 0.2, (320, 192): 0.13, (192, 320): 0.12}

_TREES_OF = {
    "meadow": ("round tree", "round tree", "fir tree"),
    "field": ("round tree", "fir tree"),
    "lake": ("fir tree", "fir tree", "round tree"),
    "desert": ("cactus", "palm tree"),
    "beach": ("palm tree",),
}
_ANIMALS_OF = {
    "meadow": ("sheep", "cat", "rabbit", "cow"),
    "field": ("cat", "rabbit"),
    "lake": ("duck",),
    "sea": ("fish",),
    "beach": ("cat",),
    "desert": (),
}
_BUILDINGS_OF = {
    "meadow": ("house", "house", "windmill", "castle"),
    "field": ("house", "windmill"),
    "desert": ("castle",),
    "beach": ("lighthouse",),
    "sea": (),
    "lake": ("house", "castle"),
}


@dataclass(frozen=True)
class Part:
    """Things of one kind that stand together on one side of a picture."""

    kind: str
    side: str = "centre"
    count: int = 1
    colour: str = ""

    @property
    def habitat(self) -> str:
        return THINGS[self.kind][0]


@dataclass(frozen=True)
class Landscape:
    """A landscape; `light` is "" where sun and moon are hidden, `season` where nothing shows it."""

    time: str = "day"
    light: str = "sun"
    side: str = "right"  # of the light
    ground: str = "meadow"
    backdrop: str = "hills"
    weather: str = "clear"
    season: str = ""
    style: str = "flat"
    parts: tuple[Part, ...] = ()

    @property
    def is_held_out(self) -> bool:
        """Whether training never shows this combination: one in ten."""
        kinds = "".join(f" {part.colour} {part.kind}" for part in self.parts[:2])
        names = f"{self.time} {self.ground} {self.backdrop} {self.style}{kinds}"
        return zlib.crc32(names.encode()) % 10 == 0

    @property
    def is_snowy(self) -> bool:
        """Whether snow lies on the ground."""
        return self.season == "winter" or (
            self.weather == "snow" and self.ground in ("meadow", "field", "lake")
        )


def random_landscape(random: Random, held_out: bool = False) -> Landscape:
    """A landscape for training, or one that training never shows."""
    while True:
        scene = _random_landscape(random)
        if scene.is_held_out == held_out:
            return scene


def held_out_landscapes(count: int = 120) -> list[Landscape]:
    """The scenes of the exam: landscapes that training never shows."""
    random = Random("landscape exam")
    return [random_landscape(random, held_out=True) for _ in range(count)]


def _random_landscape(random: Random) -> Landscape:
    style = "flat" if random.random() < 0.4 else random.choice(STYLES[1:])
    time = "night" if style == "neon" else random.choices(TIMES, (0.45, 0.14, 0.19, 0.22))[0]
    ground = random.choice(GROUNDS)
    weathers = {"clear": 0.42, "clouds": 0.28, "rain": 0.1, "snow": 0.1, "fog": 0.1}
    if ground in ("desert", "beach"):
        weathers["snow"] = 0
    weather = random.choices(list(weathers), list(weathers.values()))[0]
    hidden = weather in ("rain", "snow") or random.random() < 0.12
    light = "" if hidden else "moon" if time == "night" else "sun"
    season = ""
    if ground == "meadow":
        season = "winter" if weather == "snow" else random.choice(("", "", *SEASONS))
    side = random.choice(SIDES) if light else ""
    parts = _random_parts(random, ground, season, weather, side)
    backdrop = random.choice(BACKDROPS)
    return Landscape(time, light, side, ground, backdrop, weather, season, style, parts)


def _random_parts(
    random: Random, ground: str, season: str, weather: str, light: str
) -> tuple[Part, ...]:
    """One to four kinds of things, the most striking first, each on a side of its own.

    light: the side of the sun or the moon, which nothing in the sky is to hide.
    """
    sides = random.sample(SIDES, 3)
    kinds = []
    if ground in ("sea", "lake", "beach") and random.random() < 0.6:
        kinds.append("sailing boat")
    if _BUILDINGS_OF[ground] and random.random() < 0.55:
        kinds.append(random.choice(_BUILDINGS_OF[ground]))
    if ground in _TREES_OF and (random.random() < 0.65 or not kinds):
        kinds.append(random.choice(_TREES_OF[ground]))
    if _ANIMALS_OF[ground] and len(kinds) < 3 and random.random() < 0.45:
        kinds.append(random.choice(_ANIMALS_OF[ground]))
    if ground == "meadow" and season != "winter" and len(kinds) < 3 and random.random() < 0.3:
        kinds.append("flower")
    if weather in ("clear", "clouds") and random.random() < (0.3 if kinds else 1):
        kinds.append(random.choice(("bird", "bird", "balloon")))
    if not kinds:
        kinds.append("sailing boat")
    parts = []
    for kind in kinds:
        habitat, colours = THINGS[kind]
        side = sides[len(parts) % 3]
        if habitat == SKY:
            side = random.choice([side for side in SIDES if side != light])
        most = MOST.get(kind, 1)
        if kind in ("flower", "bird"):
            count = random.randint(3, most)
        elif kind in ("house", "sailing boat"):
            count = random.choice((1, 1, 1, 2))
        else:
            count = random.randint(1, most)
        parts.append(Part(kind, side, count, random.choice(colours)))
    return tuple(parts)
