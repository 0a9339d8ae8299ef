"""Images in rows of tokens.

ComfyUI puts an image in a row as a dictionary in the place of a token. Ours do the same, for nodes
that read rows. Images of our own nodes are marked: they are encoded as in the training of the model
and of LoRAs. Those of other nodes are encoded as by core's Krea 2 encoder, with its own functions
where it has them, so that patches of these work: its sizes, its positions, its tap after DeepStack,
and lists of images that share one span.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import comfy.text_encoders.qwen3vl as core
import comfy.text_encoders.qwen_vl as core_images
import torch

from ...krea2_model.images.resize import on_white
from ...krea2_model.text.prompt_images import IMAGE_PAD, TOKEN_SIDE, expand_image_tokens
from ...krea2_model.text.vision import ImageTokens, Qwen3VLVisionTower, resize_for_tower
from .contract import is_replaced
from .vision import pictures

# A token's entry for images that are encoded as in training.
AS_TRAINED = "krea2_as_trained"

# Side of the largest square that core accepts.
_CORE_SIDE = 3584

# Older versions of core give images neither their positions nor DeepStack features.
_CORE_SEES = "forward" in vars(core.Qwen3VL)


class Look(NamedTuple):
    """A row of tokens as the language tower takes it; the last two for core's way of encoding."""

    ids: list[int]
    images: list[ImageTokens]
    positions: torch.Tensor | None = None
    tap_with_deepstack: bool = False


def with_images(tokens: list[int], images, as_trained: bool) -> list:
    """Token ids with images in the place of their pad tokens.

    images: batches (B, H, W, C), or lists of them that share one place, or None.
    Raises ValueError unless there are as many of each.
    """
    entries = split_images(images)
    if as_trained:
        entries = [resize_for_tower(p, _CORE_SIDE).movedim(0, -1)[None] for p in pictures(images)]
    elif isinstance(images, (list, tuple)) and tokens.count(IMAGE_PAD) == len(images):
        # Core encodes the first image of a batch that shares one place.
        entries = list(images)
    if not entries:
        return tokens
    expand_image_tokens(tokens, [(1, 1)] * len(entries))
    remaining = iter(entries)
    mark = {AS_TRAINED: True} if as_trained else {}
    return [
        {"type": "image", "data": next(remaining), "original_type": "image", **mark}
        if token == IMAGE_PAD
        else token
        for token in tokens
    ]


def split_images(images) -> list:
    """Each image of batches alone, (1, H, W, C); a list that shares one place stays one."""
    if images is None:
        return []
    entries: list = []
    for entry in [images] if isinstance(images, torch.Tensor) else images:
        if isinstance(entry, (list, tuple)):
            pictures(entry)  # raises for what is no image
            entries.append(list(entry))
        else:
            entries += [picture.movedim(0, -1)[None] for picture in pictures([entry])]
    return entries


def is_image(token) -> bool:
    return isinstance(token, dict) and token.get("type") == "image"


def has_images(rows) -> bool:
    """True if rows of (token, weight) hold an image."""
    return any(is_image(pair[0]) for row in rows for pair in row)


def row_length(row: list) -> int:
    """Tokens of a row, those of its images included."""
    return len(row) + sum(image_pixel_counts(row)) // TOKEN_SIDE**2


def image_pixel_counts(row: Iterable) -> list[int]:
    """Pixels of each image in a row of tokens."""
    return [
        image.shape[1] * image.shape[2]
        for token in row
        if is_image(token)
        for image in _images_of(token)
    ]


def cache_key(row: list) -> tuple:
    """A hashable key of the tokens in a row of (token, weight).

    An image counts by its pixels, a tensor of another pack by its identity.
    """
    return tuple(_token_key(pair[0]) for pair in row)


def _token_key(token):
    if not is_image(token):
        return token if isinstance(token, int) else _Same(token)
    digests = []
    for image in _images_of(token):
        data = image.detach().cpu().contiguous()
        digest = hashlib.sha256(data.view(torch.uint8).numpy().data).digest()
        digests.append((tuple(data.shape), str(data.dtype), digest))
    return "image", AS_TRAINED in token, tuple(digests)


