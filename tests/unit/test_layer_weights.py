"""The mix of taps: what it keeps and what it changes."""

import pytest
import torch

from krea2_model.text.layer_weights import weigh_taps

WEIGHTS = [1.0, 0.0, 2.0, 0.5] + [1.0] * 8


@pytest.fixture
def taps():
    states = torch.randn(2, 5, 12, 16, generator=torch.Generator().manual_seed(0))
    # Later layers are larger, some tokens much larger, and one is padding.
    states *= torch.linspace(1, 30, 12)[:, None]
    states[0, 0] *= 100
    states[1, 4] = 0
    return states


def rms(states):
    return states.square().mean(dim=(2, 3)).sqrt()


def test_each_token_keeps_its_size(taps):
    mixed = weigh_taps(taps, WEIGHTS)
    torch.testing.assert_close(rms(mixed), rms(taps))
    assert mixed[1, 4].eq(0).all()


def test_only_the_mix_changes(taps):
    """Every layer keeps its direction, and the layers' sizes have the ratios asked for."""
    mixed = weigh_taps(taps, WEIGHTS)
    for item, token in ((0, 0), (0, 3), (1, 1)):
        factors = mixed[item, token] / taps[item, token]
        torch.testing.assert_close(factors, factors[:, :1].expand(-1, 16))
        torch.testing.assert_close(factors[:, 0] / factors[0, 0], torch.tensor(WEIGHTS))


@pytest.mark.parametrize("weight", [1.0, 0.3, 5.0])
def test_equal_weights_change_nothing(taps, weight):
    assert weigh_taps(taps, [weight] * 12) is taps


def test_half_precision_keeps_its_dtype(taps):
    mixed = weigh_taps(taps.bfloat16(), WEIGHTS)
    assert mixed.dtype == torch.bfloat16 and mixed.isfinite().all()
    torch.testing.assert_close(mixed.float(), weigh_taps(taps, WEIGHTS), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("weights", [[0.0] * 12, [1.0] * 11, [float("nan")] + [1.0] * 11])
def test_bad_weights_are_named(taps, weights):
    with pytest.raises(ValueError, match="weights of the taps .* expected 12 numbers, not all"):
        weigh_taps(taps, weights)
