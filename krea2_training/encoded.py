"""Pictures and texts that a run will encode, read before it does, and the bytes of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from krea2_model import TransformerConfig
from krea2_model.checkpoints.loading import PartState
from krea2_model.features.edits import EditRecipe
from krea2_model.text.tokenizer import SUFFIX_TOKENS

from .config import (
    DistilConfig,
    PreferConfig,
    PretrainConfig,
    RewardConfig,
    RunConfig,
    SliderConfig,
    TrainConfig,
)
from .data.cache import recipe_of
from .data.examples import Sized, read_examples, sized
from .data.pairs import read_pairs
from .data.prompts import Row, read_prompts
from .data.regional import read_batches
from .data.shapes import check_shapes
from .data.texts import Named, captions_of, prompts_of, worded_prompts
from .validation import hold_out

# Sides of a cell of latents and of a token of an image that the text encoder reads, in pixels.
_CELL, _TOKEN = 8, 32
# References of their own size have at most so many pixels.
_MOST_PIXELS = 2**20


@dataclass(frozen=True)
class Encoded:
    """pictures: at their sizes. texts: their captions, or prompts."""

    pictures: list[Sized]
    texts: list[Named]


def read_encoded(config: RunConfig, state: PartState) -> Encoded:
    """The pictures and texts of a run of any command. state: of its model, from the header.

    Raises ValueError for data that cannot be used.
    """
    if isinstance(config, TrainConfig):
        examples, held_out = hold_out(read_examples(config.data), config)
        pictures = [*sized([*examples, *held_out], config.data), *prior_pictures(config)]
    elif isinstance(config, PretrainConfig):
        data = replace(config.data, resolution=config.stages.resolution)
        pictures = sized(read_examples(data), data)
    elif isinstance(config, PreferConfig):
        pairs = read_pairs(config.pairs)
        pictures = [one for pair in pairs for one in (pair.chosen, pair.rejected)]
    else:
        return Encoded([], _prompts(config, state))
    return Encoded(pictures, captions_of(dict.fromkeys(one.example for one in pictures)))


def _prompts(config: RunConfig, state: PartState) -> list[Named]:
    assert isinstance(config, (DistilConfig, RewardConfig, SliderConfig))
    path = config.prompts.path
    assert path is not None
    if isinstance(config, DistilConfig):
        batches = read_batches(config.prompts, state)
        return [*prompts_of(batches.rows, path), *batches.named]
    if isinstance(config, RewardConfig):
        return prompts_of(reward_rows(config), path)
    return worded_prompts(read_prompts(path), path, config.slider)


def reward_rows(config: RewardConfig) -> list[Row]:
    """The rows of a run with rewards. Raises ValueError for those that cannot be painted."""
    path = config.prompts.path
    assert path is not None
    rows = read_prompts(path)
    check_shapes(rows, path)
    if config.reward.groups > len(rows):
        raise ValueError(
            f"reward.groups is {config.reward.groups}; expected at most {len(rows)}, the prompts "
            f"of {path}."
        )
    return rows


def prior_pictures(config: TrainConfig) -> list[Sized]:
    """Pictures that keep what the model knows; none are none."""
    settings = config.prior
    if settings.path is None:
        return []
    data = replace(config.data, path=settings.path, caption=settings.caption, trigger="")
    return sized(read_examples(data, "prior.caption for all", "prior.path"), data)


def encoded_bytes(
    encoded: Encoded, config: RunConfig, sizes: TransformerConfig, itemsize: int
) -> int:
    """The most that what a run encodes takes in memory. itemsize: of the encoder's numbers.

    A token of a text has at least a byte, and most have several.
    """
    recipe = recipe_of(config.references)
    pictures = dict.fromkeys(encoded.pictures)
    latents = sum(_latents(one) for one in pictures)
    captions: dict[tuple, int] = {}
    for one in pictures:
        references = one.example.references
        for text in ("", *one.example.captions):
            seen = references if recipe.encoder_side is not None else ()
            captions[text, seen] = _tokens(text) + len(seen) * _image_tokens(recipe)
    own = {text for _, text in encoded.texts} if not pictures else set()
    prompts = {*own, *config.samples.prompts}
    prompts |= {""} if prompts else set()
    tokens = 2 * sum(captions.values()) + itemsize * sum(map(_tokens, prompts))
    return latents + tokens * sizes.num_text_layers * sizes.text_hidden_dim


def _latents(one: Sized) -> int:
    """Bytes of a picture's latents, of its mask, and of its references."""
    pixels, count = one.width * one.height, len(one.example.references)
    channels = 16 + (one.example.mask is not None)
    return 4 * (channels * pixels + 16 * count * max(pixels, _MOST_PIXELS)) // _CELL**2


def _tokens(text: str) -> int:
    return len(text.encode()) + SUFFIX_TOKENS


def _image_tokens(recipe: EditRecipe) -> int:
    return ((recipe.encoder_side or 0) // _TOKEN) ** 2
