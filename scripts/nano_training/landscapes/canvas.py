"""A canvas for landscapes: Pillow shapes at several times the size, reduced to smooth edges.

Coordinates are pixels of the finished picture as floats, from the upper left corner. Colours are
RGB tuples from 0 to 255. Shapes are drawn in the canvas' style: with ink lines, with shadows as of
cut paper, or as glowing lines on dark fills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[float, float, float]
Point = tuple[float, float]

INK = (38, 34, 52)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour, and what is left of the first."""
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


def scale(colour: Colour, factors: Colour | float) -> Colour:
    """A colour, darker or lighter by a factor or one for each channel."""
    if not isinstance(factors, tuple):
        factors = (factors, factors, factors)
    red, green, blue = (min(255.0, max(0.0, c * f)) for c, f in zip(colour, factors, strict=True))
    return red, green, blue


class Canvas:
    """Shapes drawn one over the other.

    light: changes the colour of everything that is drawn as the time of day does.
    is_dark: the sky is dark, and what flies there has to be pale.
    """

    def __init__(
        self,
        width: int,
        height: int,
        style: str,
        light: Callable[[Colour], Colour],
        is_dark: bool = False,
    ):
        self.is_dark = is_dark
        self.width, self.height, self.style, self.light = width, height, style, light
        self.unit = min(width, height) / 100  # sizes of things are in these
        self.factor = 3 if width * height <= 160 * 160 else 2
        size = (width * self.factor, height * self.factor)
        self.image = Image.new("RGB", size)
        self.pen = ImageDraw.Draw(self.image)
        self.glow = Image.new("RGB", size) if style == "neon" else None
        self.glow_pen = ImageDraw.Draw(self.glow) if self.glow else None

    @property
    def line_width(self) -> int:
        return max(1, round(0.75 * self.unit * self.factor))

    def polygon(self, points: Sequence[Point], colour: Colour, *, plain: bool = False) -> None:
        """Fill a polygon. plain: without ink lines, shadows or glow, for details."""
        f = self.factor
        scaled = [(x * f, y * f) for x, y in points]
        fill = _rounded(self.light(colour))
        if plain:
            if self.glow_pen:
                fill = _rounded(scale(self.light(colour), 0.6))
            self.pen.polygon(scaled, fill)
        elif self.style == "outlined":
            self.pen.polygon(scaled, fill)
            self.pen.line([*scaled, scaled[0]], INK, self.line_width, joint="curve")
        elif self.style == "paper cut":
            self._shadow(scaled)
            self.pen.polygon(scaled, fill)
        elif self.glow_pen:
            self.pen.polygon(scaled, _dark(colour))
            self.glow_pen.polygon(scaled, (0, 0, 0))
            self.glow_pen.line([*scaled, scaled[0]], _neon(colour), self.line_width, joint="curve")
        else:
            self.pen.polygon(scaled, fill)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, *, plain: bool = False
    ) -> None:
        """Fill an ellipse around (x, y)."""
        steps = 16 if max(rx, ry) < 4 * self.unit else 40
        angles = [2 * math.pi * i / steps for i in range(steps)]
        points = [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]
        self.polygon(points, colour, plain=plain)

    def rectangle(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        colour: Colour,
        *,
        plain: bool = False,
    ) -> None:
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        self.polygon(points, colour, plain=plain)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """A line of `width` pixels; it never has an outline."""
        f = self.factor
        scaled = [(x * f, y * f) for x, y in points]
        stroke = max(1, round(width * f))
        self.pen.line(scaled, _rounded(self.light(colour)), stroke, joint="curve")
        if self.glow_pen:
            self.glow_pen.line(scaled, _neon(colour), stroke)

    def gradient(self, stops: Sequence[tuple[float, Colour]], top: float, bottom: float) -> None:
        """Rows from `top` to `bottom` in colours that pass into each other; stops from 0 to 1.

        The colours are those of the picture: the time of day does not change them.
        """
        f = self.factor
        first, last = round(top * f), round(bottom * f)
        if last <= first:
            return
        share = np.linspace(0, 1, last - first)
        places = [place for place, _ in stops]
        rows = np.stack(
            [np.interp(share, places, [colour[c] for _, colour in stops]) for c in range(3)], axis=1
        )
        column = Image.fromarray(rows.round().astype(np.uint8)[:, None, :])
        self.image.paste(column.resize((self.image.width, last - first), Image.NEAREST), (0, first))

    def halo(self, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
        """Light around a point that fades with the distance."""
        f = self.factor
        side = max(8, round(2 * radius * f))
        axis = np.linspace(-1, 1, 48)
        distance = np.hypot(axis[None, :], axis[:, None])
        cover = (np.clip(1 - distance, 0, 1) ** 2 * 255 * strength).astype(np.uint8)
        mask = Image.fromarray(cover).resize((side, side), Image.BILINEAR)
        corner = (round((x - radius) * f), round((y - radius) * f))
        self.image.paste(_rounded(colour), (*corner, corner[0] + side, corner[1] + side), mask)

    def finished(self) -> np.ndarray:
        """The picture (H, W, 3) float32 in [0, 1]."""
        image = self.image.reduce(self.factor)
        if self.glow:
            lines = self.glow.reduce(self.factor)
            soft = lines.filter(ImageFilter.BoxBlur(2.2 * self.unit))
            light = np.asarray(lines, np.float32) + 1.6 * np.asarray(soft, np.float32)
            return np.minimum(np.asarray(image, np.float32) + light, 255) / 255
        return np.asarray(image, np.float32) / 255

    def _shadow(self, scaled: Sequence[Point]) -> None:
        # A rim of the colour that lies behind would need a mask; a dark one is near enough.
        for distance, strength in ((1.5, 60), (0.8, 90)):
            offset = distance * self.unit * self.factor
            moved = [(x + 0.5 * offset, y - 0.8 * offset) for x, y in scaled]
            xs, ys = [x for x, _ in moved], [y for _, y in moved]
            left, top = max(0, int(min(xs))), max(0, int(min(ys)))
            right = min(self.image.width, math.ceil(max(xs)) + 1)
            bottom = min(self.image.height, math.ceil(max(ys)) + 1)
            if right <= left or bottom <= top:
                return
            mask = Image.new("L", (right - left, bottom - top))
            ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in moved], strength)
            self.image.paste((20, 18, 40), (left, top, right, bottom), mask)


def _rounded(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, round(c))) for c in colour)
    return red, green, blue


def _dark(colour: Colour) -> tuple[int, int, int]:
    return _rounded(mix((16, 10, 38), colour, 0.1))


def _neon(colour: Colour) -> tuple[int, int, int]:
    """The same hue as bright and pure as it goes; greys become cyan."""
    low, high = min(colour), max(colour)
    if high - low < 40:
        return (60, 225, 255)
    red, green, blue = (40 + 215 * (c - low) / (high - low) for c in colour)
    return _rounded((red, green, blue))
