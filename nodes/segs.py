"""SEGS, the areas that detectors of other packs find: read by its structure, without those packs.

SEGS is `((height, width), [segment, ...])`: the size of the image, and for each segment its
`crop_region` (left, top, right, bottom) and its `cropped_mask` (height, width) within that.
"""

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..krea2_model.images.areas import LocalMask
from ..krea2_model.images.crop import Box, extent_of
from ..krea2_model.images.masks import without_noise

SEGS = io.Custom("SEGS")

# The largest difference in aspect at which segments of another size are scaled to an image.
_SAME_ASPECT = 0.02


def masks_of_segs(segs, height: int, width: int) -> list[LocalMask]:
    """The areas of SEGS in an image of this size, in their order.

    Segments of an image of another size and the same aspect are scaled. Raises ValueError for
    anything that is no SEGS, and where it has no segment or belongs to another image.
    """
    try:
        (rows, columns), segments = segs
        rows, columns, segments = int(rows), int(columns), list(segments)
        parts = [(segment.crop_region, segment.cropped_mask) for segment in segments]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "segs is no SEGS; expected ((height, width), segments), each segment with crop_region "
            "and cropped_mask, as the detectors of the Impact Pack give it."
        ) from error
    if not parts:
        raise ValueError(
            "segs holds no segment: the detector found nothing. Lower its threshold, or connect a "
            "mask."
        )
    down, across = height / rows, width / columns
    if abs(across / down - 1) > _SAME_ASPECT:
        raise ValueError(
            f"segs belongs to an image of {columns} x {rows} px and the image is {width} x "
            f"{height}; expected the same size or aspect. Detect on the image that is connected."
        )
    found = []
    for number, (region, mask) in enumerate(parts, start=1):
        local = _local_mask(region, mask, across, down, Box(0, 0, width, height))
        if local is None:
            raise ValueError(
                f"Segment {number} of segs is empty in an image of {width} x {height} px (its "
                f"region is {tuple(region)}); expected a mask with a masked pixel. Filter it out."
            )
        found.append(local)
    return found


def _local_mask(region, mask, across: float, down: float, image: Box) -> LocalMask | None:
    left, right = (round(float(side) * across) for side in (region[0], region[2]))
    top, bottom = (round(float(side) * down) for side in (region[1], region[3]))
    if right <= left or bottom <= top:
        return None
    values = torch.as_tensor(mask).float()
    values = values.reshape(-1, *values.shape[-2:])[:1]
    if values.shape[1:] != (bottom - top, right - left):
        size = bottom - top, right - left
        values = F.interpolate(values[None], size, mode="bilinear", antialias=True)[0]
    values = without_noise(values[0])
    # A region may reach out of the image.
    first, last = (max(0, top), max(0, left)), (min(image.height, bottom), min(image.width, right))
    values = values[first[0] - top : last[0] - top, first[1] - left : last[1] - left]
    extent = extent_of(values) if values.numel() else None
    if extent is None:
        return None
    box = Box(first[1] + extent.left, first[0] + extent.top, extent.width, extent.height)
    return LocalMask(box, extent.of(values))
