"""Tiles of large images: they cover it, keep their overlap while they move, and weigh 1 in all."""

import pytest
import torch

from krea2_model import Control, Krea2Pipeline, NegativeGuidance, References, Region
from krea2_model.features.tiles import Tile, TileSettings, fuse, tiles_at
from samples import picture, random

SIGMAS = [1.0, 0.93, 0.8, 0.61, 0.35, 0.12]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("grid", [(20, 33), (8, 21), (64, 64), (5, 7)])
def test_weights_sum_to_one_and_tiles_are_alike(grid, overlap):
    settings = TileSettings(128, overlap)
    for sigma in SIGMAS:
        total, sizes = torch.zeros(grid), set()
        for tile, weights in tiles_at(grid, settings, sigma):
            assert weights.shape == tile.grid and (weights > 0).all()
            total[slice(*tile.rows), slice(*tile.columns)] += weights
            sizes.add(tile.grid)
        torch.testing.assert_close(total, torch.ones(grid))
        assert sizes == {(min(8, grid[0]), min(8, grid[1]))}


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.4])
def test_neighbours_share_the_overlap_wherever_they_move(overlap):
    seen = set()
    for sigma in SIGMAS:
        tiles = [tile for tile, _ in tiles_at((8, 50), TileSettings(128, overlap), sigma)]
        columns = [tile.columns for tile in tiles]
        assert columns[0][0] == 0 and columns[-1][1] == 50
        for left, right in zip(columns, columns[1:], strict=False):
            assert left[1] - right[0] >= round(8 * overlap) and right[0] > left[0]
        seen.add(tuple(columns))
    assert len(seen) > 1
    still = {
        tuple(t for t, _ in tiles_at((8, 50), TileSettings(128, overlap, False), sigma))
        for sigma in SIGMAS
    }
    assert len(still) == 1


def test_one_tile_covers_an_image_of_its_size():
    (whole, _), *others = tiles_at((64, 64), TileSettings(), 0.5)
    assert not others and whole.grid == (64, 64)
    assert len(tiles_at((64, 64), TileSettings(512, 0.0, False), 0.5)) == 4


