"""Rotary positions of large images: the formulas, and where nothing changes."""

import math

import pytest
import torch

from krea2_model.transformer.rotary_scaling import RotaryScaling

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
