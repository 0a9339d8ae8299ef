"""The second of two stages: an image made larger, noised again, and denoised at its new size.

The layout is fixed by the first stage at the size that the model was made for, so subjects do not
come twice. The noise is given as a sigma: a number of steps or a share of the schedule would mean
another noise at another size and shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..checks import check_type, is_number, is_whole
from ..config import Preset
from ..images.sizes import MAX_SCALE, MAX_SIZE, MULTIPLE, image_tokens, is_far
from ..schedule import resolve_mu, sigma_schedule, unshift_time
from ..transformer.rotary_scaling import RotaryScaling
from .tiles import TilePrompts, TileSettings

PIXELS, LATENT = "pixels", "latent"
METHODS = (PIXELS, LATENT)
AUTO, WHOLE, TILES = "auto", "whole", "tiles"
PARTS = (AUTO, WHOLE, TILES)

# Fewer steps leave the new grain half done, whatever the sigma.
_LEAST_STEPS = 4


@dataclass(frozen=True)
class Upscale:
    """Settings of the second stage.

    scale: of the sides, above 1 to 8.
    sigma: noise to start from, above 0 to 1: 0.3 keeps shapes, 0.6 changes them.
    method: "pixels" enlarges the image (bicubic), "latent" its latents, which is rougher.
    parts: "whole", "tiles", or "auto": tiles where the image is larger than the checkpoint can
        paint in one.
    steps: 0 takes the preset's for the part of the schedule that is left, at least 4.
    tile: side in pixels, 0 is the checkpoint's size. overlap, batch, prompts: see `TileSettings`.

    Raises ValueError for values out of range.
    """

    scale: float = 2.0
    sigma: float = 0.3
    method: str = PIXELS
    parts: str = AUTO
    steps: int = 0
    tile: int = 0
    overlap: float = 0.25
    batch: int = 1
    prompts: TilePrompts | None = None

    def __post_init__(self):
        if not (is_number(self.scale) and 1 < self.scale <= MAX_SCALE):
            raise ValueError(
                f"scale is {self.scale!r}; expected above 1 (a larger image) to {MAX_SCALE}. To "
                "change an image at its own size use denoise."
            )
        if not (is_number(self.sigma) and 0 < self.sigma <= 1):
            raise ValueError(f"sigma is {self.sigma!r}; expected above 0 to 1 (noise alone).")
        for name, choices in (("method", METHODS), ("parts", PARTS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}."
                )
        if not (is_whole(self.steps) and 0 <= self.steps <= 1000):
            raise ValueError(f"steps is {self.steps!r}; expected 0 (by the preset) to 1000.")
        TileSettings(self.tile or 1024, self.overlap, batch=self.batch, prompts=self.prompts)

    @classmethod
    def of(cls, upscale: Upscale | float | None) -> Upscale | None:
        """A scale alone has the other settings' defaults."""
        return upscale if upscale is None or isinstance(upscale, Upscale) else cls(upscale)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result, in multiples of 16.

        Raises ValueError where it is no larger than the image, or too large.
        """
        sides = [max(1, round(side * self.scale / MULTIPLE)) * MULTIPLE for side in (width, height)]
        if sides[0] <= width or sides[1] <= height:
            raise ValueError(
                f"{width} x {height} px at scale {self.scale:g} are {sides[0]} x {sides[1]} px in "
                f"whole tokens of {MULTIPLE}; expected a larger image. Raise the scale."
            )
        if max(sides) > MAX_SIZE:
            raise ValueError(
                f"{width} x {height} px at scale {self.scale:g} are {sides[0]} x {sides[1]} px; "
                f"expected at most {MAX_SIZE} a side. Lower the scale."
            )
        return sides[0], sides[1]

    def tiles(self, width: int, height: int, preset: Preset) -> TileSettings | None:
        """Tiles for an image of a size, None where it is painted whole."""
        settings = TileSettings(
            self.tile or preset.size, self.overlap, batch=self.batch, prompts=self.prompts
        )
        if self.parts == AUTO:
            return settings if is_far(width, height, preset.size) else None
        return settings if self.parts == TILES else None

    def mu(self, width: int, height: int, preset: Preset) -> float:
        """The exponent of the shift: of a tile where the model sees tiles."""
        tiles = self.tiles(width, height, preset)
        sides = (width, height) if tiles is None else (tiles.size, tiles.size)
        tokens = image_tokens(min(width, sides[0]), min(height, sides[1]))
        return resolve_mu(preset, tokens)

    def sigmas(self, width: int, height: int, preset: Preset) -> list[float]:
        """The schedule, from `sigma` to 0."""
        mu = self.mu(width, height, preset)
        time = unshift_time(self.sigma, mu)
        steps = self.steps or max(_LEAST_STEPS, math.ceil(time * preset.steps))
        return sigma_schedule(steps, mu, time)


def check_stages(
    upscale: Upscale | None,
    tiles: TileSettings | None,
    rotary: RotaryScaling | None,
    start: tuple[object, float, object],
) -> None:
    """Raise ValueError for stages of a run that do not go together.

    start: start_image, denoise and inpaint of the run.
    """
    image, denoise, inpaint = start
    if tiles is not None:
        check_type("tiles", tiles, TileSettings, "a TileSettings, or None")
    if rotary is not None:
        check_type("rotary", rotary, RotaryScaling, "a RotaryScaling, or None")
    if upscale is not None and inpaint is not None:
        raise ValueError(
            "upscale and inpaint do not go together: the rest of the picture would change. "
            "Inpaint first, then upscale the result."
        )
    if denoise == 0 and (upscale is None or image is None):
        raise ValueError(
            "denoise is 0, which changes nothing; it needs start_image and upscale, to make a "
            "picture larger."
        )


def enlarge_latents(latents: Tensor, width: int, height: int) -> Tensor:
    """Latents (..., h, w) of an image of width x height pixels, bicubic."""
    size = (height // 8, width // 8)
    flat = latents.reshape(-1, *latents.shape[-3:]) if latents.ndim != 4 else latents
    return F.interpolate(flat.float(), size, mode="bicubic").reshape(*latents.shape[:-2], *size)
