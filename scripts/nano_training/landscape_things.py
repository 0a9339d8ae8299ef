"""Things in landscapes: trees, buildings, boats, animals, flowers, each drawn at a foot point.

Every function draws one thing that stands with its foot at (x, y) and is about `size` pixels tall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from .canvas import Canvas, Colour, mix, scale

COLOURS: dict[str, Colour] = {
    "red": (214, 62, 54),
    "yellow": (246, 200, 66),
    "blue": (58, 112, 196),
    "white": (246, 242, 234),
    "pink": (242, 130, 170),
    "orange": (232, 136, 54),
    "black": (46, 42, 52),
    "": (200, 200, 200),
}
CROWNS: dict[str, Colour] = {
    "": (72, 142, 70),
    "spring": (246, 176, 200),
    "summer": (56, 132, 62),
    "autumn": (222, 120, 46),
    "winter": (232, 240, 246),
}
TRUNK: Colour = (112, 78, 56)
FIR: Colour = (32, 92, 74)
SNOW: Colour = (240, 246, 252)
WINDOW: Colour = (255, 222, 128)
STONE: Colour = (172, 162, 168)


def round_tree(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    crown = CROWNS[season]
    c.polygon([(x - size * 0.055, y), (x - size * 0.035, y - size * 0.5),
               (x + size * 0.035, y - size * 0.5), (x + size * 0.055, y)], TRUNK)  # fmt: skip
    r = size * 0.27
    shade = scale(crown, 0.86)
    c.ellipse(x - r * 0.62, y - size * 0.5, r * 0.72, r * 0.68, shade)
    c.ellipse(x + r * 0.62, y - size * 0.52, r * 0.74, r * 0.7, shade)
    c.ellipse(x, y - size * 0.67, r, r * 1.02, crown)
    c.ellipse(x - r * 0.25, y - size * 0.76, r * 0.5, r * 0.42, mix(crown, (255, 250, 220), 0.2),
              plain=True)  # fmt: skip


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
            c.polygon([(x - reach * (1 - cap), tip + (foot - tip) * (1 - cap)), (x, tip),
                       (x + reach * (1 - cap), tip + (foot - tip) * (1 - cap)),
                       (x + reach * 0.1, tip + (foot - tip) * 0.34)], SNOW, plain=True)  # fmt: skip


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
        c.ellipse(top_x + side * size * 0.035, top_y + size * 0.03, size * 0.03, size * 0.03,
                  (104, 68, 44), plain=True)  # fmt: skip


def cactus(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    green, w = (62, 138, 88), size * 0.075

    def arm(left, bottom, top):
        c.rectangle(left - w * 0.8, top, left + w * 0.8, bottom, green)
        c.ellipse(left, top, w * 0.8, w * 0.8, green, plain=True)

    side = random.choice((-1, 1))
    arm(x - side * size * 0.24, y - size * 0.36, y - size * 0.66)
    arm(x + side * size * 0.22, y - size * 0.24, y - size * 0.5)
    c.rectangle(x - size * 0.25, y - size * 0.37, x + size * 0.23, y - size * 0.27, green,
                plain=True)  # fmt: skip
    c.rectangle(x - w, y - size * 0.85, x + w, y, green)
    c.ellipse(x, y - size * 0.85, w, w, green, plain=True)
    c.rectangle(x - w * 0.2, y - size * 0.8, x + w * 0.2, y - size * 0.05, (84, 164, 106),
                plain=True)  # fmt: skip


def house(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    wall = COLOURS[colour]
    roof = (128, 62, 58) if colour != "red" else (74, 66, 88)
    w, h = size * 0.52, size * 0.5
    c.rectangle(x + w * 0.45, y - size * 0.92, x + w * 0.68, y - size * 0.6, scale(roof, 0.8))
    c.rectangle(x - w, y - h, x + w, y, wall)
    c.rectangle(x + w * 0.4, y - h, x + w, y, scale(wall, 0.88), plain=True)
    c.polygon([(x - w * 1.18, y - h), (x - w * 0.78, y - size), (x + w * 0.78, y - size),
               (x + w * 1.18, y - h)], SNOW if snow else roof)  # fmt: skip
    c.rectangle(x - w * 0.2, y - h * 0.62, x + w * 0.2, y, (96, 66, 54))
    for left in (-0.78, 0.42):
        c.rectangle(x + w * left, y - h * 0.7, x + w * (left + 0.36), y - h * 0.3, WINDOW)


def windmill(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    c.polygon([(x - size * 0.2, y), (x - size * 0.12, y - size * 0.62),
               (x + size * 0.12, y - size * 0.62), (x + size * 0.2, y)], (238, 228, 210))  # fmt: skip
    c.polygon([(x - size * 0.15, y - size * 0.62), (x, y - size * 0.8),
               (x + size * 0.15, y - size * 0.62)], (166, 74, 60))  # fmt: skip
    c.rectangle(x - size * 0.05, y - size * 0.17, x + size * 0.05, y, (110, 76, 58))
    c.ellipse(x, y - size * 0.42, size * 0.04, size * 0.05, (110, 150, 176), plain=True)
    turn = random.uniform(0.3, 1.2)
    for quarter in range(4):
        a = turn + quarter * math.pi / 2
        dx, dy = math.cos(a), math.sin(a)
        hub_x, hub_y = x, y - size * 0.66
        end = (hub_x + dx * size * 0.42, hub_y + dy * size * 0.42)
        wide = size * 0.09
        c.polygon([(hub_x + dx * size * 0.1, hub_y + dy * size * 0.1), end,
                   (end[0] - dy * wide, end[1] + dx * wide),
                   (hub_x + dx * size * 0.1 - dy * wide, hub_y + dy * size * 0.1 + dx * wide)],
                  (250, 246, 236))  # fmt: skip
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
        c.polygon([(tower - size * 0.15, y - size * tall), (tower, y - size * (tall + 0.28)),
                   (tower + size * 0.15, y - size * tall)],
                  SNOW if snow else (92, 84, 150))  # fmt: skip
        c.rectangle(tower - size * 0.025, y - size * tall + size * 0.1, tower + size * 0.025,
                    y - size * tall + size * 0.2, WINDOW, plain=True)  # fmt: skip
        top = y - size * (tall + 0.28)
        c.polygon([(tower, top - size * 0.12), (tower + size * 0.12, top - size * 0.08),
                   (tower, top - size * 0.04)], COLOURS["red"], plain=True)  # fmt: skip
    gate = size * 0.12
    c.ellipse(x, y - size * 0.2, gate, gate, (84, 60, 56), plain=True)
    c.rectangle(x - gate, y - size * 0.2, x + gate, y, (84, 60, 56), plain=True)


def lighthouse(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    def half(t: float) -> float:
        return size * (0.13 - 0.05 * t)

    for i in range(5):
        low, high = i / 5, (i + 1) / 5
        tone = COLOURS["red"] if i % 2 else COLOURS["white"]
        c.polygon([(x - half(low), y - size * 0.74 * low), (x - half(high), y - size * 0.74 * high),
                   (x + half(high), y - size * 0.74 * high),
                   (x + half(low), y - size * 0.74 * low)], tone)  # fmt: skip
    top = y - size * 0.74
    c.rectangle(x - size * 0.12, top - size * 0.03, x + size * 0.12, top, (70, 66, 80))
    c.rectangle(x - size * 0.065, top - size * 0.14, x + size * 0.065, top - size * 0.03, WINDOW)
    c.polygon([(x - size * 0.1, top - size * 0.14), (x, top - size * 0.26),
               (x + size * 0.1, top - size * 0.14)], COLOURS["red"])  # fmt: skip


def sheep(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    wool, face, way = (248, 244, 236), (62, 54, 58), random.choice((-1, 1))
    for dx in (-0.28, -0.14, 0.14, 0.28):
        c.rectangle(x + size * (dx - 0.035), y - size * 0.25, x + size * (dx + 0.035), y, face,
                    plain=True)  # fmt: skip
    c.ellipse(x, y - size * 0.46, size * 0.47, size * 0.3, wool)
    for dx, dy in ((-0.3, 0.56), (0, 0.68), (0.3, 0.56), (-0.36, 0.4), (0.36, 0.4)):
        c.ellipse(x + size * dx, y - size * dy, size * 0.17, size * 0.15, wool, plain=True)
    c.ellipse(x + way * size * 0.5, y - size * 0.56, size * 0.15, size * 0.18, face)
    c.ellipse(x + way * size * 0.46, y - size * 0.7, size * 0.13, size * 0.09, wool, plain=True)


def cat(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    fur, way = COLOURS[colour or "orange"], random.choice((-1, 1))
    c.line([(x - way * size * 0.25, y - size * 0.08), (x - way * size * 0.48, y - size * 0.12),
            (x - way * size * 0.52, y - size * 0.45)], fur, size * 0.1)  # fmt: skip
    c.ellipse(x, y - size * 0.27, size * 0.29, size * 0.28, fur)
    head = x + way * size * 0.05
    for side in (-1, 1):
        c.polygon([(head + side * size * 0.07, y - size * 0.85),
                   (head + side * size * 0.23, y - size * 1.02),
                   (head + side * size * 0.24, y - size * 0.7)], fur)  # fmt: skip
    c.ellipse(head, y - size * 0.68, size * 0.25, size * 0.22, fur)
    eye = (90, 190, 90) if colour == "black" else (50, 44, 50)
    for side in (-1, 1):
        c.ellipse(head + side * size * 0.1, y - size * 0.7, size * 0.045, size * 0.055, eye,
                  plain=True)  # fmt: skip
    c.ellipse(head, y - size * 0.6, size * 0.03, size * 0.025, (240, 140, 150), plain=True)


def rabbit(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    fur, way = (168, 128, 98), random.choice((-1, 1))
    head = x + way * size * 0.2
    for dx in (-0.05, 0.09):
        c.ellipse(head + size * dx, y - size * 0.85, size * 0.055, size * 0.2, fur)
    c.ellipse(x - way * size * 0.05, y - size * 0.26, size * 0.3, size * 0.26, fur)
    c.ellipse(head, y - size * 0.55, size * 0.19, size * 0.17, fur)
    c.ellipse(x - way * size * 0.34, y - size * 0.2, size * 0.1, size * 0.1, (248, 244, 238),
              plain=True)  # fmt: skip
    c.ellipse(head + way * size * 0.08, y - size * 0.58, size * 0.03, size * 0.035, (40, 34, 38),
              plain=True)  # fmt: skip


def cow(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    hide, patch, way = (250, 246, 240), (66, 52, 50), random.choice((-1, 1))
    for dx in (-0.42, -0.28, 0.26, 0.4):
        c.rectangle(x + size * (dx - 0.045), y - size * 0.4, x + size * (dx + 0.045), y, hide,
                    plain=True)  # fmt: skip
    c.ellipse(x, y - size * 0.52, size * 0.54, size * 0.25, hide)
    c.ellipse(x - way * size * 0.22, y - size * 0.6, size * 0.18, size * 0.13, patch, plain=True)
    c.ellipse(x + way * size * 0.18, y - size * 0.48, size * 0.13, size * 0.12, patch, plain=True)
    head = x + way * size * 0.6
    c.polygon([(head - way * size * 0.16, y - size * 0.86), (head + way * size * 0.1, y - size * 0.84),
               (head + way * size * 0.14, y - size * 0.55),
               (head - way * size * 0.1, y - size * 0.52)], patch)  # fmt: skip
    c.ellipse(head + way * size * 0.07, y - size * 0.56, size * 0.12, size * 0.08, (240, 176, 170),
              plain=True)  # fmt: skip


def flower(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    petal = COLOURS[colour or "red"]
    c.line([(x, y), (x + size * 0.04, y - size * 0.7)], (58, 122, 58), size * 0.09)
    c.ellipse(x + size * 0.16, y - size * 0.26, size * 0.15, size * 0.07, (70, 140, 66), plain=True)
    for i in range(5):
        a = i * 2 * math.pi / 5 - math.pi / 2
        c.ellipse(x + size * (0.04 + 0.2 * math.cos(a)), y - size * (0.75 - 0.2 * math.sin(a)),
                  size * 0.16, size * 0.16, petal, plain=True)  # fmt: skip
    heart = (250, 206, 70) if colour != "yellow" else (190, 110, 50)
    c.ellipse(x + size * 0.04, y - size * 0.75, size * 0.11, size * 0.11, heart, plain=True)


def sailing_boat(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    sail, way = COLOURS[colour or "white"], random.choice((-1, 1))
    c.ellipse(x, y + size * 0.02, size * 0.46, size * 0.035, (190, 220, 236), plain=True)
    c.line([(x, y - size * 0.1), (x, y - size)], (110, 78, 58), size * 0.035)
    c.polygon([(x + way * size * 0.03, y - size * 0.98), (x + way * size * 0.03, y - size * 0.24),
               (x + way * size * 0.4, y - size * 0.24)], sail)  # fmt: skip
    c.polygon([(x - way * size * 0.04, y - size * 0.85), (x - way * size * 0.04, y - size * 0.24),
               (x - way * size * 0.27, y - size * 0.24)], scale(sail, 0.88))  # fmt: skip
    c.polygon([(x - size * 0.42, y - size * 0.18), (x + size * 0.42, y - size * 0.18),
               (x + size * 0.28, y + size * 0.02), (x - size * 0.3, y + size * 0.02)],
              (126, 72, 50))  # fmt: skip
    c.rectangle(x - size * 0.4, y - size * 0.18, x + size * 0.4, y - size * 0.14, (246, 238, 222),
                plain=True)  # fmt: skip


def duck(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    down, way = (250, 214, 84), random.choice((-1, 1))
    c.ellipse(x, y + size * 0.02, size * 0.6, size * 0.07, (190, 220, 236), plain=True)
    c.polygon([(x - way * size * 0.2, y - size * 0.3), (x - way * size * 0.62, y - size * 0.48),
               (x - way * size * 0.4, y - size * 0.08)], down)  # fmt: skip
    c.ellipse(x, y - size * 0.2, size * 0.44, size * 0.23, down)
    c.ellipse(x + way * size * 0.32, y - size * 0.6, size * 0.22, size * 0.22, down)
    c.polygon([(x + way * size * 0.5, y - size * 0.66), (x + way * size * 0.78, y - size * 0.56),
               (x + way * size * 0.5, y - size * 0.48)], (236, 122, 48))  # fmt: skip
    c.ellipse(x + way * size * 0.38, y - size * 0.66, size * 0.045, size * 0.045, (40, 36, 44),
              plain=True)  # fmt: skip


def fish(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    skin, way = (240, 124, 66), random.choice((-1, 1))
    y -= size * 0.45
    c.polygon([(x - way * size * 0.36, y), (x - way * size * 0.8, y - size * 0.3),
               (x - way * size * 0.68, y), (x - way * size * 0.8, y + size * 0.3)],
              scale(skin, 0.86))  # fmt: skip
    c.ellipse(x, y, size * 0.5, size * 0.29, skin)
    c.ellipse(x - way * size * 0.05, y - size * 0.02, size * 0.07, size * 0.24, (252, 236, 214),
              plain=True)  # fmt: skip
    c.ellipse(x + way * size * 0.28, y - size * 0.07, size * 0.075, size * 0.075, (250, 250, 250),
              plain=True)  # fmt: skip
    c.ellipse(x + way * size * 0.3, y - size * 0.07, size * 0.04, size * 0.04, (30, 28, 36),
              plain=True)  # fmt: skip


def bird(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    flap = random.uniform(0.28, 0.44)
    tone = (236, 236, 250) if c.is_dark else (58, 54, 70)
    for side in (-1, 1):
        c.polygon([(x, y), (x + side * size * 0.3, y - size * flap),
                   (x + side * size * 0.62, y - size * 0.16),
                   (x + side * size * 0.3, y - size * (flap - 0.17))], tone, plain=True)  # fmt: skip
    c.ellipse(x, y, size * 0.09, size * 0.07, tone, plain=True)


def balloon(c: Canvas, x, y, size, random: Random, colour: str, season: str, snow: bool):
    cloth = COLOURS[colour or "red"]
    r, top = size * 0.36, y - size * 0.64
    for side in (-1, 1):
        c.line([(x + side * r * 0.5, top + r * 0.9), (x + side * size * 0.07, y - size * 0.12)],
               (112, 84, 62), size * 0.018)  # fmt: skip
    c.polygon([(x - r * 0.86, top + r * 0.5), (x + r * 0.86, top + r * 0.5),
               (x + r * 0.26, y - size * 0.2), (x - r * 0.26, y - size * 0.2)], cloth)  # fmt: skip
    c.ellipse(x, top, r, r, cloth)
    stripe = (252, 244, 226)
    c.ellipse(x, top, r * 0.34, r * 0.98, stripe, plain=True)
    c.polygon([(x - r * 0.32, top + r * 0.35), (x + r * 0.32, top + r * 0.35),
               (x + r * 0.1, y - size * 0.2), (x - r * 0.1, y - size * 0.2)], stripe,
              plain=True)  # fmt: skip
    c.rectangle(x - size * 0.08, y - size * 0.12, x + size * 0.08, y, (150, 104, 66))


# The drawing function of each kind, and its height in hundredths of the picture's shorter side.
DRAWN: dict[str, tuple[Callable[..., None], float]] = {
    "house": (house, 21),
    "windmill": (windmill, 33),
    "castle": (castle, 32),
    "lighthouse": (lighthouse, 40),
    "round tree": (round_tree, 27),
    "fir tree": (fir_tree, 29),
    "palm tree": (palm_tree, 38),
    "cactus": (cactus, 24),
    "sheep": (sheep, 11),
    "cat": (cat, 15),
    "rabbit": (rabbit, 13),
    "cow": (cow, 16),
    "flower": (flower, 10),
    "sailing boat": (sailing_boat, 24),
    "duck": (duck, 9),
    "fish": (fish, 12),
    "bird": (bird, 9),
    "balloon": (balloon, 25),
}