class _Same:
    """Equal to itself by the identity of what it holds."""

    def __init__(self, held):
        self.held = held

    def __eq__(self, other):
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self):
        return id(self.held)


def look(row: list, tower: Qwen3VLVisionTower | None, device) -> Look:
    """A row with its images encoded by the tower, which is not needed without images."""
    images = [token for token in row if is_image(token)]
    if not images:
        return Look(row, [])
    assert tower is not None  # loaded with the encoder where a row has an image
    if all(AS_TRAINED in token for token in images) or not _CORE_SEES:
        encoded = [
            tower(resize_for_tower(picture, _CORE_SIDE).to(device, torch.float32))
            for token in images
            for picture in pictures(_images_of(token)[:1])
        ]
        return Look(_ids(row, encoded), encoded)
    return _look_as_core(row, images, tower, device)


def _look_as_core(row: list, images: list, tower: Qwen3VLVisionTower, device) -> Look:
    model, encoded = _VisualOfCore(tower), []
    places: list[dict[str, Any]] = []
    for token in images:
        tokens, extra = _embeds(model, token, device)
        tokens, deepstack = tokens.view(-1, tokens.shape[-1]), tuple(extra["deepstack"])
        rows, columns = (int(side) // 2 for side in extra["grid"][0, 1:])
        grid = (rows, columns) if rows * columns == len(tokens) else (1, len(tokens))
        encoded.append(ImageTokens(tokens, deepstack, grid))
        places.append({"type": "image", "size": len(tokens), "extra": extra})
    ids = _ids(row, encoded)
    start = 0
    for place in places:
        place["index"] = start = ids.index(IMAGE_PAD, start)
        start += place["size"]
    positions = core_images.qwen2vl_mrope_position_ids(places, len(ids), device)
    return Look(ids, encoded, positions, tap_with_deepstack=True)


def _embeds(model, token: dict, device) -> tuple[torch.Tensor, dict]:
    """An image by core's function: tokens (N, width), and its grid and features.

    A list of images becomes one span: here, unless a pack has replaced the function to do so.
    """
    images = [{**token, "data": _opaque(image)} for image in _images_of(token)]
    if not isinstance(token["data"], (list, tuple)):
        return core.Qwen3VL.preprocess_embed(model, images[0], device=device)
    if is_replaced(core.Qwen3VL, "preprocess_embed"):
        token = {**token, "data": [image["data"] for image in images]}
        return core.Qwen3VL.preprocess_embed(model, token, device=device)
    tokens, extras = zip(
        *(core.Qwen3VL.preprocess_embed(model, image, device=device) for image in images),
        strict=True,
    )
    layers = zip(*(extra["deepstack"] for extra in extras), strict=True)
    deepstack = [torch.cat(features) for features in layers]
    return torch.cat(tokens), {"grid": extras[0]["grid"], "deepstack": deepstack}


class _VisualOfCore:
    """Our vision tower behind the part of core's text model that embeds images."""

    def __init__(self, tower: Qwen3VLVisionTower):
        self._tower = tower

    def visual(self, patches, grid):
        rows, columns = (int(side) for side in grid[0, 1:])
        image = self._tower.see(patches[None], rows, columns)
        return image.tokens, list(image.deepstack)


def _images_of(token: dict) -> list[torch.Tensor]:
    """The batches (B, H, W, C) of a token."""
    data = token["data"]
    return list(data) if isinstance(data, (list, tuple)) else [data]


def _opaque(image: torch.Tensor) -> torch.Tensor:
    """The first of a batch (B, H, W, C) as (1, H, W, 3)."""
    return on_white(image[0].movedim(-1, 0)).movedim(0, -1)[None]


def _ids(row: list, images: list[ImageTokens]) -> list[int]:
    """Token ids of a row, with as many pad tokens for each image as it has tokens."""
    ids = [IMAGE_PAD if is_image(token) else token for token in row]
    return expand_image_tokens(ids, [image.grid for image in images])
