"""Rotary positions of large images: the formulas, and where nothing changes."""

import math

import pytest
import torch

from diffusers_reference import TINY, random_transformer
from krea2_model.transformer.model import grid_positions
from krea2_model.transformer.rotary_scaling import RotaryScaling, Stretch
from samples import random

THETA, DIM = 1000.0, 56


def plain():
    return THETA ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_no_stretch_changes_nothing(method):
    scaling = RotaryScaling(1024, method)
    torch.testing.assert_close(scaling.frequencies(DIM, THETA, 1.0), plain())
    assert scaling.stretch(64, 1.0) == scaling.stretch(40, 1.0) == 1


def test_ntk_stretches_the_lowest_frequency_in_full():
    found = RotaryScaling(1024, "ntk").frequencies(DIM, THETA, 3.0)
    torch.testing.assert_close(found[-1], plain()[-1] / 3)
    assert found[0] == 1
    assert (found[1:] < plain()[1:]).all()


def test_yarn_leaves_short_waves_and_stretches_long_ones():
    base, stretch = plain(), 3.0
    found = RotaryScaling(1024, "yarn").frequencies(DIM, THETA, stretch)
    for frequency, own in zip(found.tolist(), base.tolist(), strict=True):
        turns = 64 * own / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1) / 31))
        assert frequency == pytest.approx(own * kept + own / stretch * (1 - kept))
    assert found[-1] == pytest.approx(base[-1].item() / 3)


def test_a_dynamic_stretch_follows_the_step():
    scaling = RotaryScaling(1024, strength=2.0)
    stretches = [scaling.stretch(128, sigma) for sigma in (1.0, 0.5, 0.1, 0.0)]
    assert stretches[0] == 4 and stretches[1] == pytest.approx(2**0.5) and stretches[-1] == 1
    assert stretches == sorted(stretches, reverse=True)
    still = RotaryScaling(1024, dynamic=False, strength=1.0)
    assert still.stretch(128, 0.1) == still.stretch(128, 0.9) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 1024, "method": "pi"}, "method is 'pi'; expected one of ntk, yarn"),
        ({"size": 1024, "strength": 0}, "strength is 0; expected above 0"),
        ({"size": 1024, "strength": float("nan")}, "strength is nan"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RotaryScaling(**options)


@pytest.fixture(scope="module")
def model():
    return random_transformer(TINY)


def velocity(model, latents, **options):
    text = random(1, 4, TINY.hidden_size, seed=2)
    with torch.no_grad():
        return model(latents, torch.tensor([0.7]), text, **options)


def test_a_stretch_of_ones_and_a_small_image_are_as_before(model):
    latents, scaling = random(1, 16, 8, 12), RotaryScaling(64, dynamic=False)
    plain = velocity(model, latents)
    assert scaling.at((4, 4), 0.7) is None
    assert torch.equal(velocity(model, latents, stretch=Stretch(scaling, 1.0, 1.0)), plain)
    stretched = velocity(model, latents, stretch=scaling.at((4, 6), 0.7))
    assert not torch.allclose(stretched, plain, rtol=1e-3)
    # The table of one stretch is not taken for another's.
    assert torch.equal(velocity(model, latents), plain)


def test_the_table_has_the_frequencies_of_each_axis(model):
    """Along columns alone: rotations of rows stay, those of columns turn more slowly."""
    scaling = RotaryScaling(64, "ntk", dynamic=False, strength=1.0)
    stretch = scaling.at((4, 8), 0.7)
    assert (stretch.rows, stretch.columns) == (1.0, 2.0)
    dims, theta = TINY.axes_dims_rope, TINY.rope_theta
    index, rows, columns = stretch.frequencies(dims, theta)
    assert index is None
    torch.testing.assert_close(rows, theta ** -(torch.arange(0, dims[1], 2).double() / dims[1]))
    torch.testing.assert_close(columns, scaling.frequencies(dims[2], theta, 2.0))


def test_a_tile_lies_at_its_place(model):
    """A tile of an image that sees nothing but itself: where its tokens are counts.

    Attention among a tile's own tokens depends on their distance alone, so a model without text
    would not notice; with text, at position 0, it does, as in the whole image.
    """
    tile = random(1, 16, 4, 6)
    at_zero, moved = velocity(model, tile), velocity(model, tile, origin=(2, 3))
    assert not torch.allclose(at_zero, moved, rtol=1e-3)
    whole = grid_positions([(0, 4, 6)]).reshape(4, 6, 3)[2:, 3:].reshape(-1, 3)
    assert torch.equal(grid_positions([(0, 2, 3, 2, 3)]), whole)