@pytest.mark.parametrize("sides", [(48, 66), (47, 65)])
def test_fused_tiles_of_a_local_function_are_the_whole(sides):
    """Odd sides too: the last tile has the padded row and column."""
    latents = random(1, 16, *sides)
    grid = tuple(-(-side // 2) for side in sides)
    tiles = tiles_at(grid, TileSettings(128), 0.7)
    found = fuse(latents, tiles, lambda tile, part: torch.sin(part))
    torch.testing.assert_close(found, torch.sin(latents))


def test_values_of_tokens_are_cut_as_latents_are():
    tile, values = Tile((1, 3), (2, 5)), torch.arange(24.0).reshape(2, 12) % 12
    cells = values.reshape(2, 3, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    tile = Tile((1, 3), (2, 4))
    tokens = tile.cut_tokens(values, (3, 4)).reshape(2, 2, 2)
    assert torch.equal(tokens, tile.cut(cells)[..., ::2, ::2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size is 0; expected a multiple of 16"),
        ({"size": 1000}, "size is 1000"),
        ({"size": 48}, "from 64"),
        ({"overlap": 0.6}, "overlap of tiles is 0.6; expected a share of the tile from 0 to 0.5"),
        ({"overlap": -0.1}, "overlap of tiles is -0.1"),
        ({"overlap": float("nan")}, "overlap of tiles is nan"),
        ({"batch": -1}, "batch of tiles is -1; expected 1 to 64"),
        ({"batch": True}, "batch of tiles is True"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TileSettings(**options)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_groups_of_tiles_are_fused_as_single_ones(batch):
    """Odd sides: the last tile lacks a row, and is of another size than the others."""
    latents, sizes = random(2, 16, 47, 47), []

    def velocity_of(group, parts):
        sizes.append(len(group))
        return torch.sin(parts)

    tiles = tiles_at((24, 24), TileSettings(128), 0.7)
    torch.testing.assert_close(fuse(latents, tiles, velocity_of, batch), torch.sin(latents))
    assert sum(sizes) == len(tiles) and max(sizes) == batch


def test_a_part_of_another_size_is_cut_in_whole_tokens():
    tile = Tile((4, 12), (0, 8))
    assert torch.equal(tile.cut_other(same := random(1, 16, 32, 32), (16, 16)), tile.cut(same))
    small = random(1, 16, 16, 10)  # 8 x 5 tokens
    assert torch.equal(tile.cut_other(small, (16, 16)), small[..., 4:12, 0:4])
    tiny = random(1, 16, 2, 2)
    assert tile.cut_other(tiny, (16, 16)).shape == (1, 16, 2, 2)


@pytest.fixture(scope="module")
def turbo():
    return Krea2Pipeline.nano()


@pytest.fixture
def calls(turbo):
    """Numbers of sequences of the calls of the network, and tokens of its input."""
    seen = []
    hook = turbo.transformer.first.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    yield seen
    hook.remove()


SIZE = {"width": 128, "height": 96, "steps": 2, "output_type": "latent"}
PAIR = ["a red circle", "a large blue star at the top"]  # of different lengths: with a mask

LINES, OTHER = (
    Control("krea2_nano_control_lora.safetensors", picture(96, 128, seed), strength)
    for seed, strength in ((1, 1.0), (2, -0.4))
)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "a red circle"},
        {"prompt": PAIR, "guidance": 2.0, "seed": [1, 2]},
        {"prompt": "a red circle", "references": [picture(64, 48)]},
        {"prompt": "a red circle", "negative_guidance": NegativeGuidance()},
        {"prompt": "a (red:1.4) circle", "prompt_weights": True},
        {"prompt": PAIR, "guidance": 2.0, "seed": [1, 2], "control": [LINES, OTHER]},
        {"prompt": "a red circle", "references": [picture(64, 48)], "control": LINES},
    ],
)
def test_a_batch_of_tiles_is_the_picture_of_single_ones(turbo, calls, options):
    single = turbo(**options, **SIZE, tiles=TileSettings(64))
    one_by_one = len(calls)
    calls.clear()
    together = turbo(**options, **SIZE, tiles=TileSettings(64, batch=3))
    assert (together - single).abs().max() < 1e-5 * single.abs().max()
    assert len(calls) == one_by_one / 3
    calls.clear()
    turbo(**options, **SIZE, tiles=TileSettings(64, batch=0))
    assert len(calls) < one_by_one / 3, "as many as fit"


def test_tiles_that_differ_are_called_one_by_one(turbo, calls):
    left = Region("a blue star", (0, 0, 0.5, 1))
    mask = torch.ones(96, 128)
    mask[:, :40] = 0
    lines = Control("krea2_nano_control_lora.safetensors", picture(96, 128), mask=mask)
    run = {**SIZE, "steps": 1, "prompt": "a red circle"}
    for options in ({"regions": [left]}, {"control": lines}):
        calls.clear()
        turbo(**run, **options, tiles=TileSettings(64, batch=4))
        assert [batch for batch, _ in calls] == [1] * 6


def test_tiles_see_their_own_part_of_references(turbo, calls):
    """A change of the reference's right third leaves the leftmost tiles of the first step alone."""
    reference = picture(96, 128)
    other = reference.clone()
    other[..., 88:] = 1 - other[..., 88:]
    run = {**SIZE, "steps": 1, "prompt": "a red circle"}
    settings = TileSettings(64, 0.25, moves=False, cut_references=True)
    whole, own = (
        [turbo(**run, references=[each], tiles=tiles) for each in (reference, other)]
        for tiles in (TileSettings(64, 0.25, moves=False), settings)
    )
    assert (whole[0] - whole[1])[..., :4].abs().max() > 1e-3
    # The VAE's attention carries a little of the change to the left.
    assert (own[0] - own[1])[..., :4].abs().mean() < (own[0] - own[1])[..., 12:].abs().mean() / 5
    assert {tokens for _, tokens in calls[-12:]} == {16 + 16}
    with pytest.raises(ValueError, match="Cached references are the same for all tiles"):
        turbo(**run, references=References([reference], cache=True), tiles=settings)
