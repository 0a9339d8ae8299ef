"""A picture of regions: each in a colour of its own, with its number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .region_shapes import RegionShapes
from .resize import resize

# One a region, in the order of the canvas (web/js/regions.js).
COLOURS = (
    *((230, 75, 65), (60, 130, 235), (250, 190, 40), (70, 170, 90)),
    *((165, 95, 215), (245, 130, 50), (60, 190, 200), (235, 115, 175)),
)
_GREY = (60, 60, 64)
# Pixels of the longer side, and of a cell whose share of a region is computed.
_LONGEST = 512
_CELL = 4
# Opacity of a region's colour over a picture.
_OPACITY = 0.55


class RegionPicture(NamedTuple):
    """picture: (1, H, W, 3) in [0, 1]. areas: the fraction of the image of each region."""

    picture: Tensor
    areas: list[float]


def draw_regions(
    shapes: RegionShapes,
    width: int,
    height: int,
    picture: Tensor | None = None,
    *,
    boxes: bool = True,
) -> RegionPicture:
    """Regions of an image of this size in pixels, drawn at up to 512 px.

    picture: (1, H, W, 3), to draw them on; None is grey. boxes: draw rectangles too, which the
    canvas of the page draws itself.
    """
    scale = _LONGEST / max(width, height)
    columns, rows = (max(1, round(side * scale / _CELL)) for side in (width, height))
    shares = shapes.shares(rows, columns)
    areas = shares.mean(dim=1).tolist()
    columns, rows = _CELL * columns, _CELL * rows
    cells = shares.view(-1, rows // _CELL, columns // _CELL, 1)
    shares = resize(cells, columns, rows)[..., 0]
    if picture is None:
        canvas = torch.tensor(_GREY).div(255).expand(rows, columns, 3).clone()
    else:
        canvas = resize(picture[:1, ..., :3].float().cpu(), columns, rows)[0]
    opacity = 1.0 if picture is None else _OPACITY
    drawn = [
        (number, share)
        for number, (share, shape) in enumerate(zip(shares, shapes.shapes, strict=True))
        if boxes or shape.box is None
    ]
    for number, share in drawn:
        colour = COLOURS[number]
        canvas = canvas.lerp(torch.tensor(colour) / 255, opacity * share[..., None])
    image = Image.fromarray((canvas.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=36)
    for number, share in drawn:
        place = _middle(share)
        draw.text(
            place,
            str(number + 1),
            fill="white",
            font=font,
            anchor="mm",
            stroke_width=3,
            stroke_fill="black",
        )
    return RegionPicture(torch.from_numpy(np.array(image)).float()[None] / 255, areas)


def _middle(share: Tensor) -> tuple[int, int]:
    """A point of a region, column and row, far from its edges: also of a ring."""
    inside = share >= 0.5 * share.max()
    # Imported here, since it takes a second and most runs have no regions.
    from scipy.ndimage import distance_transform_edt

    distance = distance_transform_edt(np.pad(inside.numpy(), 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return int(column), int(row)
