"""How a landscape becomes a picture: sky, light, backdrop, ground, things, weather, style.

Layers are drawn from back to front. Far ones are paler (aerial perspective), near things are larger
and stand lower. The time of day colours everything except the sky, which has a gradient of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from .canvas import Canvas, Colour, mix, scale
from .landscape_styles import finish
from .landscape_things import DRAWN, SNOW, WINDOW
from .landscapes import LAND, SKY, Landscape, Part

# From the top of the sky to the horizon, the colour of the hour on things, and the sun's or moon's.
SKIES: dict[str, list[tuple[float, Colour]]] = {
    "day": [(0.0, (74, 158, 222)), (1.0, (196, 230, 244))],
    "dawn": [(0.0, (142, 146, 214)), (0.55, (238, 178, 200)), (1.0, (255, 222, 186))],
    "sunset": [(0.0, (88, 52, 122)), (0.5, (226, 88, 88)), (1.0, (255, 186, 92))],
    "night": [(0.0, (12, 18, 54)), (1.0, (48, 64, 122))],
}
TINTS: dict[str, Colour] = {
    "day": (1.0, 1.0, 1.0),
    "dawn": (0.98, 0.88, 0.95),
    "sunset": (0.92, 0.7, 0.66),
    "night": (0.4, 0.46, 0.68),
}
SUNS: dict[str, Colour] = {
    "day": (255, 226, 92),
    "dawn": (255, 196, 120),
    "sunset": (255, 232, 150),
    "night": (246, 240, 212),
}
MOONLIGHT: Colour = (24, 40, 96)
GREY: Colour = (150, 160, 172)
GRASS: dict[str, Colour] = {
    "": (112, 176, 84),
    "spring": (138, 196, 92),
    "summer": (96, 164, 70),
    "autumn": (190, 158, 76),
    "winter": SNOW,
}
WHEAT: Colour = (230, 190, 88)
SAND: Colour = (238, 212, 156)
DUNE: Colour = (226, 168, 98)
WATER: Colour = (52, 132, 178)
MOUNTAIN: Colour = (104, 116, 156)
HILL: Colour = (102, 156, 118)
SIDES = {"left": 0.2, "centre": 0.5, "right": 0.8}


def draw(
    scene: Landscape, width: int = 256, height: int = 256, random: Random | None = None
) -> np.ndarray:
    """The picture of a landscape, (H, W, 3) float32 in [0, 1], with anti-aliased edges.

    random: varies places, ridges and clouds; None draws the same picture every time.
    """
    random = random or Random("landscape")
    canvas = Canvas(width, height, scene.style, _light(scene), scene.time == "night")
    view = View(width, height, height * (0.57 + random.uniform(-0.03, 0.03)))
    _sky(canvas, scene, view, random)
    for part in scene.parts:
        if part.habitat == SKY and part.kind == "balloon":
            _in_the_sky(canvas, scene, part, view, random)
    _backdrop(canvas, scene, view, random)
    _ground(canvas, scene, view, random)
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


def sky_stops(scene: Landscape) -> list[tuple[float, Colour]]:
    """The colours of the sky from its top (0) to the horizon (1)."""
    dull = {"rain": 0.5, "snow": 0.42, "fog": 0.42}.get(scene.weather, 0.0)
    grey = scale(GREY, TINTS[scene.time])
    if scene.weather in ("snow", "fog"):
        grey = mix(grey, (255, 255, 255), 0.3 if scene.time != "night" else 0.05)
    return [(place, mix(colour, grey, dull)) for place, colour in SKIES[scene.time]]


def _light(scene: Landscape):
    tint = TINTS[scene.time]
    if scene.weather == "rain":
        tint = scale((tint[0] * 255, tint[1] * 255, tint[2] * 255), 0.86)
        tint = (tint[0] / 255, tint[1] / 255, tint[2] / 255)

    def light(colour: Colour) -> Colour:
        if colour == WINDOW:
            return colour
        if scene.time == "night":
            # Moonlight: darker and bluer, and yet with hues that can be told apart.
            return mix(scale(colour, (0.56, 0.59, 0.76)), MOONLIGHT, 0.16)
        return scale(colour, tint)

    return light


def haze(scene: Landscape) -> Colour:
    """The colour that far things fade to, before the time of day colours it."""
    horizon = sky_stops(scene)[-1][1]
    if scene.time == "night":
        return scale(mix(horizon, MOONLIGHT, -0.19), (1.78, 1.7, 1.31))
    tint = TINTS[scene.time]
    red, green, blue = (h / t for h, t in zip(horizon, tint, strict=True))
    return red, green, blue


def _sky(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
    canvas.gradient(sky_stops(scene), 0, view.horizon + 2 * view.unit)
    u, w = view.unit, view.width
    if scene.time == "night" and scene.weather in ("clear", "clouds"):
        for _ in range(46):
            x, y = random.uniform(0, w), random.uniform(0, 0.85) * view.horizon
            r = random.choice((0.35, 0.45, 0.7)) * u
            canvas.pen.ellipse([v * canvas.factor for v in (x - r, y - r, x + r, y + r)],
                               (236, 238, 255))  # fmt: skip
    if scene.light:
        _sun_or_moon(canvas, scene, view, random)
    if scene.weather == "clouds":
        for place in (0.12, 0.42, 0.7, 0.95)[: random.choice((3, 4))]:
            _cloud(canvas, scene, (place + random.uniform(-0.1, 0.1)) * w,
                   random.uniform(0.14, 0.62) * view.horizon, random.uniform(7, 13) * u)  # fmt: skip
    elif scene.weather in ("rain", "snow"):
        for i in range(7):
            _cloud(canvas, scene, (i + random.uniform(0.1, 0.9)) / 7 * w,
                   random.uniform(0.0, 0.14) * view.horizon, random.uniform(13, 19) * u)  # fmt: skip


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
            spot = [x + (dx - size) * r, y + (dy - size) * r, x + (dx + size) * r,
                    y + (dy + size) * r]  # fmt: skip
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
        (-0.75, 0.08, 0.45, shade), (0.8, 0.1, 0.42, shade), (-0.3, -0.16, 0.58, base),
        (0.36, -0.06, 0.5, base), (0.0, 0.14, 0.95, base),
    ):  # fmt: skip
        flat = 0.36 if r > 0.9 else 0.8
        canvas.ellipse(x + dx * size, y + dy * size, r * size, r * size * flat, colour,
                       plain=canvas.style == "outlined")  # fmt: skip


def _ridge(random: Random, view: View, base: float, height: float, rough: int) -> list:
    """A smooth line of hills across the picture, from left to right."""
    waves = [(random.uniform(0.6, 1.4) * (k + 1), random.uniform(0, 6.3), 1 / (k + 1))
             for k in range(rough)]  # fmt: skip
    total = sum(a for *_, a in waves)
    points = []
    for i in range(33):
        t = i / 32
        value = sum(a * math.sin(2 * math.pi * f * t + p) for f, p, a in waves) / total
        points.append((t * view.width, base - height * (0.5 + 0.5 * value)))
    return points


def _fill_below(canvas: Canvas, view: View, points: list, colour: Colour) -> None:
    w, h, out = view.width, view.height, 3 * view.unit
    canvas.polygon([(-out, points[0][1]), *points, (w + out, points[-1][1]), (w + out, h + out),
                    (-out, h + out)], colour)  # fmt: skip


def _backdrop(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
    u, horizon, far = view.unit, view.horizon, haze(scene)
    if scene.backdrop == "mountains":
        for tall, share, count in ((30, 0.5, 3), (21, 0.18, 4)):
            _mountains(canvas, view, random, tall * u, mix(MOUNTAIN, far, share), count, far)
    elif scene.backdrop == "hills":
        hill = mix(HILL, SNOW, 0.75) if scene.is_snowy else HILL
        for tall, share in ((17, 0.5), (9, 0.2)):
            ridge = _ridge(random, view, horizon - tall * u * 0.15, tall * u, 2)
            _fill_below(canvas, view, ridge, mix(hill, far, share))
    elif scene.backdrop == "city":
        _city(canvas, view, random, mix((96, 98, 132), far, 0.45), 27, lit=False)
        _city(canvas, view, random, mix((78, 76, 112), far, 0.12), 19, lit=scene.time != "day")


def _mountains(canvas, view, random, tall, colour, count, far) -> None:
    base, wide = view.horizon + 4 * view.unit, view.width / count
    offset = random.uniform(-0.3, 0.3) * wide
    for i in range(-1, count + 1):
        x = offset + (i + 0.5 + random.uniform(-0.15, 0.15)) * wide
        top = view.horizon - tall * random.uniform(0.7, 1.05)
        half = max(0.62 * wide, 0.8 * tall) * random.uniform(1.0, 1.2)
        canvas.polygon([(x - half, base), (x, top), (x + half, base)], colour)
        canvas.polygon([(x, top), (x + half, base), (x + 0.15 * half, base)],
                       scale(colour, 0.9), plain=True)  # fmt: skip
        cap, down = 0.3, base - top
        canvas.polygon([(x, top), (x + cap * half, top + cap * down),
                        (x + 0.1 * half, top + cap * 0.72 * down), (x, top + cap * 1.15 * down),
                        (x - 0.12 * half, top + cap * 0.72 * down),
                        (x - cap * half, top + cap * down)],
                       mix((250, 252, 255), far, 0.12), plain=True)  # fmt: skip


def _city(canvas, view, random, colour, tall, lit) -> None:
    u, x = view.unit, -random.uniform(0, 6) * view.unit
    while x < view.width:
        wide = random.uniform(6, 10.5) * u
        top = view.horizon - random.uniform(0.35, 1.0) * tall * u
        canvas.rectangle(x, top, x + wide, view.horizon + 4 * u, colour)
        if random.random() < 0.25:
            canvas.line([(x + wide / 2, top), (x + wide / 2, top - 4 * u)], colour, 0.7 * u)
        columns = 2 if wide < 8 * u else 3
        for column in range(columns):
            row = top + 2 * u
            while row < view.horizon - 2.5 * u and tall < 24:
                left = x + (column + 0.5) / columns * wide - 0.65 * u
                if random.random() < 0.6:
                    pane = WINDOW if lit else scale(colour, 1.18)
                    canvas.rectangle(left, row, left + 1.3 * u, row + 1.7 * u, pane, plain=True)
                row += 3.6 * u
        x += wide + random.choice((0, 0, 1.2)) * u


def _ground(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
    u, horizon, far = view.unit, view.horizon, haze(scene)
    w, h = view.width, view.height
    depth = h - horizon
    if scene.ground in ("sea", "beach"):
        _water(canvas, scene, view, random)
        if scene.ground == "beach":
            shore = _ridge(random, view, h - 0.3 * depth, 7 * u, 1)
            foam = [(x, y - 1.6 * u) for x, y in shore]
            _fill_below(canvas, view, foam, (244, 250, 252))
            _fill_below(canvas, view, shore, SAND)
        return
    if scene.ground == "desert":
        for share, place in ((0.3, 0.0), (0.12, 0.3), (0.0, 0.62)):
            ridge = _ridge(random, view, horizon + place * depth + 3 * u, 9 * u, 2)
            _fill_below(canvas, view, ridge, mix(scale(DUNE, 1 - 0.05 * (place > 0.5)), far, share))
        return
    grass = SNOW if scene.is_snowy else GRASS[scene.season]
    near = mix(grass, (150, 180, 214), 0.16) if scene.is_snowy else scale(grass, 0.88)
    back = [(0, horizon), (w, horizon)]
    if scene.ground == "field":
        crop = SNOW if scene.is_snowy else WHEAT
        _fill_below(canvas, view, back, mix(crop, far, 0.12))
        middle, furrow = w * random.uniform(0.35, 0.65), scale(crop, 0.88)
        for i in range(-9, 10):
            left, right = middle + (i - 0.22) * 0.05 * w, middle + (i + 0.22) * 0.05 * w
            canvas.polygon([(left, horizon), (right, horizon),
                            (middle + (right - middle) * 4.5, h), (middle + (left - middle) * 4.5, h)],
                           furrow, plain=True)  # fmt: skip
        return
    _fill_below(canvas, view, back, mix(grass, far, 0.18))
    if scene.ground == "lake":
        _lake(canvas, scene, view, random)
        return
    middle = _ridge(random, view, horizon + 0.36 * depth, 6 * u, 1)
    _fill_below(canvas, view, middle, mix(grass, near, 0.4))
    front = _ridge(random, view, horizon + 0.74 * depth, 8 * u, 1)
    _fill_below(canvas, view, front, near)
    blade = scale(near, 0.86)
    for _ in range(16):
        x, y = random.uniform(0, w), horizon + random.uniform(0.3, 0.97) * depth
        for dx in (-0.8, 0, 0.8):
            canvas.line([(x, y), (x + dx * u, y - 1.9 * u)], blade, 0.45 * u)


def _water(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
    u, far = view.unit, haze(scene)
    tint = canvas.light
    canvas.gradient([(0.0, tint(mix(WATER, far, 0.42))), (0.35, tint(WATER)),
                     (1.0, tint(scale(WATER, 0.8)))], view.horizon, view.height)  # fmt: skip
    for i in range(26):
        share = (i + random.random()) / 26
        y = view.horizon + share**1.3 * (view.height - view.horizon)
        x, half = random.uniform(0, view.width), (2.5 + 7 * share) * u
        canvas.line([(x - half, y), (x + half, y)], mix(WATER, (236, 246, 250), 0.45 - 0.2 * share),
                    (0.35 + 0.6 * share) * u)  # fmt: skip
    if scene.light:
        x = SIDES[scene.side] * view.width
        for i in range(11):
            share = (i + 0.5) / 11
            y = view.horizon + 2 * u + share * 0.62 * (view.height - view.horizon)
            half = (2 + 5 * share) * u * random.uniform(0.6, 1.2)
            shift = random.uniform(-2, 2) * u
            glitter = mix(SUNS[scene.time], tint(WATER), 0.25 + 0.4 * share)
            f = canvas.factor
            canvas.pen.rectangle([(x + shift - half) * f, y * f, (x + shift + half) * f,
                                  (y + 0.9 * u) * f], tuple(round(v) for v in glitter))  # fmt: skip


def _lake(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
    u, w, h = view.unit, view.width, view.height
    depth = h - view.horizon
    x, y = w * (0.5 + random.uniform(-0.04, 0.04)), view.horizon + 0.52 * depth
    rx, ry = 0.47 * w, 0.3 * depth
    shore = (208, 214, 222) if scene.is_snowy else (214, 196, 150)
    canvas.ellipse(x, y, rx * 1.05, ry * 1.12, shore)
    water = mix(WATER, haze(scene), 0.22)
    canvas.ellipse(x, y, rx, ry, water, plain=True)
    for _ in range(11):
        dx, dy = random.uniform(-0.7, 0.7), random.uniform(-0.75, 0.75)
        if abs(dx) + abs(dy) < 1.05:
            half = random.uniform(3, 7) * u
            canvas.line([(x + dx * rx - half, y + dy * ry), (x + dx * rx + half, y + dy * ry)],
                        mix(water, (240, 248, 252), 0.4), 0.7 * u)  # fmt: skip


def _places(scene: Landscape, view: View, random: Random):
    """Foot, part and height in pixels of everything that stands or swims."""
    depth = view.height - view.horizon
    rows = {
        ("lake", LAND): (0.1, 0.16), ("lake", "water"): (0.42, 0.68), ("beach", "water"): (0.2, 0.4),
        ("beach", LAND): (0.84, 0.95), ("sea", "water"): (0.3, 0.75), ("field", LAND): (0.3, 0.6),
    }  # fmt: skip
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
        spread = {"flower": 4.5, "sheep": 12, "cow": 19, "round tree": 13, "fir tree": 9,
                  "palm tree": 13, "cactus": 13, "duck": 12, "fish": 15, "rabbit": 12,
                  "house": 22, "sailing boat": 17}.get(part.kind, 10)  # fmt: skip
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
        DRAWN[part.kind][0](canvas, x + shift, y + lift, size * random.uniform(0.8, 1.1), random,
                            part.colour, scene.season, False)  # fmt: skip


def _precipitation(canvas: Canvas, scene: Landscape, random: Random) -> None:
    u, f = canvas.unit, canvas.factor
    if scene.weather == "rain":
        drop = tuple(round(c) for c in scale((206, 222, 240), 0.62 if scene.time == "night" else 1))
        pen = canvas.glow_pen or canvas.pen
        for _ in range(95):
            x, y = random.uniform(-0.05, 1.05) * canvas.width, random.uniform(0, canvas.height)
            pen.line([x * f, y * f, (x - 1.6 * u) * f, (y + 5.5 * u) * f], drop,
                     max(1, round(0.5 * u * f)))  # fmt: skip
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
