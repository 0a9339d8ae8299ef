"""Animals, each drawn with its foot at (x, y), about `size` pixels tall."""

from __future__ import annotations

from random import Random

from .canvas import Canvas, scale
from .palette import COLOURS


def sheep(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    wool, face, way = (248, 244, 236), (62, 54, 58), random.choice((-1, 1))
    for dx in (-0.28, -0.14, 0.14, 0.28):
        c.rectangle(
            x + size * (dx - 0.035), y - size * 0.25, x + size * (dx + 0.035), y, face, plain=True
        )
    c.ellipse(x, y - size * 0.46, size * 0.47, size * 0.3, wool)
    for dx, dy in ((-0.3, 0.56), (0, 0.68), (0.3, 0.56), (-0.36, 0.4), (0.36, 0.4)):
        c.ellipse(x + size * dx, y - size * dy, size * 0.17, size * 0.15, wool, plain=True)
    c.ellipse(x + way * size * 0.5, y - size * 0.56, size * 0.15, size * 0.18, face)
    c.ellipse(x + way * size * 0.46, y - size * 0.7, size * 0.13, size * 0.09, wool, plain=True)


def cat(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    fur, way = COLOURS[colour or "orange"], random.choice((-1, 1))
    c.line(
        [
            (x - way * size * 0.25, y - size * 0.08),
            (x - way * size * 0.48, y - size * 0.12),
            (x - way * size * 0.52, y - size * 0.45),
        ],
        fur,
        size * 0.1,
    )
    c.ellipse(x, y - size * 0.27, size * 0.29, size * 0.28, fur)
    head = x + way * size * 0.05
    for side in (-1, 1):
        c.polygon(
            [
                (head + side * size * 0.07, y - size * 0.85),
                (head + side * size * 0.23, y - size * 1.02),
                (head + side * size * 0.24, y - size * 0.7),
            ],
            fur,
        )
    c.ellipse(head, y - size * 0.68, size * 0.25, size * 0.22, fur)
    eye = (90, 190, 90) if colour == "black" else (50, 44, 50)
    for side in (-1, 1):
        c.ellipse(
            head + side * size * 0.1, y - size * 0.7, size * 0.045, size * 0.055, eye, plain=True
        )
    c.ellipse(head, y - size * 0.6, size * 0.03, size * 0.025, (240, 140, 150), plain=True)


def rabbit(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    fur, way = (168, 128, 98), random.choice((-1, 1))
    head = x + way * size * 0.2
    for dx in (-0.05, 0.09):
        c.ellipse(head + size * dx, y - size * 0.85, size * 0.055, size * 0.2, fur)
    c.ellipse(x - way * size * 0.05, y - size * 0.26, size * 0.3, size * 0.26, fur)
    c.ellipse(head, y - size * 0.55, size * 0.19, size * 0.17, fur)
    c.ellipse(
        x - way * size * 0.34, y - size * 0.2, size * 0.1, size * 0.1, (248, 244, 238), plain=True
    )
    c.ellipse(
        head + way * size * 0.08,
        y - size * 0.58,
        size * 0.03,
        size * 0.035,
        (40, 34, 38),
        plain=True,
    )


def cow(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    hide, patch, way = (250, 246, 240), (66, 52, 50), random.choice((-1, 1))
    for dx in (-0.42, -0.28, 0.26, 0.4):
        c.rectangle(
            x + size * (dx - 0.045), y - size * 0.4, x + size * (dx + 0.045), y, hide, plain=True
        )
    c.ellipse(x, y - size * 0.52, size * 0.54, size * 0.25, hide)
    c.ellipse(x - way * size * 0.22, y - size * 0.6, size * 0.18, size * 0.13, patch, plain=True)
    c.ellipse(x + way * size * 0.18, y - size * 0.48, size * 0.13, size * 0.12, patch, plain=True)
    head = x + way * size * 0.6
    c.polygon(
        [
            (head - way * size * 0.16, y - size * 0.86),
            (head + way * size * 0.1, y - size * 0.84),
            (head + way * size * 0.14, y - size * 0.55),
            (head - way * size * 0.1, y - size * 0.52),
        ],
        patch,
    )
    c.ellipse(
        head + way * size * 0.07,
        y - size * 0.56,
        size * 0.12,
        size * 0.08,
        (240, 176, 170),
        plain=True,
    )


def duck(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    down, way = (250, 214, 84), random.choice((-1, 1))
    c.ellipse(x, y + size * 0.02, size * 0.6, size * 0.07, (190, 220, 236), plain=True)
    c.polygon(
        [
            (x - way * size * 0.2, y - size * 0.3),
            (x - way * size * 0.62, y - size * 0.48),
            (x - way * size * 0.4, y - size * 0.08),
        ],
        down,
    )
    c.ellipse(x, y - size * 0.2, size * 0.44, size * 0.23, down)
    c.ellipse(x + way * size * 0.32, y - size * 0.6, size * 0.22, size * 0.22, down)
    c.polygon(
        [
            (x + way * size * 0.5, y - size * 0.66),
            (x + way * size * 0.78, y - size * 0.56),
            (x + way * size * 0.5, y - size * 0.48),
        ],
        (236, 122, 48),
    )
    c.ellipse(
        x + way * size * 0.38, y - size * 0.66, size * 0.045, size * 0.045, (40, 36, 44), plain=True
    )


def fish(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    skin, way = (240, 124, 66), random.choice((-1, 1))
    y -= size * 0.45
    c.polygon(
        [
            (x - way * size * 0.36, y),
            (x - way * size * 0.8, y - size * 0.3),
            (x - way * size * 0.68, y),
            (x - way * size * 0.8, y + size * 0.3),
        ],
        scale(skin, 0.86),
    )
    c.ellipse(x, y, size * 0.5, size * 0.29, skin)
    c.ellipse(
        x - way * size * 0.05,
        y - size * 0.02,
        size * 0.07,
        size * 0.24,
        (252, 236, 214),
        plain=True,
    )
    c.ellipse(
        x + way * size * 0.28,
        y - size * 0.07,
        size * 0.075,
        size * 0.075,
        (250, 250, 250),
        plain=True,
    )
    c.ellipse(
        x + way * size * 0.3, y - size * 0.07, size * 0.04, size * 0.04, (30, 28, 36), plain=True
    )


def bird(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    flap = random.uniform(0.28, 0.44)
    tone = (236, 236, 250) if c.is_dark else (58, 54, 70)
    for side in (-1, 1):
        c.polygon(
            [
                (x, y),
                (x + side * size * 0.3, y - size * flap),
                (x + side * size * 0.62, y - size * 0.16),
                (x + side * size * 0.3, y - size * (flap - 0.17)),
            ],
            tone,
            plain=True,
        )
    c.ellipse(x, y, size * 0.09, size * 0.07, tone, plain=True)
