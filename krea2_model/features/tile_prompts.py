"""Prompts of single tiles in a run, see `TilePrompts`.

They are encoded once, for tiles that lie still; see `tiles.TileTexts` for those that move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..images.sizes import MULTIPLE
from ..text.prompt_images import MAX_IMAGES, PromptImage, grid_of
from ..transformer.patches import PATCH, grid_size
from .arguments import PromptImages
from .prompt_embeds import PromptEmbeds, stack_embeds
from .tiles import Tile, TileSettings, still_tiles

# Of images that are at the size that the tower reads already.
_UNLIMITED = 8192


def picture_tokens(tiles: TileSettings | None, grid: tuple[int, int]) -> int:
    """Tokens of a tile's picture in its text; 0 where none is seen. grid: of the image's tokens."""
    if tiles is None or tiles.prompts is None or not tiles.prompts.see_picture:
        return 0
    rows, columns = still_tiles(grid, tiles)[0].grid
    picture = PromptImage(torch.zeros(3, MULTIPLE * rows, MULTIPLE * columns))
    return math.prod(grid_of(picture.resized(tiles.prompts.max_side).pixels))


@dataclass(frozen=True)
class TileEncoder:
    """Encodes the prompts of tiles.

    encode: `PipelineStages.encode_prompt`. prompts: of the run, each of `repeats` images, or None.
    images: in front of each prompt, before the tile's. options: of `encode`.
    """

    encode: Callable[..., PromptEmbeds]
    prompts: Sequence[str] | None
    repeats: int = 1
    images: PromptImages = field(default_factory=PromptImages)
    layer_weights: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, tiles: TileSettings | None, grid: tuple[int, int], has_picture: bool) -> int:
        """Tokens that the tiles' pictures add to a text; 0 without prompts of tiles.

        grid: rows and columns of the image's tokens. has_picture: there is one to see.
        Raises ValueError for another number of texts than tiles, and for what is missing.
        """
        if tiles is None or tiles.prompts is None:
            return 0
        own, still = tiles.prompts, still_tiles(grid, tiles)
        own.texts_of(still, [])
        if own.texts is None and self.prompts is None:
            raise ValueError(
                "Tiles see their part of the picture in front of the prompt, and there are only "
                "prompt_embeds. Give prompt, or texts of the tiles."
            )
        if not own.see_picture:
            return 0
        if not has_picture:
            raise ValueError(
                "Prompts of tiles see the picture that is changed or made larger, and there is "
                "none. Give start_image, use upscale, or set see_picture=False."
            )
        if len(self.images.prepared()) == MAX_IMAGES:
            raise ValueError(
                f"There are {MAX_IMAGES} images in the prompt, so that none may be added for a "
                f"tile; expected at most {MAX_IMAGES - 1}. Leave one out, or set see_picture=False."
            )
        return picture_tokens(tiles, grid)

    def texts(
        self, tiles: TileSettings | None, latents: Tensor, pictures: Tensor | None
    ) -> list[PromptEmbeds]:
        """The texts of all tiles, none without prompts of tiles.

        latents: (B, 16, h, w) of the images. pictures: (1 or B, 3, H, W) in [0, 1], whose parts
        are seen. Each text has a row for each image, or one for several in order.
        """
        if tiles is None or tiles.prompts is None:
            return []
        own, still = tiles.prompts, still_tiles(grid_size(latents, PATCH), tiles)
        encoded = []
        for tile, texts in zip(still, own.texts_of(still, self.prompts or []), strict=True):
            groups = [self.images]
            if own.see_picture and pictures is not None:
                groups = [self._with(picture, tile, own.max_side) for picture in pictures]
            if len(groups) > 1:
                texts = [text for text in texts for _ in range(self.repeats)]
                texts = texts if len(texts) == len(groups) else texts[:1] * len(groups)
                pairs = zip(texts, groups, strict=True)
                row = stack_embeds([self._encode([text], group) for text, group in pairs])
            else:
                row = self._encode(texts, groups[0])
            encoded.append(row.with_layer_weights(self.layer_weights))
        return encoded

    def _encode(self, texts: Sequence[str], images: PromptImages) -> PromptEmbeds:
        return self.encode(texts, images=images, **self.options)

    def _with(self, picture: Tensor, tile: Tile, max_side: int) -> PromptImages:
        """The images of a prompt with the tile's part of a picture (3, H, W) behind them."""
        part = PromptImage(tile.cut_pixels(picture).float().cpu()).resized(max_side)
        return replace(self.images, images=[*self.images.prepared(), part], max_side=_UNLIMITED)
