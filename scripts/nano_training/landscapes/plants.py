"""Trees and flowers, each drawn with its foot at (x, y), about `size` pixels tall."""

from __future__ import annotations

import math
from random import Random

from .canvas import Canvas, Colour, mix, scale
from .palette import COLOURS, SNOW

CROWNS: dict[str, Colour] = {
    "": (72, 142, 70),
    "spring": (246, 176, 200),
    "summer": (56, 132, 62),
    "autumn": (222, 120, 46),
    "winter": (232, 240, 246),
}
TRUNK: Colour = (112, 78, 56)
FIR: Colour = (32, 92, 74)


def round_tree(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    crown = CROWNS[season]
    c.polygon(
        [
            (x - size * 0.055, y),
            (x - size * 0.035, y - size * 0.5),
            (x + size * 0.035, y - size * 0.5),
            (x + size * 0.055, y),
        ],
        TRUNK,
    )
    r = size * 0.27
    shade = scale(crown, 0.86)
    c.ellipse(x - r * 0.62, y - size * 0.5, r * 0.72, r * 0.68, shade)
    c.ellipse(x + r * 0.62, y - size * 0.52, r * 0.74, r * 0.7, shade)
    c.ellipse(x, y - size * 0.67, r, r * 1.02, crown)
    c.ellipse(
        x - r * 0.25,
        y - size * 0.76,
        r * 0.5,
        r * 0.42,
        mix(crown, (255, 250, 220), 0.2),
        plain=True,
    )


def fir_tree(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    c.rectangle(x - size * 0.04, y - size * 0.14, x + size * 0.04, y, TRUNK)
    for level, (bottom, top, half) in enumerate(
        ((0.1, 0.52, 0.27), (0.34, 0.74, 0.21), (0.58, 1.0, 0.15))
    ):
        shade = mix(scale(FIR, 0.85), FIR, level / 2)
        foot, tip, reach = y - size * bottom, y - size * top, size * half
        c.polygon([(x - reach, foot), (x, tip), (x + reach, foot)], shade)
        if snow:
            cap = 0.55
            c.polygon(
                [
                    (x - reach * (1 - cap), tip + (foot - tip) * (1 - cap)),
                    (x, tip),
                    (x + reach * (1 - cap), tip + (foot - tip) * (1 - cap)),
                    (x + reach * 0.1, tip + (foot - tip) * 0.34),
                ],
                SNOW,
                plain=True,
            )


def palm_tree(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    lean = size * random.choice((-0.16, 0.16))
    steps = [i / 6 for i in range(7)]
    left = [(x + lean * t * t - size * (0.04 - 0.018 * t), y - size * 0.78 * t) for t in steps]
    right = [(x + lean * t * t + size * (0.04 - 0.018 * t), y - size * 0.78 * t) for t in steps]
    c.polygon([*left, *reversed(right)], (146, 102, 66))
    top_x, top_y = x + lean, y - size * 0.78
    for turn, length in ((-2.9, 0.36), (-0.25, 0.36), (-2.4, 0.34), (-0.75, 0.34), (-1.57, 0.26)):
        dx, dy = math.cos(turn) * size * length, math.sin(turn) * size * length * 0.62
        droop = size * 0.13
        middle = (top_x + dx * 0.55, top_y + dy - size * 0.04)
        under = (top_x + dx * 0.5, top_y + dy * 0.6 + size * 0.04)
        tone = (50, 140, 84) if length > 0.35 else (66, 158, 92)
        c.polygon([(top_x, top_y), middle, (top_x + dx, top_y + dy + droop), under], tone)
    for side in (-1, 1):
        c.ellipse(
            top_x + side * size * 0.035,
            top_y + size * 0.03,
            size * 0.03,
            size * 0.03,
            (104, 68, 44),
            plain=True,
        )


def cactus(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    green, w = (62, 138, 88), size * 0.075

    def arm(left, bottom, top):
        c.rectangle(left - w * 0.8, top, left + w * 0.8, bottom, green)
        c.ellipse(left, top, w * 0.8, w * 0.8, green, plain=True)

    side = random.choice((-1, 1))
    arm(x - side * size * 0.24, y - size * 0.36, y - size * 0.66)
    arm(x + side * size * 0.22, y - size * 0.24, y - size * 0.5)
    c.rectangle(
        x - size * 0.25, y - size * 0.37, x + size * 0.23, y - size * 0.27, green, plain=True
    )
    c.rectangle(x - w, y - size * 0.85, x + w, y, green)
    c.ellipse(x, y - size * 0.85, w, w, green, plain=True)
    c.rectangle(
        x - w * 0.2, y - size * 0.8, x + w * 0.2, y - size * 0.05, (84, 164, 106), plain=True
    )


def flower(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    petal = COLOURS[colour or "red"]
    c.line([(x, y), (x + size * 0.04, y - size * 0.7)], (58, 122, 58), size * 0.09)
    c.ellipse(x + size * 0.16, y - size * 0.26, size * 0.15, size * 0.07, (70, 140, 66), plain=True)
    for i in range(5):
        a = i * 2 * math.pi / 5 - math.pi / 2
        c.ellipse(
            x + size * (0.04 + 0.2 * math.cos(a)),
            y - size * (0.75 - 0.2 * math.sin(a)),
            size * 0.16,
            size * 0.16,
            petal,
            plain=True,
        )
    heart = (250, 206, 70) if colour != "yellow" else (190, 110, 50)
    c.ellipse(x + size * 0.04, y - size * 0.75, size * 0.11, size * 0.11, heart, plain=True)
