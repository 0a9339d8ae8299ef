"""What sees in a text encoder's file, under ComfyUI's management, and the images it is given.

ComfyUI keeps images as (B, H, W, C) with values from 0 to 1, and puts one in a row of tokens as a
dictionary in the place of a token. Ours do the same, so that nodes which look at rows know them.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch

from ...krea2_model.prompt_images import IMAGE_PAD, on_white, with_image_tokens
from ...krea2_model.vision import ImageTokens, fit_image, read_vision_tower
from .parts import LazyPart

# As many pixels as core lets through: a square of this side.
CORE_SIDE = 3584


class LazyVision(LazyPart):
    """The vision tower of an encoder's file."""

    def __init__(self, path, dtype, make_layers):
        super().__init__(path, dtype, make_layers, read_vision_tower, "merger.norm.weight")

    def file_tensors(self, like):
        """Files hold the patch embedding in the shape of a convolution."""
        tensors, config = super().file_tensors(like), self.patcher.model.config
        patch = (config.in_channels, config.temporal_patch_size, *[config.patch_size] * 2)
        name = "patch_embed.proj.weight"
        return tensors | {name: tensors[name].reshape(-1, *patch)}


def pictures(images) -> list[torch.Tensor]:
    """Each image of batches (B, H, W, C) as (3, H, W); where one is transparent, white shows.

    images: a batch, a list of batches, or None for none. Raises ValueError for what is no image.
    """
    if images is None:
        return []
    found = []
    for batch in [images] if isinstance(images, torch.Tensor) else images:
        is_batch = isinstance(batch, torch.Tensor) and batch.ndim == 4 and 0 not in batch.shape
        if not is_batch or batch.shape[-1] not in (3, 4):
            shape = tuple(getattr(batch, "shape", ())) or type(batch).__name__
            raise ValueError(
                f"The image is {shape}; expected (1 or more, height, width, 3 or 4 channels)."
            )
        found += [on_white(image.movedim(-1, 0).float()) for image in batch]
    return found


def fitted(images, max_side: int) -> list[torch.Tensor]:
    """Each image of batches as (3, H, W) in the size that the tower sees, on the CPU."""
    return [fit_image(picture.cpu(), max_side) for picture in pictures(images)]


def image_token(pixels: torch.Tensor) -> dict:
    """An image (3, H, W) as it stands in a row of tokens, in a size that the tower takes."""
    data = fit_image(pixels, CORE_SIDE).movedim(0, -1)[None]
    return {"type": "image", "data": data, "original_type": "image"}


def is_image(token) -> bool:
    return isinstance(token, dict) and token.get("type") == "image"


def has_images(rows) -> bool:
    """Whether rows of (token, weight) hold an image."""
    return any(is_image(pair[0]) for row in rows for pair in row)


def image_sizes(row: Iterable) -> list[int]:
    """Pixels of each image in a row of tokens."""
    return [token["data"].shape[1] * token["data"].shape[2] for token in row if is_image(token)]


def images_of(row: Iterable) -> list[torch.Tensor]:
    """The images (3, H, W) in a row of tokens; those of other nodes may have any size."""
    return [fit_image(pictures(token["data"])[0], CORE_SIDE) for token in row if is_image(token)]


def content_of(token):
    """What of a token an encoding depends on: of an image its pixels."""
    if not is_image(token):
        return token
    data = token["data"].detach().cpu().contiguous()
    digest = hashlib.sha256(data.view(torch.uint8).numpy().data).digest()
    return "image", tuple(data.shape), str(data.dtype), digest


def spell_images(row: Sequence, seen: Sequence[ImageTokens]) -> list[int]:
    """Token ids of a row in which each image has its places."""
    ids = [IMAGE_PAD if is_image(token) else token for token in row]
    return with_image_tokens(ids, [image.grid for image in seen]) if seen else ids
