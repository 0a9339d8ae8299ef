"""Draws docs/icon.png, the pack's picture in ComfyUI's registry: a K of flat shapes.

python scripts/draw_icon.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SIDE, OVERSAMPLING = 400, 4
FILE = Path(__file__).resolve().parents[1] / "docs" / "icon.png"

NIGHT, PAPER, RED, YELLOW, BLUE = "#1d2333", "#f4efe4", "#e5484d", "#f5b83d", "#3e8bf0"


def draw_icon() -> Image.Image:
    side = SIDE * OVERSAMPLING
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)

    def at(*points: float) -> list[float]:
        """Points in a square of 100."""
        return [point * side / 100 for point in points]

    pen.rounded_rectangle(at(0, 0, 100, 100), side * 0.2, fill=NIGHT)
    pen.rectangle(at(19, 20, 34, 80), fill=PAPER)
    pen.polygon(at(38, 49, 61, 20, 81, 20, 58, 49), fill=RED)
    pen.polygon(at(38, 51, 58, 51, 74, 80, 54, 80), fill=YELLOW)
    pen.ellipse(at(70, 43, 86, 59), fill=BLUE)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw_icon().save(FILE, optimize=True)
