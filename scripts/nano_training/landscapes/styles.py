"""The styles of landscapes that change a finished picture: pastel, watercolour, pixel art."""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image

_PAPER = np.array((252, 248, 238), dtype=np.float32) / 255


def finish(picture: np.ndarray, style: str, random: Random) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1] in its style; other styles are the canvas'."""
    if style == "pastel":
        return _pastel(picture)
    if style == "watercolour":
        return _watercolour(picture, np.random.default_rng(random.getrandbits(32)))
    if style == "pixel art":
        return _pixels(picture)
    return picture


def _pastel(picture: np.ndarray) -> np.ndarray:
    """Softer contrast, paler and creamier colours."""
    return picture * 0.5 + _PAPER * 0.47


def _watercolour(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Uneven edges, pigment that pools, paper that shows."""
    height, width = picture.shape[:2]
    waves = [_noise(random, height, width, 14) for _ in range(3)]
    unit = min(height, width) / 100
    rows = np.arange(height, dtype=np.float32)[:, None] + 1.5 * unit * (waves[0] - 0.5)
    columns = np.arange(width, dtype=np.float32)[None, :] + 1.5 * unit * (waves[1] - 0.5)
    rows = rows.round().astype(np.intp).clip(0, height - 1)
    columns = columns.round().astype(np.intp).clip(0, width - 1)
    wet = picture[rows, columns]
    pigment = 0.8 + 0.3 * waves[2] + 0.1 * (_noise(random, height, width, 40) - 0.5)
    # More pigment is a darker wash; paper is white where there is none.
    result = 1 - (1 - wet) * pigment[..., None]
    return (0.9 * result + 0.1 * _PAPER).clip(0, 1)


def _noise(random: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise (H, W) in [0, 1] with so many cells along the shorter side."""
    side = min(height, width)
    shape = (max(2, cells * height // side), max(2, cells * width // side))
    coarse = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
    smooth = coarse.resize((width, height), Image.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255


def _pixels(picture: np.ndarray) -> np.ndarray:
    """Large square pixels, 64 along the shorter side, in fewer colours."""
    height, width = picture.shape[:2]
    block = max(1, min(height, width) // 64)
    small = picture[: height // block * block, : width // block * block]
    small = small.reshape(height // block, block, width // block, block, 3).mean(axis=(1, 3))
    small = (small * 15).round() / 15
    large = small.repeat(block, axis=0).repeat(block, axis=1)
    rest = ((0, height - large.shape[0]), (0, width - large.shape[1]), (0, 0))
    return np.pad(large, rest, mode="edge")
