"""Prompts of single tiles as inputs of a node."""

from comfy_api.latest import io

from ..krea2_model.features.tiles import TilePrompts
from .managed.encode import own_tokenizer
from .managed.tile_prompts import prompts_of

WHOLE_PROMPT, SEEN_PROMPT = "whole", "with the tile's picture"
TILE_PROMPTS = (WHOLE_PROMPT, SEEN_PROMPT)


def clip_input():
    return io.Clip.Input(
        "clip", optional=True, tooltip="The text encoder, for prompts of single tiles."
    )


def tile_prompt_inputs():
    """tile_prompt and prompt."""
    return [
        io.Combo.Input(
            "tile_prompt",
            options=list(TILE_PROMPTS),
            default=WHOLE_PROMPT,
            optional=True,
            advanced=True,
            tooltip=(
                "In tiles: positive for the whole, or the prompt below with each tile's part of "
                "the picture in front of it."
            ),
        ),
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            default="",
            optional=True,
            advanced=True,
            tooltip=(
                "With the tile's picture: the text behind it. Or a text for each tile, with lines "
                "of --- between them, from the top left row by row."
            ),
        ),
    ]


def chosen_prompts(clip, tile_prompt: str, prompt: str) -> TilePrompts | None:
    """`TilePrompts` of the inputs, None for the prompt of the whole image.

    Raises ValueError for another choice, for one text that no tile's picture goes with, and where
    clip is missing or not ours.
    """
    if tile_prompt not in TILE_PROMPTS:
        raise ValueError(
            f"tile_prompt is {tile_prompt!r}; expected one of {', '.join(TILE_PROMPTS)}."
        )
    prompts = prompts_of(prompt, tile_prompt == SEEN_PROMPT)
    if prompts is None:
        if prompt.strip():
            raise ValueError(
                "prompt is one text for all tiles, which is what positive says. Connect it to "
                f"positive, choose {SEEN_PROMPT!r}, or give a text a tile with lines of --- "
                "between them."
            )
        return None
    if clip is None:
        raise ValueError("Prompts of tiles need the text encoder: connect clip.")
    own_tokenizer(clip)
    return prompts
