"""The sky of a landscape: gradient, stars, sun or moon, clouds; and the geometry of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .canvas import Canvas, Colour, mix, scale
from .palette import SUNS, sky_stops
from .scene import Landscape

SIDES = {"left": 0.2, "centre": 0.5, "right": 0.8}


@dataclass
class View:
    """Pixels: the picture's sides, and the row of the horizon."""

    width: int
    height: int
    horizon: float

    @property
    def unit(self) -> float:
        return min(self.width, self.height) / 100

    @property
    def is_upright(self) -> bool:
        return self.height > self.width


def draw_sky(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
    canvas.gradient(sky_stops(scene), 0, view.horizon + 2 * view.unit)
    u, w = view.unit, view.width
    if scene.time == "night" and scene.weather in ("clear", "clouds"):
        for _ in range(46):
            x, y = random.uniform(0, w), random.uniform(0, 0.85) * view.horizon
            r = random.choice((0.35, 0.45, 0.7)) * u
            canvas.pen.ellipse(
                [v * canvas.factor for v in (x - r, y - r, x + r, y + r)], (236, 238, 255)
            )
    if scene.light:
        _sun_or_moon(canvas, scene, view, random)
    if scene.weather == "clouds":
        for place in (0.12, 0.42, 0.7, 0.95)[: random.choice((3, 4))]:
            _cloud(
                canvas,
                scene,
                (place + random.uniform(-0.1, 0.1)) * w,
                random.uniform(0.14, 0.62) * view.horizon,
                random.uniform(7, 13) * u,
            )
    elif scene.weather in ("rain", "snow"):
        for i in range(7):
            _cloud(
                canvas,
                scene,
                (i + random.uniform(0.1, 0.9)) / 7 * w,
                random.uniform(0.0, 0.14) * view.horizon,
                random.uniform(13, 19) * u,
            )


def _sun_or_moon(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
    u = view.unit
    x = (SIDES[scene.side] + random.uniform(-0.05, 0.05)) * view.width
    low = scene.time in ("dawn", "sunset")
    height = random.uniform(0.2, 0.34)
    if low:
        height = random.uniform(0.38, 0.46) if scene.backdrop else random.uniform(0.6, 0.75)
    y = height * view.horizon
    r = (10.5 if low else 8.5) * u
    colour = SUNS[scene.time]
    canvas.halo(x, y, 4.2 * r, colour, 0.75 if scene.time != "night" else 0.4)
    f, box = canvas.factor, (x - r, y - r, x + r, y + r)
    fill = tuple(round(c) for c in colour)
    if scene.style == "neon":
        canvas.glow_pen.ellipse([v * f for v in box], (0, 0, 0), (255, 244, 150), canvas.line_width)
        fill = (120, 116, 80)
    canvas.pen.ellipse([v * f for v in box], fill)
    if scene.light == "moon":
        for dx, dy, size in ((-0.35, -0.2, 0.22), (0.3, 0.25, 0.28), (0.2, -0.45, 0.14)):
            spot = [
                x + (dx - size) * r,
                y + (dy - size) * r,
                x + (dx + size) * r,
                y + (dy + size) * r,
            ]
            canvas.pen.ellipse([v * f for v in spot], tuple(round(c * 0.9) for c in fill))


def _cloud(canvas: Canvas, scene: Landscape, x: float, y: float, size: float) -> None:
    horizon = sky_stops(scene)
    base: Colour = (252, 252, 255) if scene.weather == "clouds" else (196, 202, 212)
    if scene.weather == "rain":
        base = (142, 150, 164)
    if scene.time in ("dawn", "sunset"):
        base = mix(base, (255, 190, 180), 0.4)
    if scene.time == "night":
        base = mix(base, (120, 130, 180), 0.3)
    shade = mix(base, scale(horizon[-1][1], 1.0), 0.35)
    for dx, dy, r, colour in (
        (-0.75, 0.08, 0.45, shade),
        (0.8, 0.1, 0.42, shade),
        (-0.3, -0.16, 0.58, base),
        (0.36, -0.06, 0.5, base),
        (0.0, 0.14, 0.95, base),
    ):
        flat = 0.36 if r > 0.9 else 0.8
        canvas.ellipse(
            x + dx * size,
            y + dy * size,
            r * size,
            r * size * flat,
            colour,
            plain=canvas.style == "outlined",
        )
