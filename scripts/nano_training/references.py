"""Pictures that give another one its colours: what the reference LoRA learns, and its exam.

A prompt names the layout, that is shapes, places and sizes, and a reference shows other things in
the colours wanted. Things are in one colour of a palette and the background in the other. What the
caption says of colours counts before what a reference shows; of two references with different
palettes the mean counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from .scenes import COLOURS, Scene, caption, random_scene, rgb

Palette = tuple[str, str]  # of things and of the background

_APART = 0.32  # distance in RGB of the two colours of a palette


@dataclass(frozen=True)
class Case:
    """A prompt without colours, the scene that it asks for in a reference's, and the reference."""

    prompt: str
    scene: Scene
    reference: Scene


def layout(scene: Scene, background: bool = True, things: bool = True) -> Scene:
    """A scene that leaves its colours open: of the background, of things, or both."""
    if things:
        scene = replace(scene, things=tuple(replace(thing, colour="") for thing in scene.things))
    return replace(scene, background="") if background else scene


def coloured(scene: Scene, palette: Palette) -> Scene:
    """A scene with what it leaves open taken from a palette."""
    thing_colour, background = palette
    things = (replace(thing, colour=thing.colour or thing_colour) for thing in scene.things)
    return replace(scene, things=tuple(things), background=scene.background or background)


def can_be_told_apart(scene: Scene) -> bool:
    """Whether every thing is in another colour than the background."""
    behind = rgb(scene.background)
    return all(np.linalg.norm(rgb(thing.colour) - behind) >= 0.3 for thing in scene.things)


def random_palette(random: Random, named: float = 0.5, white: float = 0.0) -> Palette:
    """Two colours far enough apart.

    named: share in named colours, others are in any; white: share on a white background.
    """
    while True:
        if random.random() < named:
            first, second = random.sample(list(COLOURS), 2)
        else:
            first, second = (f"#{random.getrandbits(24):06x}" for _ in range(2))
        if random.random() < white:
            second = "white"
        if first != second and np.linalg.norm(rgb(first) - rgb(second)) >= _APART:
            return first, second


def random_reference(palette: Palette, random: Random) -> Scene:
    """A scene of filled things in a palette's colours; in half of them one is huge."""
    huge = random.random() < 0.5
    scene = coloured(layout(random_scene(random, things=1 if huge else None)), palette)
    things = (replace(thing, outlined=False) for thing in scene.things)
    if huge:
        things = (replace(thing, size="huge") for thing in things)
    return replace(scene, things=tuple(things))


def mean_palette(palettes: Sequence[Palette]) -> Palette:
    """The mean of each colour; one palette is itself."""
    if len(set(palettes)) == 1:
        return palettes[0]
    thing, background = (
        np.mean([rgb(colour) for colour in colours], axis=0)
        for colours in zip(*palettes, strict=True)
    )
    return _hex(thing), _hex(background)


def reference_exam(count: int = 40, named: bool = True) -> list[Case]:
    """One thing in the colours of a picture of others, named colours or any.

    Training never shows that thing in those colours on that background.
    """
    random = Random("reference exam")
    cases: list[Case] = []
    while len(cases) < count:
        palette = random_palette(random, named=float(named))
        asked = layout(random_scene(random, things=1))
        shown = random_reference(palette, random)
        scene = coloured(asked, palette)
        (thing,) = scene.things
        differs = all(
            thing.shape != other.shape and thing.place != other.place for other in shown.things
        )
        if scene.is_held_out and differs:
            cases.append(Case(caption(asked, random, brief=0), scene, shown))
    return cases


def _hex(colour: np.ndarray) -> str:
    return "#" + bytes((colour * 255).round().astype(np.uint8).tolist()).hex()
