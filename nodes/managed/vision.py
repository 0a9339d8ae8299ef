"""The vision tower of a text encoder's file under ComfyUI's management, and its input images.

ComfyUI keeps images as (B, H, W, C) with values from 0 to 1.
"""

import torch

from ...krea2_model.checkpoints.text_encoder import read_vision_tower
from ...krea2_model.checks import check_finite
from ...krea2_model.images.resize import on_white
from ...krea2_model.text.vision import resize_for_tower
from .lazy_parts import LazyPart


class LazyVision(LazyPart):
    """The vision tower of an encoder's file."""

    def __init__(self, path, dtype, make_layers):
        super().__init__(path, dtype, make_layers, read_vision_tower, "merger.norm.weight")

    def file_tensors(self, like):
        """Files hold the patch embedding in the shape of a convolution."""
        tensors, config = super().file_tensors(like), self.load(like).model.config
        patch = (config.in_channels, config.temporal_patch_size, *[config.patch_size] * 2)
        name = "patch_embed.proj.weight"
        return tensors | {name: tensors[name].reshape(-1, *patch)}


def pictures(images, name: str = "") -> list[torch.Tensor]:
    """Each image of batches (B, H, W, C) as (3, H, W); transparent ones on white.

    images: a batch, a list of batches, or None for none. name: of the input, for errors.
    Raises ValueError for what is no image, and for one with NaN, by its number.
    """
    if images is None:
        return []
    result: list[torch.Tensor] = []
    for batch in [images] if isinstance(images, torch.Tensor) else images:
        is_batch = isinstance(batch, torch.Tensor) and batch.ndim == 4 and 0 not in batch.shape
        if not is_batch or batch.shape[-1] not in (3, 4):
            shape = tuple(getattr(batch, "shape", ())) or type(batch).__name__
            raise ValueError(
                f"The image is {shape}; expected (1 or more, height, width, 3 or 4 channels)."
            )
        for image in batch:
            pixels = on_white(image.movedim(-1, 0).float())
            check_finite(pixels, f"Image {len(result) + 1}{name and f' of {name}'}")
            result.append(pixels)
    return result


def resize_all(images, max_side: int) -> list[torch.Tensor]:
    """Each image of batches as (3, H, W), at the size for the tower, on the CPU."""
    return [resize_for_tower(picture.cpu(), max_side) for picture in pictures(images)]
