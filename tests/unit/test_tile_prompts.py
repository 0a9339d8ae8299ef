"""Prompts of single tiles: each tile is painted with the encoding of its own picture or text."""

from contextlib import contextmanager

import pytest
import torch

from krea2_model import (
    Krea2Pipeline,
    NegativeGuidance,
    PromptImage,
    PromptImages,
    Region,
    TilePrompts,
    TileSettings,
    Upscale,
)
from krea2_model.features.prompt_embeds import PromptEmbeds, stack_embeds
from krea2_model.features.tiles import TileTexts, still_tiles, tiles_at
from krea2_model.images.resize import resize
from krea2_model.memory.plan import TRANSFORMER
from krea2_model.text.encoder import Qwen3VLTextEncoder
from nano_training.judge import background_colour, is_colour, read_thing
from parity import assert_close
from samples import picture, random

PROMPT = "a red circle"
SIZE = {"width": 144, "height": 80, "output_type": "latent"}
GRID = 5, 9
SEEN = TilePrompts(max_side=64)


@pytest.fixture(scope="module")
def nano():
    """With a vision tower of random weights: its answers differ, and mean nothing."""
    return Krea2Pipeline.nano()


@contextmanager
def texts_of_calls(pipeline):
    """Texts (B, L, width) of the calls of the transformer."""
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, inputs, options: seen.append((options.get("text"), *inputs)[3]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def of_tile(pipeline, pixels, tile, prompt=PROMPT, images=()):
    part = tile.cut_pixels(pixels)
    group = PromptImages([*images, PromptImage(part).resized(64)])
    return pipeline.encode_prompt(prompt, images=group).fuse(pipeline.transformer).states


def test_moving_tiles_take_the_text_of_the_nearest_still_one():
    settings = TileSettings(128)
    still = still_tiles((20, 40), settings)
    moved = [tile for sigma in (1.0, 0.7, 0.2) for tile, _ in tiles_at((20, 40), settings, sigma)]
    assert len(moved) == 3 * len(still) and set(moved) - set(still)
    centre = [(sum(t.rows), sum(t.columns)) for t in still]
    texts = TileTexts(still, [lambda sigma, n=n: n for n in range(len(still))])
    for tile in moved:
        distances = [(sum(tile.rows) - y) ** 2 + (sum(tile.columns) - x) ** 2 for y, x in centre]
        assert distances[texts.of(tile)(0.5)] == min(distances)
    assert texts.of(None)(0.5) == 0


def test_each_tile_is_painted_with_the_text_of_its_own_picture(nano, monkeypatch):
    pixels = picture(80, 144)
    settings = TileSettings(64, prompts=SEEN)
    tiles = still_tiles(GRID, settings)
    expected = [of_tile(nano, pixels, tile) for tile in tiles]
    encoded, encode = [], Qwen3VLTextEncoder.encode_tokens
    monkeypatch.setattr(
        Qwen3VLTextEncoder,
        "encode_tokens",
        lambda self, rows: encoded.append(len(rows)) or encode(self, rows),
    )
    run = {"start_image": pixels, "denoise": 0.6, "steps": 3, **SIZE}
    with texts_of_calls(nano) as seen:
        found = nano(PROMPT, tiles=settings, **run)
    assert len(encoded) == 1 + len(tiles), "once a tile, beside the prompt of the whole image"
    assert len(seen) == 3 * len(tiles)
    sigmas = nano.schedule(random(1, 16, 10, 18), 3, 0.6)[:3]
    steps = [tile for sigma in sigmas for tile, _ in tiles_at(GRID, settings, sigma)]
    for text, tile in zip(seen, steps, strict=True):
        nearest = min(range(len(tiles)), key=lambda n: tile.distance(tiles[n]))
        assert torch.equal(text, expected[nearest])
    assert len({text.sum().item() for text in seen}) == len(tiles), "all differ"
    assert not torch.equal(found, nano(PROMPT, tiles=TileSettings(64), **run))


@pytest.mark.parametrize("method", ["pixels", "latent"])
def test_the_second_stage_shows_each_image_its_own_parts(nano, method):
    options = {"width": 64, "height": 48, "steps": 1, "seed": [3, 4]}
    upscale = Upscale(2, 0.3, method, "tiles", 1, 64, prompts=SEEN)
    first = nano(PROMPT, num_images=2, output_type="pt", **options)
    larger = resize(first.movedim(1, -1), 128, 96).movedim(-1, 1)
    with texts_of_calls(nano) as seen:
        nano(PROMPT, num_images=2, upscale=upscale, output_type="latent", **options)
    settings = upscale.tiles(128, 96, nano.preset)
    tiles = still_tiles((6, 8), settings)
    assert len(seen) == 1 + len(tiles)
    sigma = upscale.sigmas(128, 96, nano.preset)[0]
    for text, (tile, _) in zip(seen[1:], tiles_at((6, 8), settings, sigma), strict=True):
        nearest = min(tiles, key=tile.distance)
        for row, pixels in zip(text, larger, strict=True):
            assert_close(row[None], of_tile(nano, pixels, nearest), 1e-5, "text of a tile")


def test_own_texts_of_tiles_are_drawn_where_they_are(nano):
    """From noise: two tiles without overlap, and a text for each in place of the prompt."""
    colours = {"red": "a red circle on a white background", "blue": "a blue star on yellow"}
    settings = TileSettings(128, 0.0, moves=False, prompts=TilePrompts(False, [*colours.values()]))
    (image,) = nano("a house", width=256, height=128, tiles=settings, output_type="np", seed=2)
    halves = image[:, :128], image[:, 128:]
    for half, colour in zip(halves, colours, strict=True):
        thing = read_thing(half)
        assert thing is not None and is_colour(thing.rgb, colour)
    assert is_colour(background_colour(halves[0]), "white")
    assert is_colour(background_colour(halves[1]), "yellow")


def test_with_guidance_regions_images_and_nag(nano):
    """The negative stays; a region's text and the prompt's images stand beside the tile's."""
    pixels, other = picture(80, 144), picture(32, 32, 5)
    settings = TileSettings(64, moves=False, prompts=SEEN)
    run = {"start_image": pixels, "denoise": 0.6, "steps": 1, "tiles": settings, **SIZE}
    tiles = still_tiles(GRID, settings)
    own = [of_tile(nano, pixels, tile, images=[PromptImage(other)]) for tile in tiles]
    negative = nano.encode_prompt("blue").fuse(nano.transformer).states
    with texts_of_calls(nano) as seen:
        nano(PROMPT, "blue", guidance=2.0, images=[other], **run)
    assert all(torch.equal(text, states) for text, states in zip(seen[::2], own, strict=True))
    assert all(torch.equal(text, negative) for text in seen[1::2])
    own = [of_tile(nano, pixels, tile) for tile in tiles]
    with texts_of_calls(nano) as seen:
        nano(PROMPT, regions=[Region("a blue star", (0, 0, 0.4, 1))], **run)
        nano(PROMPT, "blue", negative_guidance=NegativeGuidance(), **run)
    for text, states in zip(seen, own * 2, strict=True):
        assert torch.equal(text[:, -states.shape[1] :], states)
    assert seen[0].shape[1] > own[0].shape[1], "the region's text in front"


def test_one_tile_that_covers_the_image_sees_all_of_it(nano):
    pixels = picture(64, 64)
    settings = TileSettings(128, prompts=TilePrompts(max_side=64))
    run = {"start_image": pixels, "denoise": 0.5, "steps": 1, "output_type": "latent"}
    found = nano(PROMPT, tiles=settings, **run)
    expected = nano(PROMPT, images=PromptImages([pixels], max_side=64), **run)
    assert torch.equal(found, expected)


def test_rows_of_other_lengths_and_weights_become_a_batch():
    short = PromptEmbeds(random(1, 3, 2, 4))
    long = PromptEmbeds(random(2, 5, 2, 4), weights=torch.full((2, 5), 0.5))
    both = stack_embeds([short, long])
    assert both.taps.shape == (3, 5, 2, 4) and both.mask.sum(dim=1).tolist() == [3, 5, 5]
    assert torch.equal(both.taps[0, :3], short.taps[0]) and torch.equal(both.taps[1:], long.taps)
    assert both.weights[0].tolist() == [1] * 5 and both.weights[1:].eq(0.5).all()
    assert stack_embeds([short, short]).mask is None


def test_the_forecast_counts_pictures_and_texts_of_tiles(nano):
    plain, seen = (
        nano.forecast(256, 256, text_tokens=40, tiles=TileSettings(128, prompts=prompts))
        for prompts in (None, TilePrompts())
    )
    assert (seen.text, seen.tiles) == (40 + 16, plain.tiles)
    assert seen.operations > plain.operations
    texts = seen.tiles * 56 * nano.transformer.config.hidden_size * 4
    assert seen.activations[TRANSFORMER] >= plain.activations[TRANSFORMER] + texts
    assert nano.forecast(text_tokens=40, upscale=Upscale(2, prompts=SEEN)).second.text == 40 + 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tiles": TileSettings(64, prompts=SEEN)}, "Give start_image"),
        (
            {"tiles": TileSettings(64, prompts=TilePrompts(False, ["a"]))},
            "There is 1 text for 6 tiles",
        ),
        ({"upscale": Upscale(2, tile=64, prompts=TilePrompts(True, ["a", "b"]))}, "2 texts for"),
        ({"images": [picture(32, 32)] * 8, "upscale": Upscale(2, tile=64, prompts=SEEN)}, "most 7"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_painted(nano, options, words):
    def stop(*_):
        raise AssertionError("a step was made")

    run = SIZE | {"steps": 1, "callback": stop}
    with pytest.raises(ValueError, match=words):
        nano(PROMPT, **run, **options)
    if "upscale" in options and options["upscale"].prompts.texts is None:
        return
    taps = {"prompt_embeds": random(1, 4, 12, 160)}
    settings = TileSettings(64, prompts=SEEN)
    with pytest.raises(ValueError, match="only prompt_embeds"):
        nano(**taps, **run, start_image=picture(80, 144), denoise=0.5, tiles=settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"see_picture": False}, "are that of the whole image"),
        ({"texts": "a house"}, "expected a list of texts"),
        ({"texts": [1]}, "expected a list of texts"),
        ({"texts": 5}, "expected a list of texts"),
        ({"see_picture": "no"}, "see_picture of tiles is 'no'"),
        ({"max_side": 8}, "max_side of tiles' pictures is 8"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TilePrompts(**options)


@pytest.mark.parametrize(
    "make", [lambda x: Upscale(2, prompts=x), lambda x: TileSettings(prompts=x)]
)
def test_prompts_of_another_kind_are_refused(make):
    with pytest.raises(ValueError, match="prompts of tiles is 'a house'; expected TilePrompts"):
        make("a house")
