"""Draws the thumbnails of the styles that come with the pack, and a picture of one of nano's.

    python scripts/draw_styles.py [NAME ...]

Each thumbnail is one landscape, drawn by nano_training in a manner like the style's; those of
krea2-nano's styles are by krea2-nano. They show what a name means, not what Krea 2 makes of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from krea2_model import Krea2Pipeline
from krea2_model.features.style_library import BUILT_IN, THUMBNAIL
from nano_training.landscapes.drawing import draw
from nano_training.landscapes.scene import Landscape, Part

SIDE = 128
# Twice as large, so that lines are smooth.
DRAWN = 2 * SIDE
Picture = Image.Image


def scene(style: str = "flat", **options) -> Picture:
    """A house and firs before mountains, by day unless told otherwise."""
    parts = (Part("house", "left", 1, "red"), Part("fir tree", "right", 3))
    settings = {"backdrop": "mountains", "parts": parts, **options}
    pixels = draw(Landscape(style=style, **settings), DRAWN, DRAWN)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def grey(picture: Picture) -> np.ndarray:
    return np.asarray(ImageOps.autocontrast(picture.convert("L")), dtype=np.float32) / 255


def tinted(values: np.ndarray, dark: str, light: str) -> Picture:
    """Grey values (H, W) in [0, 1] between two colours."""
    image = Image.fromarray((values.clip(0, 1) * 255).astype(np.uint8))
    return ImageOps.colorize(image, dark, light)


def edges(picture: Picture) -> np.ndarray:
    """Lines, from 0 (none) to 1."""
    blurred = picture.convert("L").filter(ImageFilter.GaussianBlur(1.5))
    rows, columns = np.gradient(np.asarray(blurred, dtype=np.float32))
    return np.clip(np.hypot(rows, columns) / 12, 0, 1)


def grain(strength: float) -> np.ndarray:
    return np.random.default_rng(1).normal(0, strength, (DRAWN, DRAWN)).astype(np.float32)


def ink_wash() -> Picture:
    wash = scene("watercolour", weather="fog")
    return tinted(grey(wash) ** 0.8 * 0.9 + 0.1, "#15161a", "#f6f3ea")


def blueprint() -> Picture:
    values = edges(scene())
    values[::16], values[:, ::16] = (
        np.maximum(values[::16], 0.25),
        np.maximum(values[:, ::16], 0.25),
    )
    return tinted(values, "#1d4f9c", "#f2f7ff")


def woodcut() -> Picture:
    values, rows = grey(scene()), np.arange(DRAWN)[:, None]
    lines = 0.5 + 0.5 * np.sin(rows / 2.2 + 4 * values)
    return tinted((values > 0.2 + 0.55 * lines).astype(np.float32), "#1a1512", "#f1e6cf")


def charcoal() -> Picture:
    values = 1 - 0.8 * edges(scene()) - 0.45 * (1 - grey(scene())) + grain(0.09)
    return tinted(values, "#1c1b1a", "#efeae0")


def risograph() -> Picture:
    values = grey(scene())
    y, x = np.mgrid[:DRAWN, :DRAWN]
    dots = (np.sin(x / 2.0) + np.sin(y / 2.0)) / 4 + 0.5
    pink = tinted((values > dots * 0.9).astype(np.float32), "#ff5a7a", "#fff6e6")
    blue = tinted((values > 0.35).astype(np.float32), "#1f5fae", "#ffffff")
    return Image.composite(pink, blue, Image.fromarray(((values > 0.35) * 255).astype(np.uint8)))


def film_still() -> Picture:
    pixels = np.asarray(scene(time="sunset"), dtype=np.float32) / 255
    pixels = (pixels * (1.05, 0.95, 0.85) + grain(0.04)[..., None]).clip(0, 1)
    picture = Image.fromarray((pixels * 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(0.8))
    bar = DRAWN // 7
    picture.paste("black", (0, 0, DRAWN, bar))
    picture.paste("black", (0, DRAWN - bar, DRAWN, DRAWN))
    return picture


def oil_painting() -> Picture:
    return ImageOps.autocontrast(scene().filter(ImageFilter.ModeFilter(11)))


def nano(prompt: str, **options) -> Callable[[], Picture]:
    def paint() -> Picture:
        pipeline = Krea2Pipeline.nano()
        return pipeline(prompt, seed=1, **options)[0]

    return paint


def nano_style(name: str) -> Callable[[], Picture]:
    return nano("a large red star on a white background" if "ground" not in name else "a red star",
                styles={name: 1})  # fmt: skip


THUMBNAILS: dict[str, Callable[[], Picture]] = {
    "Blueprint": blueprint,
    "Charcoal sketch": charcoal,
    "Film still": film_still,
    "Flat poster": lambda: scene().quantize(9, dither=Image.Dither.NONE),
    "Ink wash": ink_wash,
    "Neon night": lambda: scene("neon", time="night", light="moon"),
    "Oil painting": oil_painting,
    "Paper cut": lambda: scene("paper cut"),
    "Pastel": lambda: scene("pastel"),
    "Pixel art": lambda: scene("pixel art"),
    "Risograph": risograph,
    "Watercolour": lambda: scene("watercolour"),
    "Woodcut": woodcut,
    "nano black ground": nano_style("nano black ground"),
    "nano notebook": nano_style("nano notebook"),
    "nano yellow ring": nano_style("nano yellow ring"),
}


def main(names: list[str]) -> None:
    if "nano yellow ring" in (names or THUMBNAILS):
        ring = nano("a purple ring in the top left on a yellow background")()
        ring.save(BUILT_IN / "nano yellow ring" / "picture-1.png", optimize=True)
    for name in names or THUMBNAILS:
        small = THUMBNAILS[name]().convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(BUILT_IN / name / THUMBNAIL, quality=80, method=6)


if __name__ == "__main__":
    main(sys.argv[1:])
