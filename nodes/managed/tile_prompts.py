"""Prompts of single tiles in a CONDITIONING: encoded texts, which the model picks by the tile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.utils
import torch

from ...krea2_model.text.prompt_images import PromptImage
from ...krea2_model.tiles import Tile, TilePrompts, TileSettings, TileTexts, still_tiles
from ...krea2_model.transformer.text_attention import TextStates
from .conditions import TOKEN_WEIGHTS, weights_of
from .encode import encode_prompts, encode_with_images

# Key of `TileConditions` in a CONDITIONING.
TILE_TEXTS = "krea2_tile_texts"


@dataclass(frozen=True)
class TileConditions:
    """Encoder states (1 or B, L, T * D) of each tile that lies still, with their options."""

    tiles: Sequence[Tile]
    texts: Sequence[tuple[torch.Tensor, dict]]

    def run_texts(self, fuse) -> TileTexts:
        """The texts of a run. fuse: of encoder states, or what leaves them as they are."""

        def at_all_steps(text: TextStates) -> Callable[[float], TextStates]:
            return lambda sigma: text

        states = [fuse(TextStates(text, None, weights_of(own, text))) for text, own in self.texts]
        return TileTexts(self.tiles, [at_all_steps(state) for state in states])


def encode_tiles(
    clip, tiles: TileSettings, pictures: torch.Tensor, texts: Sequence[str], **options
) -> TileConditions:
    """Encode the prompt of each tile.

    pictures: (B, H, W, 3) of the images, whose parts are seen where `tiles.prompts` asks for it.
    texts: one for all tiles. options: of `encode_with_images`.
    Raises ValueError for another CLIP, and for another number of texts than tiles.
    """
    own = tiles.prompts
    assert own is not None
    grid = pictures.shape[1] // 16, pictures.shape[2] // 16
    still, encoded = still_tiles(grid, tiles), []
    for tile, prompts in zip(still, own.texts_of(still, texts), strict=True):
        if not own.see_picture:
            (found,) = encode_prompts(clip, prompts, **options)
            encoded.append((found[0], found[1]))
            continue
        rows = []
        for picture in pictures:
            part = PromptImage(tile.cut_pixels(picture.movedim(-1, 0)).float().cpu())
            images = [part.resized(own.max_side)]
            rows += encode_with_images(clip, prompts[0], images, labels=True, **options)
        extra = dict(rows[0][1])
        if TOKEN_WEIGHTS in extra:
            extra[TOKEN_WEIGHTS] = torch.cat([row[TOKEN_WEIGHTS] for _, row in rows])
        encoded.append((torch.cat([states for states, _ in rows]), extra))
    return TileConditions(still, encoded)


def add_tile_texts(conditioning, tiles: TileConditions):
    """A CONDITIONING with texts of tiles."""
    return [[states, extra | {TILE_TEXTS: tiles}] for states, extra in conditioning]


def texts_of_prompt(prompt: str) -> list[str]:
    """The texts of a widget: one, or several with lines of `---` between them."""
    texts = [""]
    for line in prompt.splitlines():
        if line.strip() == "---":
            texts.append("")
        else:
            texts[-1] += f"{line}\n"
    return [text.strip() for text in texts]


def prompts_of(prompt: str, see_picture: bool) -> TilePrompts | None:
    """`TilePrompts` of a node's widgets, None for the prompt of the whole image."""
    texts = texts_of_prompt(prompt)
    several = texts if len(texts) > 1 else None
    return TilePrompts(see_picture, several) if see_picture or several else None


def rows_for(state: TextStates, latents: torch.Tensor) -> TextStates:
    """A text with a row for each of latents (B, C, h, w)."""

    def rows(part):
        return None if part is None else comfy.utils.repeat_to_batch_size(part, len(latents))

    return TextStates(rows(state.states), rows(state.mask), rows(state.weights))
