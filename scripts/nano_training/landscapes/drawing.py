"""How a landscape becomes a picture: sky, light, backdrop, ground, things, weather, style.

Layers are drawn from back to front. Far ones are paler (aerial perspective), near things are larger
and stand lower. The time of day colours everything except the sky, which has a gradient of its own.
"""

from __future__ import annotations

from random import Random

import numpy as np

from .canvas import Canvas, mix, scale
from .ground import draw_backdrop, draw_ground
from .palette import light_of, sky_stops
from .scene import LAND, SKY, Landscape, Part
from .sky import SIDES, View, draw_sky
from .styles import finish
from .things import DRAWN


def draw(
    scene: Landscape, width: int = 256, height: int = 256, random: Random | None = None
) -> np.ndarray:
    """The picture of a landscape, (H, W, 3) float32 in [0, 1], with anti-aliased edges.

    random: varies places, ridges and clouds; None draws the same picture every time.
    """
    random = random or Random("landscape")
    canvas = Canvas(width, height, scene.style, light_of(scene), scene.time == "night")
    view = View(width, height, height * (0.57 + random.uniform(-0.03, 0.03)))
    draw_sky(canvas, scene, view, random)
    for part in scene.parts:
        if part.habitat == SKY and part.kind == "balloon":
            _in_the_sky(canvas, scene, part, view, random)
    draw_backdrop(canvas, scene, view, random)
    draw_ground(canvas, scene, view, random)
    for x, y, part, size in sorted(_places(scene, view, random), key=lambda place: place[1]):
        DRAWN[part.kind][0](canvas, x, y, size, random, part.colour, scene.season, scene.is_snowy)
    for part in scene.parts:
        if part.kind == "bird":
            _in_the_sky(canvas, scene, part, view, random)
    _precipitation(canvas, scene, random)
    picture = canvas.finished()
    if scene.weather == "fog":
        _fog(picture, scene, view)
    return finish(picture, scene.style, random)


def _places(scene: Landscape, view: View, random: Random):
    """Foot, part and height in pixels of everything that stands or swims."""
    depth = view.height - view.horizon
    rows = {
        ("lake", LAND): (0.1, 0.16),
        ("lake", "water"): (0.42, 0.68),
        ("beach", "water"): (0.2, 0.4),
        ("beach", LAND): (0.84, 0.95),
        ("sea", "water"): (0.3, 0.75),
        ("field", LAND): (0.3, 0.6),
    }
    for part in scene.parts:
        if part.habitat == SKY:
            continue
        low, high = rows.get((scene.ground, part.habitat), (0.34, 0.62))
        if part.kind in ("sheep", "cat", "rabbit", "cow", "flower") and scene.ground != "beach":
            low, high = (0.82, 0.96) if scene.ground != "lake" else (0.9, 0.98)
        if part.kind == "fish":
            low, high = 0.6, 0.85
        size = DRAWN[part.kind][1] * view.unit
        if part.habitat == LAND and scene.ground == "lake":
            size *= 0.85
        spread = {
            "flower": 4.5,
            "sheep": 12,
            "cow": 19,
            "round tree": 13,
            "fir tree": 9,
            "palm tree": 13,
            "cactus": 13,
            "duck": 12,
            "fish": 15,
            "rabbit": 12,
            "house": 22,
            "sailing boat": 17,
        }.get(part.kind, 10)
        step = min(spread * view.unit, 0.34 * view.width / max(1, part.count - 1))
        centre = (SIDES[part.side] + random.uniform(-0.03, 0.03)) * view.width
        row = random.uniform(low, high)
        for i in range(part.count):
            x = centre + (i - (part.count - 1) / 2) * step * random.uniform(0.9, 1.1)
            x = min(max(x, 0.04 * view.width), 0.96 * view.width)
            y = view.horizon + min(0.98, row + random.uniform(-0.03, 0.03)) * depth
            yield x, y, part, size * random.uniform(0.9, 1.08) * (1 if i == 0 else 0.88)


def _in_the_sky(canvas, scene: Landscape, part: Part, view: View, random: Random) -> None:
    size = DRAWN[part.kind][1] * view.unit
    x = (SIDES[part.side] + random.uniform(-0.04, 0.04)) * view.width
    y = view.horizon * random.uniform(0.24, 0.5)
    if part.kind == "balloon":
        y = view.horizon * random.uniform(0.62, 0.72)
    for i in range(part.count):
        shift = (i - (part.count - 1) / 2) * 0.75 * size
        lift = random.uniform(-0.6, 0.6) * size if part.count > 1 else 0
        DRAWN[part.kind][0](
            canvas,
            x + shift,
            y + lift,
            size * random.uniform(0.8, 1.1),
            random,
            part.colour,
            scene.season,
            False,
        )


def _precipitation(canvas: Canvas, scene: Landscape, random: Random) -> None:
    u, f = canvas.unit, canvas.factor
    if scene.weather == "rain":
        drop = tuple(round(c) for c in scale((206, 222, 240), 0.62 if scene.time == "night" else 1))
        pen = canvas.glow_pen or canvas.pen
        for _ in range(95):
            x, y = random.uniform(-0.05, 1.05) * canvas.width, random.uniform(0, canvas.height)
            pen.line(
                [x * f, y * f, (x - 1.6 * u) * f, (y + 5.5 * u) * f],
                drop,
                max(1, round(0.5 * u * f)),
            )
    elif scene.weather == "snow":
        flake = tuple(
            round(c) for c in scale((255, 255, 255), 0.88 if scene.time == "night" else 1)
        )
        pen = canvas.glow_pen or canvas.pen
        for _ in range(110):
            x, y = random.uniform(0, canvas.width), random.uniform(0, canvas.height)
            r = random.choice((0.6, 0.8, 1.1)) * u
            pen.ellipse([(x - r) * f, (y - r) * f, (x + r) * f, (y + r) * f], flake)


def _fog(picture: np.ndarray, scene: Landscape, view: View) -> None:
    """Pale air, in place: thickest over the horizon, and in bands below it."""
    row = (np.arange(view.height, dtype=np.float32) - view.horizon) / view.height
    cover = 0.78 * np.exp(-((row / 0.2) ** 2)) + 0.16
    cover += 0.1 * np.sin(row * 38) * np.exp(-((row / 0.25) ** 2))
    cover = cover.clip(0, 0.88)[:, None, None]
    pale = mix((236, 240, 244), sky_stops(scene)[-1][1], 0.35)
    if scene.time == "night":
        pale = (104, 114, 150)
    picture *= 1 - cover
    picture += cover * np.array(pale, dtype=np.float32) / 255
