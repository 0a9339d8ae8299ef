"""Houses, towers, boats and balloons, with their foot at (x, y), about `size` pixels tall."""

from __future__ import annotations

import math
from random import Random

from .canvas import Canvas, Colour, scale
from .palette import COLOURS, SNOW, WINDOW

STONE: Colour = (172, 162, 168)


def house(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    wall = COLOURS[colour]
    roof = (128, 62, 58) if colour != "red" else (74, 66, 88)
    w, h = size * 0.52, size * 0.5
    c.rectangle(x + w * 0.45, y - size * 0.92, x + w * 0.68, y - size * 0.6, scale(roof, 0.8))
    c.rectangle(x - w, y - h, x + w, y, wall)
    c.rectangle(x + w * 0.4, y - h, x + w, y, scale(wall, 0.88), plain=True)
    c.polygon(
        [
            (x - w * 1.18, y - h),
            (x - w * 0.78, y - size),
            (x + w * 0.78, y - size),
            (x + w * 1.18, y - h),
        ],
        SNOW if snow else roof,
    )
    c.rectangle(x - w * 0.2, y - h * 0.62, x + w * 0.2, y, (96, 66, 54))
    for left in (-0.78, 0.42):
        c.rectangle(x + w * left, y - h * 0.7, x + w * (left + 0.36), y - h * 0.3, WINDOW)


def windmill(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    c.polygon(
        [
            (x - size * 0.2, y),
            (x - size * 0.12, y - size * 0.62),
            (x + size * 0.12, y - size * 0.62),
            (x + size * 0.2, y),
        ],
        (238, 228, 210),
    )
    c.polygon(
        [
            (x - size * 0.15, y - size * 0.62),
            (x, y - size * 0.8),
            (x + size * 0.15, y - size * 0.62),
        ],
        (166, 74, 60),
    )
    c.rectangle(x - size * 0.05, y - size * 0.17, x + size * 0.05, y, (110, 76, 58))
    c.ellipse(x, y - size * 0.42, size * 0.04, size * 0.05, (110, 150, 176), plain=True)
    turn = random.uniform(0.3, 1.2)
    for quarter in range(4):
        a = turn + quarter * math.pi / 2
        dx, dy = math.cos(a), math.sin(a)
        hub_x, hub_y = x, y - size * 0.66
        end = (hub_x + dx * size * 0.42, hub_y + dy * size * 0.42)
        wide = size * 0.09
        c.polygon(
            [
                (hub_x + dx * size * 0.1, hub_y + dy * size * 0.1),
                end,
                (end[0] - dy * wide, end[1] + dx * wide),
                (hub_x + dx * size * 0.1 - dy * wide, hub_y + dy * size * 0.1 + dx * wide),
            ],
            (250, 246, 236),
        )
        c.line([(hub_x, hub_y), end], (120, 88, 66), size * 0.022)
    c.ellipse(x, y - size * 0.66, size * 0.035, size * 0.035, (120, 88, 66), plain=True)


def castle(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    w = size * 0.44
    c.rectangle(x - w, y - size * 0.42, x + w, y, STONE)
    for i in range(5):
        left = x - w * 0.75 + i * w * 0.33
        c.rectangle(left, y - size * 0.48, left + w * 0.18, y - size * 0.41, STONE, plain=True)
    for side, tall in ((-1, 0.62), (1, 0.72)):
        tower = x + side * w * 0.95
        c.rectangle(tower - size * 0.11, y - size * tall, tower + size * 0.11, y, scale(STONE, 0.9))
        c.polygon(
            [
                (tower - size * 0.15, y - size * tall),
                (tower, y - size * (tall + 0.28)),
                (tower + size * 0.15, y - size * tall),
            ],
            SNOW if snow else (92, 84, 150),
        )
        c.rectangle(
            tower - size * 0.025,
            y - size * tall + size * 0.1,
            tower + size * 0.025,
            y - size * tall + size * 0.2,
            WINDOW,
            plain=True,
        )
        top = y - size * (tall + 0.28)
        c.polygon(
            [
                (tower, top - size * 0.12),
                (tower + size * 0.12, top - size * 0.08),
                (tower, top - size * 0.04),
            ],
            COLOURS["red"],
            plain=True,
        )
    gate = size * 0.12
    c.ellipse(x, y - size * 0.2, gate, gate, (84, 60, 56), plain=True)
    c.rectangle(x - gate, y - size * 0.2, x + gate, y, (84, 60, 56), plain=True)


def lighthouse(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    def half(t: float) -> float:
        return size * (0.13 - 0.05 * t)

    for i in range(5):
        low, high = i / 5, (i + 1) / 5
        tone = COLOURS["red"] if i % 2 else COLOURS["white"]
        c.polygon(
            [
                (x - half(low), y - size * 0.74 * low),
                (x - half(high), y - size * 0.74 * high),
                (x + half(high), y - size * 0.74 * high),
                (x + half(low), y - size * 0.74 * low),
            ],
            tone,
        )
    top = y - size * 0.74
    c.rectangle(x - size * 0.12, top - size * 0.03, x + size * 0.12, top, (70, 66, 80))
    c.rectangle(x - size * 0.065, top - size * 0.14, x + size * 0.065, top - size * 0.03, WINDOW)
    c.polygon(
        [
            (x - size * 0.1, top - size * 0.14),
            (x, top - size * 0.26),
            (x + size * 0.1, top - size * 0.14),
        ],
        COLOURS["red"],
    )


def sailing_boat(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    sail, way = COLOURS[colour or "white"], random.choice((-1, 1))
    c.ellipse(x, y + size * 0.02, size * 0.46, size * 0.035, (190, 220, 236), plain=True)
    c.line([(x, y - size * 0.1), (x, y - size)], (110, 78, 58), size * 0.035)
    c.polygon(
        [
            (x + way * size * 0.03, y - size * 0.98),
            (x + way * size * 0.03, y - size * 0.24),
            (x + way * size * 0.4, y - size * 0.24),
        ],
        sail,
    )
    c.polygon(
        [
            (x - way * size * 0.04, y - size * 0.85),
            (x - way * size * 0.04, y - size * 0.24),
            (x - way * size * 0.27, y - size * 0.24),
        ],
        scale(sail, 0.88),
    )
    c.polygon(
        [
            (x - size * 0.42, y - size * 0.18),
            (x + size * 0.42, y - size * 0.18),
            (x + size * 0.28, y + size * 0.02),
            (x - size * 0.3, y + size * 0.02),
        ],
        (126, 72, 50),
    )
    c.rectangle(
        x - size * 0.4,
        y - size * 0.18,
        x + size * 0.4,
        y - size * 0.14,
        (246, 238, 222),
        plain=True,
    )


def balloon(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    cloth = COLOURS[colour or "red"]
    r, top = size * 0.36, y - size * 0.64
    for side in (-1, 1):
        c.line(
            [(x + side * r * 0.5, top + r * 0.9), (x + side * size * 0.07, y - size * 0.12)],
            (112, 84, 62),
            size * 0.018,
        )
    c.polygon(
        [
            (x - r * 0.86, top + r * 0.5),
            (x + r * 0.86, top + r * 0.5),
            (x + r * 0.26, y - size * 0.2),
            (x - r * 0.26, y - size * 0.2),
        ],
        cloth,
    )
    c.ellipse(x, top, r, r, cloth)
    stripe = (252, 244, 226)
    c.ellipse(x, top, r * 0.34, r * 0.98, stripe, plain=True)
    c.polygon(
        [
            (x - r * 0.32, top + r * 0.35),
            (x + r * 0.32, top + r * 0.35),
            (x + r * 0.1, y - size * 0.2),
            (x - r * 0.1, y - size * 0.2),
        ],
        stripe,
        plain=True,
    )
    c.rectangle(x - size * 0.08, y - size * 0.12, x + size * 0.08, y, (150, 104, 66))
