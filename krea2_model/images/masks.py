"""Masks for inpainting: growing, feathering, latent masks, and compositing.

A mask is (B, H, W) in [0, 1], 1 where the image is painted anew. Values between are a share of the
run: a pixel masked by 0.6 starts where a run at denoise 0.6 would start, and keeps as much of
itself (Levin and Fried, "Differential Diffusion", arXiv 2306.00950). Images are (B, H, W, C) in
[0, 1].

Masks from outside come in through `mask_for`, or for latents through `without_noise`, which says
what counts as painted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import counted, there_are

# A latent cell covers a square of this many pixels.
CELL = 8

FILLS = ("original", "grey", "surroundings")

# Values this near to 0 or 1 are 0 or 1. Files of 8 bits have such values where nobody painted: by a
# rounding of alpha (1/255 for grey with alpha), or by more in JPEG and in mattes of a model. No run
# notices: the last of Raw's 28 steps, the shortest of any preset, begins at a time of 1/28.
NOISE = 8 / 255
# The part of it that is rounding. It is what counts for masks that others read in sigma, where
# Krea 2's first steps lie close to 1.
ROUNDING = 1 / 255

EMPTY = "The mask is empty: "

# The largest difference in aspect at which a mask is scaled to an image.
_SAME_ASPECT = 0.02


def without_noise(mask: Tensor, noise: float = NOISE) -> Tensor:
    """A mask of any shape as it counts: within [0, 1], and wholly 0 or 1 within `noise` of them.

    NaN is 0.
    """
    mask = mask.float().nan_to_num(nan=0.0).clamp(0, 1)
    # Values come as multiples of 1/255 in half precision too.
    mask = torch.where(mask <= noise + 1e-3, 0.0, mask)
    return torch.where(mask >= 1 - noise - 1e-3, 1.0, mask)


def distance_to(region: Tensor, limit: int) -> Tensor:
    """Euclidean distance of each pixel to the nearest one of a region, at most limit + 1.

    region: (B, H, W), bool. Distances are between the centres of pixels.
    """
    # Imported here, since it takes a second and most runs have no mask.
    from scipy.ndimage import distance_transform_edt

    distances = torch.full(region.shape, limit + 1.0, device=region.device)
    for distance, mask in zip(distances, region, strict=True):
        if mask.any():
            distance.copy_(torch.from_numpy(distance_transform_edt(~mask.cpu().numpy())))
    return distances.clamp_(max=limit + 1)


def repaint_mask(mask: Tensor, grow: int = 0, feather: int = 0, soft: bool = False) -> Tensor:
    """The mask of a run (B, H, W) from a painted one.

    Not soft: 1 for pixels masked by half or more and `grow` pixels around them, else 0.
    Soft: values stay, and fall off to 0 over `feather` pixels around the grown mask.
    """
    _check_pixels("grow", grow)
    _check_pixels("feather", feather)
    core = mask >= 0.5
    if grow:
        core = distance_to(core, grow) <= grow
    if not soft:
        return core.float()
    result = torch.maximum(mask, core.float())
    if feather:
        ramp = 1 - distance_to(core, feather) / (feather + 1)
        result = torch.maximum(result, ramp)
    return without_noise(result)


def cell_mask(mask: Tensor) -> Tensor:
    """The mask of latent cells (B, h, w) for one of pixels whose sides are multiples of 8.

    A cell takes the value of its most masked pixel. The model's patches of 2 x 2 cells need not
    agree, since the original is put back a cell at a time.
    """
    return F.max_pool2d(mask[:, None], CELL)[:, 0]


def remaining_mask(mask: Tensor, time: float) -> Tensor:
    """The part of a soft mask that the run paints when `time` of it remains: 0 or 1.

    time: from 1 (start) to 0, before the shift, over the time that the run started with. So a pixel
    masked by m starts where denoise m of that run does.
    """
    # Times come out of float32 sigmas; a mask of exactly a step's time takes part in that step.
    return (mask >= time - 1e-5).to(mask.dtype)


def blend_weights(mask: Tensor, feather: int) -> Tensor:
    """The weight of the painted image at each pixel, (B, H, W).

    0 wherever the mask is 0, rising over `feather` pixels inside of its edge to 1. The image's own
    border is no edge.
    """
    _check_pixels("feather", feather)
    ramp = (distance_to(mask <= 0, feather) / (feather + 1)).clamp_(max=1)
    # A smooth step: a kink at either end would be visible.
    return ramp.square() * (3 - 2 * ramp)


def composite(original: Tensor, painted: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """The painted image inside a mask, the original to the bit outside; all of one size.

    A batch of one goes with a batch of any size. Channels that only the original has (alpha) are 1
    where it was painted.
    """
    counts = {len(original), len(painted), len(mask)} - {1}
    if len(counts) > 1:
        raise ValueError(
            f"{there_are(len(original), 'original image')}, {counted(len(painted), 'painted one')} "
            f"and {counted(len(mask), 'mask')}; expected one number, or one of a kind for all."
        )
    missing = original.shape[-1] - painted.shape[-1]
    if missing > 0:
        painted = F.pad(painted, (0, missing), value=1.0)
    painted = painted[..., : original.shape[-1]]
    weights = blend_weights(mask, feather)[..., None]
    mixed = original + weights * (painted - original)
    # Exact at both ends: no rounding of painted pixels, no NaN of a failed run in original ones.
    mixed = torch.where(weights >= 1, painted, mixed)
    return torch.where(weights <= 0, original, mixed)


def filled(image: Tensor, mask: Tensor, how: str) -> Tensor:
    """An image whose wholly masked pixels are replaced: `how` is one of `FILLS`.

    A run from pure noise does not see them, but their neighbours do through the VAE, and a run at
    a lower denoise starts from them.
    """
    if how not in FILLS:
        raise ValueError(f"fill is {how!r}; expected one of {', '.join(FILLS)}.")
    if how == "original":
        return image
    masked = (mask >= 1)[..., None]
    fill = torch.full_like(image, 0.5) if how == "grey" else _surroundings(image, ~masked)
    return torch.where(masked, fill, image)


def _surroundings(image: Tensor, known: Tensor) -> Tensor:
    """Known pixels spread over the others by a pyramid: sharp at the edge, an average far off."""
    known = known.movedim(-1, 1).to(image.dtype)
    colour, weight = image.movedim(-1, 1) * known, known.expand(len(image), -1, -1, -1)
    levels = [(colour, weight)]
    while max(colour.shape[-2:]) > 1:
        colour, weight = _halved(colour), _halved(weight)
        levels.append((colour, weight))
    colour, weight = levels.pop()
    result = torch.where(weight > 0, colour / weight.clamp(min=1e-12), 0.5)
    while levels:
        colour, weight = levels.pop()
        coarse = F.interpolate(result, colour.shape[-2:], mode="bilinear")
        result = colour + (1 - weight) * coarse
    return result.movedim(1, -1)


def _halved(part: Tensor) -> Tensor:
    return F.avg_pool2d(part, 2, ceil_mode=True, count_include_pad=False)


def mask_for(mask: Tensor, image: Tensor) -> Tensor:
    """A mask (1 or B, H, W) in the size of an image (B, H, W, C), scaled where the aspects agree.

    A mask without a batch, (H, W), or with a channel, (B, 1, H, W), is taken as well;
    `without_noise` is applied. A mask that nobody painted has no size of its own
    (ComfyUI gives 64 x 64 zeros for an image without alpha) and becomes zeros (1, H, W).
    """
    height, width = image.shape[1:3]
    if mask.ndim not in (2, 3, 4) or mask.numel() == 0:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}; expected (batch, height, width)."
        )
    mask = without_noise(mask.reshape(-1, *mask.shape[-2:]).to(image.device))
    if not mask.any():
        return mask.new_zeros(1, height, width)
    rows, columns = mask.shape[-2:]
    if (rows, columns) != (height, width):
        stretch = (width / columns) / (height / rows)
        # Sides of a mask are rounded to whole pixels, which says more the fewer they are.
        if abs(stretch - 1) > _SAME_ASPECT + 0.5 / min(rows, columns):
            raise ValueError(
                f"The mask is {columns} x {rows} px and the image {width} x {height}; expected the "
                "same size, or the same aspect. Paint the mask on this image, or bring both to one "
                "size with Krea 2 Fit Image."
            )
        mask = F.interpolate(mask[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
        mask = without_noise(mask)
    if len(mask) > 1 and len(image) > 1 and len(mask) != len(image):
        raise ValueError(
            f"{there_are(len(mask), 'mask')} for {counted(len(image), 'image')}; expected one, or "
            "one per image."
        )
    return mask


def _check_pixels(name: str, pixels: int) -> None:
    if isinstance(pixels, bool) or not isinstance(pixels, int) or not 0 <= pixels <= 1024:
        raise ValueError(f"{name} is {pixels!r}; expected a whole number of pixels, 0 to 1024.")
