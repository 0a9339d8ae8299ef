"""Prompts of single tiles in a CONDITIONING: encoded texts, which the model picks by the tile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.patcher_extension
import comfy.utils
import torch

from ...krea2_model.features.tiles import Tile, TilePrompts, TileSettings, TileTexts, still_tiles
from ...krea2_model.images.resize import resize
from ...krea2_model.images.sizes import MULTIPLE
from ...krea2_model.text.prompt_images import PromptImage
from ...krea2_model.transformer.patches import PATCH, grid_size
from ...krea2_model.transformer.text_attention import TextStates
from .conditions import TOKEN_WEIGHTS, weights_of
from .encode import encode_prompts, encode_with_images

# Key of `TileConditions` in a CONDITIONING, and of `ModelTilePrompts` in a MODEL.
TILE_TEXTS = "krea2_tile_texts"
_AROUND_RUN = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE


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
    clip,
    tiles: TileSettings,
    grid: tuple[int, int],
    pictures: torch.Tensor | None,
    texts: Sequence[str],
    **options,
) -> TileConditions:
    """Encode the prompt of each tile.

    grid: rows and columns of the image's tokens. pictures: (B, H, W, 3) of the images at that size,
    whose parts are seen where `tiles.prompts` asks for it. texts: one for all tiles. options: of
    `encode_with_images`.
    Raises ValueError for another CLIP, and for another number of texts than tiles.
    """
    own = tiles.prompts
    assert own is not None
    still, encoded = still_tiles(grid, tiles), []
    for tile, prompts in zip(still, own.texts_of(still, texts), strict=True):
        if not own.see_picture or pictures is None:
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


class ModelTilePrompts:
    """Prompts of tiles of a MODEL, for a run of any sampler and size.

    A wrapper of ComfyUI's guiders around a run, before they load the model: the texts are encoded
    for the tiles of the run's size, once, and kept for further runs of that size.
    """

    def __init__(
        self, clip, tiles: TileSettings, pictures: torch.Tensor | None, texts: Sequence[str]
    ):
        """pictures: (B, H, W, 3) of any size, of the images in turn. texts: one for all tiles."""
        self._clip, self._tiles, self._pictures, self._texts = clip, tiles, pictures, texts
        self._run: tuple[tuple[int, int], int] | None = None
        self._encoded: TileConditions | None = None

    def __call__(self, executor, noise, *inputs, **options):
        texts = self._of_run(noise)
        for entry in executor.class_obj.conds.get("positive", ()):
            entry[TILE_TEXTS] = texts
        return executor(noise, *inputs, **options)

    def of_image(self, index: int) -> "ModelTilePrompts":
        """The prompts of one image of a batch, with its picture."""
        pictures = self._pictures
        if pictures is None or len(pictures) < 2:
            return self
        index %= len(pictures)
        return ModelTilePrompts(self._clip, self._tiles, pictures[index : index + 1], self._texts)

    def _of_run(self, noise: torch.Tensor) -> TileConditions:
        pictures = None if self._pictures is None else self._pictures[: len(noise)]
        grid = grid_size(noise, PATCH)
        run = grid, 0 if pictures is None else len(pictures)
        if self._encoded is None or self._run != run:
            if pictures is not None:
                pictures = resize(pictures, MULTIPLE * grid[1], MULTIPLE * grid[0])
            inputs = self._clip, self._tiles, grid, pictures, self._texts
            self._encoded, self._run = encode_tiles(*inputs, weighted=True), run
        return self._encoded


def with_tile_prompts(model, prompts: ModelTilePrompts | None):
    """A clone of a MODEL with these prompts of tiles in place of its own, None for none."""
    clone = model.clone()
    clone.remove_wrappers_with_key(_AROUND_RUN, TILE_TEXTS)
    if prompts is not None:
        clone.add_wrapper_with_key(_AROUND_RUN, TILE_TEXTS, prompts)
    return clone


def tile_prompts_of(model) -> ModelTilePrompts | None:
    """The prompts of tiles of a MODEL."""
    return next(iter(model.get_wrappers(_AROUND_RUN, TILE_TEXTS)), None)


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
