"""Tiles of large images: they cover it, keep their overlap while they move, and weigh 1 in all."""

import pytest
import torch

from krea2_model.tiles import Tile, TileSettings, fuse, tiles_at
from samples import random

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
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TileSettings(**options)
