"""Backdrops and grounds of landscapes: mountains, hills, a city; grass, crops, sand, water."""

from __future__ import annotations

import math
from random import Random

from .canvas import Canvas, Colour, mix, scale
from .palette import DUNE, GRASS, HILL, MOUNTAIN, SAND, SNOW, SUNS, WATER, WHEAT, WINDOW, haze
from .scene import Landscape
from .sky import SIDES, View


def draw_backdrop(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
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
        canvas.polygon(
            [(x, top), (x + half, base), (x + 0.15 * half, base)], scale(colour, 0.9), plain=True
        )
        cap, down = 0.3, base - top
        canvas.polygon(
            [
                (x, top),
                (x + cap * half, top + cap * down),
                (x + 0.1 * half, top + cap * 0.72 * down),
                (x, top + cap * 1.15 * down),
                (x - 0.12 * half, top + cap * 0.72 * down),
                (x - cap * half, top + cap * down),
            ],
            mix((250, 252, 255), far, 0.12),
            plain=True,
        )


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


def draw_ground(canvas: Canvas, scene: Landscape, view: View, random: Random) -> None:
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
            canvas.polygon(
                [
                    (left, horizon),
                    (right, horizon),
                    (middle + (right - middle) * 4.5, h),
                    (middle + (left - middle) * 4.5, h),
                ],
                furrow,
                plain=True,
            )
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
    canvas.gradient(
        [(0.0, tint(mix(WATER, far, 0.42))), (0.35, tint(WATER)), (1.0, tint(scale(WATER, 0.8)))],
        view.horizon,
        view.height,
    )
    for i in range(26):
        share = (i + random.random()) / 26
        y = view.horizon + share**1.3 * (view.height - view.horizon)
        x, half = random.uniform(0, view.width), (2.5 + 7 * share) * u
        canvas.line(
            [(x - half, y), (x + half, y)],
            mix(WATER, (236, 246, 250), 0.45 - 0.2 * share),
            (0.35 + 0.6 * share) * u,
        )
    if scene.light:
        x = SIDES[scene.side] * view.width
        for i in range(11):
            share = (i + 0.5) / 11
            y = view.horizon + 2 * u + share * 0.62 * (view.height - view.horizon)
            half = (2 + 5 * share) * u * random.uniform(0.6, 1.2)
            shift = random.uniform(-2, 2) * u
            glitter = mix(SUNS[scene.time], tint(WATER), 0.25 + 0.4 * share)
            f = canvas.factor
            canvas.pen.rectangle(
                [(x + shift - half) * f, y * f, (x + shift + half) * f, (y + 0.9 * u) * f],
                tuple(round(v) for v in glitter),
            )


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
            canvas.line(
                [(x + dx * rx - half, y + dy * ry), (x + dx * rx + half, y + dy * ry)],
                mix(water, (240, 248, 252), 0.4),
                0.7 * u,
            )


def _ridge(random: Random, view: View, base: float, height: float, rough: int) -> list:
    """A smooth line of hills across the picture, from left to right."""
    waves = [
        (random.uniform(0.6, 1.4) * (k + 1), random.uniform(0, 6.3), 1 / (k + 1))
        for k in range(rough)
    ]
    total = sum(a for *_, a in waves)
    points = []
    for i in range(33):
        t = i / 32
        value = sum(a * math.sin(2 * math.pi * f * t + p) for f, p, a in waves) / total
        points.append((t * view.width, base - height * (0.5 + 0.5 * value)))
    return points


def _fill_below(canvas: Canvas, view: View, points: list, colour: Colour) -> None:
    w, h, out = view.width, view.height, 3 * view.unit
    canvas.polygon(
        [
            (-out, points[0][1]),
            *points,
            (w + out, points[-1][1]),
            (w + out, h + out),
            (-out, h + out),
        ],
        colour,
    )
