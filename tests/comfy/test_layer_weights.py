"""Krea 2 Layer Mix: the numbers of krea2_model in ComfyUI's layout of conditioning."""

import pytest
import torch


def test_nothing_changes_until_a_layer_is_weighed(run, conditioning):
    given = conditioning(6, 1, krea2_token_weights=torch.ones(1, 6))
    ((states, extra),) = run("K2TapWeights", conditioning=given)[0]
    assert torch.equal(states, given[0][0]) and extra == given[0][1]


def test_layers_are_weighed_in_their_order(run, pack, conditioning):
    """The layer is the outer half of the features, the first one layer 2; every part is mixed."""
    given = conditioning(6, 1, batch=2) + conditioning(4, 2)
    mixed = run("K2TapWeights", conditioning=given, layer_2=0.0, layer_35=3.0)[0]
    weights = [0.0] + [1.0] * 10 + [3.0]
    weigh = pack("krea2_model.text.layer_weights").weigh_taps
    for (before, _), (after, _) in zip(given, mixed, strict=True):
        assert after.shape == before.shape and after[..., :160].eq(0).all()
        expected = weigh(before.unflatten(-1, (12, 160)), weights).flatten(2)
        torch.testing.assert_close(after, expected)
        assert (after[..., -160:].abs() > before[..., -160:].abs()).all()


def test_a_sampler_takes_the_mix(run, turbo, conditioning, latent):
    given = conditioning(6, 1)
    options = {"model": turbo, "latent": latent, "preset": "custom", "steps": 1, "guidance": 0.0}
    plain = run("K2Sampler", positive=given, **options)[0]["samples"]
    mixed = run("K2TapWeights", conditioning=given, layer_14=4.0)[0]
    assert not torch.allclose(run("K2Sampler", positive=mixed, **options)[0]["samples"], plain)


def test_another_model_s_conditioning_is_named(run):
    with pytest.raises(ValueError, match="4097 features"):
        run("K2TapWeights", conditioning=[[torch.zeros(1, 3, 4097), {}]])
    with pytest.raises(ValueError, match="not all of them 0"):
        layers = {f"layer_{layer}": 0.0 for layer in range(2, 36, 3)}
        run("K2TapWeights", conditioning=[[torch.ones(1, 3, 1920), {}]], **layers)
