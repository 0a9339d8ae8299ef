"""Images in rows of tokens.

ComfyUI puts an image in a row as a dictionary in the place of a token. Ours do the same, so that
nodes which look at rows know them. Images of our own nodes are marked: they are seen as the model
and LoRAs were trained. Those of other nodes are seen as by core's Krea 2 encoder, through its own
functions where it has them, so that what others made of these holds: its sizes, its positions, its
tap behind DeepStack, and lists of images that share one span.
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

# A token's entry for images that are seen as in training.
AS_TRAINED = "krea2_as_trained"

# As many pixels as core lets through: a square of this side.
_CORE_SIDE = 3584

# Older ones give images neither their positions nor DeepStack features.
_CORE_SEES = "forward" in vars(core.Qwen3VL)


class Look(NamedTuple):
    """A row of tokens as the language tower takes it; the last two for core's way of seeing."""

    ids: list[int]
    images: list[ImageTokens]
    positions: torch.Tensor | None = None
    tap_with_deepstack: bool = False


def with_images(tokens: list[int], images, as_trained: bool) -> list:
    """Token ids with images in the place of their pads.

    images: batches (B, H, W, C), or lists of them that share one place, or None.
    Raises ValueError unless there are as many of each.
    """
    entries = split_images(images)
    if as_trained:
        entries = [resize_for_tower(p, _CORE_SIDE).movedim(0, -1)[None] for p in pictures(images)]
    elif isinstance(images, (list, tuple)) and tokens.count(IMAGE_PAD) == len(images):
        # Of a batch in one place, core sees the first image.
        entries = list(images)
    if not entries:
        return tokens
    expand_image_tokens(tokens, [(1, 1)] * len(entries))
    left = iter(entries)
    mark = {AS_TRAINED: True} if as_trained else {}
    return [
        {"type": "image", "data": next(left), "original_type": "image", **mark}
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
    """Whether rows of (token, weight) hold an image."""
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
    """The tokens of a row of (token, weight), by which rows are told apart.

    An image counts by its pixels, and a tensor of another pack by being the same one.
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
    """A row whose images the tower has seen; without images it needs no tower."""
    images = [token for token in row if is_image(token)]
    if not images:
        return Look(row, [])
    assert tower is not None  # it is loaded with the encoder where a row has an image
    if all(AS_TRAINED in token for token in images) or not _CORE_SEES:
        seen = [
            tower(resize_for_tower(picture, _CORE_SIDE).to(device, torch.float32))
            for token in images
            for picture in pictures(_images_of(token)[:1])
        ]
        return Look(_ids(row, seen), seen)
    return _look_as_core(row, images, tower, device)


def _look_as_core(row: list, images: list, tower: Qwen3VLVisionTower, device) -> Look:
    eyes, seen = _Eyes(tower), []
    places: list[dict[str, Any]] = []
    for token in images:
        tokens, extra = _embeds(eyes, token, device)
        tokens, deepstack = tokens.view(-1, tokens.shape[-1]), tuple(extra["deepstack"])
        rows, columns = (int(side) // 2 for side in extra["grid"][0, 1:])
        whole = rows * columns == len(tokens)
        seen.append(ImageTokens(tokens, deepstack, (rows, columns) if whole else (1, len(tokens))))
        places.append({"type": "image", "size": len(tokens), "extra": extra})
    ids = _ids(row, seen)
    start = 0
    for place in places:
        place["index"] = start = ids.index(IMAGE_PAD, start)
        start += place["size"]
    positions = core_images.qwen2vl_mrope_position_ids(places, len(ids), device)
    return Look(ids, seen, positions, tap_with_deepstack=True)


def _embeds(eyes, token: dict, device) -> tuple[torch.Tensor, dict]:
    """What core's function makes of an image: tokens (N, width), and its grid and features.

    Of a list of images it makes one span only where a pack has taught it to; else it is done here.
    """
    images = [{**token, "data": _opaque(image)} for image in _images_of(token)]
    if not isinstance(token["data"], (list, tuple)):
        return core.Qwen3VL.preprocess_embed(eyes, images[0], device=device)
    if is_replaced(core.Qwen3VL, "preprocess_embed"):
        token = {**token, "data": [image["data"] for image in images]}
        return core.Qwen3VL.preprocess_embed(eyes, token, device=device)
    tokens, extras = zip(
        *(core.Qwen3VL.preprocess_embed(eyes, image, device=device) for image in images),
        strict=True,
    )
    layers = zip(*(extra["deepstack"] for extra in extras), strict=True)
    deepstack = [torch.cat(features) for features in layers]
    return torch.cat(tokens), {"grid": extras[0]["grid"], "deepstack": deepstack}


class _Eyes:
    """In the place of core's text model, where that makes embeddings of images."""

    def __init__(self, tower: Qwen3VLVisionTower):
        self._tower = tower

    def visual(self, patches, grid):
        rows, columns = (int(side) for side in grid[0, 1:])
        seen = self._tower.see(patches[None], rows, columns)
        return seen.tokens, list(seen.deepstack)


def _images_of(token: dict) -> list[torch.Tensor]:
    """The batches (B, H, W, C) that share a token's place."""
    data = token["data"]
    return list(data) if isinstance(data, (list, tuple)) else [data]


def _opaque(image: torch.Tensor) -> torch.Tensor:
    """The first of a batch (B, H, W, C) as (1, H, W, 3)."""
    return on_white(image[0].movedim(-1, 0)).movedim(0, -1)[None]


def _ids(row: list, seen: list[ImageTokens]) -> list[int]:
    """Token ids of a row in which each image has its places."""
    ids = [IMAGE_PAD if is_image(token) else token for token in row]
    return expand_image_tokens(ids, [image.grid for image in seen])
