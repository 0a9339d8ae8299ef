"""Krea 2 Vary and Krea 2 Walk: neighbours in any batch and sampler, and frames of a walk."""

from types import SimpleNamespace

import pytest
import torch

from in_process import NODES
from parity import assert_close, relative_error

SMALL = {"aspect": "custom", "width": 64, "height": 64}
SHORT = {"preset": "custom", "steps": 3, "guidance": 0.0}


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model="krea2-nano (built in)")


@pytest.fixture(scope="module")
def texts(run, nano):
    prompts = ("a red circle on a white background", "a blue star")
    return [run("K2TextEncode", clip=nano[1], prompt=text, negative="")[0] for text in prompts]


@pytest.fixture
def sampled(run, nano, texts):
    def call(batch=1, positive=texts[0], latent=None, **options):
        latent = latent or run("K2EmptyLatent", **SMALL, batch=batch)[0]
        options = SHORT | options
        return run(
            "K2Sampler", model=nano[0], positive=positive, latent=latent, **options
        )[0]["samples"]  # fmt: skip

    return call


def vary(run, seed, variation_seed, strength, **options):
    return run("K2Vary", seed=seed, variation_seed=variation_seed, strength=strength, **options)[0]


def test_the_ends_are_the_plain_pictures_to_the_bit(run, sampled):
    assert torch.equal(sampled(noise=vary(run, 3, 8, 0.0), seed=99), sampled(seed=3))
    assert torch.equal(sampled(noise=vary(run, 3, 8, 1.0)), sampled(seed=8))
    # What such a sampler draws is the picture's own too.
    own = {"sampler": "euler_ancestral"}
    assert torch.equal(sampled(noise=vary(run, 3, 8, 0.0), seed=99, **own), sampled(seed=3, **own))


# euler_ancestral draws noise during the run, whose seed is that of the picture.
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_neighbour_is_the_same_alone(run, sampled, sampler):
    options = {"sampler": sampler, "seeds": "one an image"}
    batch = sampled(3, noise=vary(run, 3, 20, 0.4), **options)
    assert relative_error(batch[0], batch[1]) > 0.004
    alone = sampled(noise=vary(run, 3, 22, 0.4), **options)
    assert relative_error(batch[2], alone[0]) < 1e-3
    assert torch.equal(alone, sampled(noise=vary(run, 3, 20, 0.4, index=2), **options))
    numbered = {**run("K2EmptyLatent", **SMALL)[0], "batch_index": [2]}
    assert torch.equal(alone, sampled(latent=numbered, noise=vary(run, 3, 20, 0.4), **options))


def test_neighbours_of_a_neighbour(run, sampled):
    neighbour = vary(run, 3, 20, 0.4, index=1)
    same = vary(run, 0, 50, 0.0, noise=neighbour)
    assert torch.equal(sampled(noise=same), sampled(noise=neighbour)) and same.seed == 3
    batch = sampled(2, noise=vary(run, 0, 50, 0.3, noise=neighbour))
    assert not torch.equal(batch[0], batch[1])


def test_core_s_sampler_takes_the_noise_and_ours_takes_core_s(run, nano, texts, sampled):
    latent = run("K2EmptyLatent", **SMALL)[0]
    noise = vary(run, 3, 8, 0.5)
    options = {
        "noise": noise,
        "guider": run("BasicGuider", model=nano[0], conditioning=texts[0])[0],
    }
    options["sampler"] = run("KSamplerSelect", sampler_name="euler")[0]
    options["sigmas"] = run("K2Sigmas", model=nano[0], latent=latent, preset="custom", steps=3)[0]
    theirs = run("SamplerCustomAdvanced", latent_image=latent, **options)[0]["samples"]
    assert_close(sampled(noise=noise), theirs, 1e-4, "SamplerCustomAdvanced with our noise")
    theirs = run("RandomNoise", noise_seed=5)[0]
    assert torch.equal(sampled(noise=theirs), sampled(seed=5))
    # Another pack's may have no seed; the sampler's own is then that of what it draws.
    bare = SimpleNamespace(generate_noise=theirs.generate_noise)
    assert torch.equal(sampled(noise=bare), sampled(seed=5))


def test_a_walk_goes_from_one_plain_picture_to_the_other(run, texts, sampled):
    positive, noise = run("K2Walk", start=texts[0], end=texts[1], frames=5, seed=3, end_seed=8)
    assert (len(positive), len(noise)) == (5, 5)
    frames = [sampled(positive=p, noise=n) for p, n in zip(positive, noise, strict=True)]
    assert torch.equal(frames[0], sampled(seed=3))
    assert torch.equal(frames[-1], sampled(seed=8, positive=texts[1]))
    away = [(frame - frames[0]).abs().mean() for frame in frames]
    assert all(one < other for one, other in zip(away, away[1:], strict=False)), away
    steps = [(a - b).abs().mean() for a, b in zip(frames, frames[1:], strict=False)]
    assert max(steps) < away[-1]


def test_a_walk_of_one_kind(run, texts, sampled):
    positive, noise = run("K2Walk", start=texts[0], frames=2, seed=3, end_seed=8)
    assert positive == [texts[0]] * 2
    assert torch.equal(sampled(noise=noise[1]), sampled(seed=8))
    positive, noise = run("K2Walk", start=texts[0], end=texts[1], frames=6, seed=3)
    assert torch.equal(sampled(noise=noise[1]), sampled(seed=3))
    start, end = sampled(seed=3), sampled(seed=3, positive=texts[1])
    for frame, nearer, farther in ((1, start, end), (4, end, start)):
        found = sampled(seed=3, positive=positive[frame])
        assert (found - nearer).abs().mean() < (found - farther).abs().mean()
    # Several walks side by side: image i from seed + i.
    batch = sampled(2, noise=noise[1])
    assert relative_error(batch[1], sampled(seed=4)[0]) < 1e-3


def test_weights_of_conditionings_are_kept(run, texts):
    heavy = [[texts[0][0][0], {**texts[0][0][1], "strength": 0.5}]]
    positive = run("K2Walk", start=heavy, end=texts[1], frames=3)[0]
    assert [extra["strength"] for _, extra in positive[1]] == [0.25, 0.5]
    assert texts[1][0][1].get("strength", 1.0) == 1.0, "the input is as it was"


def test_bad_values_are_refused(run, texts, sampled):
    with pytest.raises(ValueError, match="nothing to walk to"):
        run("K2Walk", start=texts[0])
    with pytest.raises(ValueError, match="strength is 1.5; expected a number from 0"):
        vary(run, 1, 2, 1.5)
    assert "frames is 1" in NODES["K2Walk"].validate_inputs(frames=1)

    class Other:
        seed = 0

        def __init__(self, noise):
            self.generate_noise = lambda latent: noise

    for noise, words in (
        (torch.zeros(1, 16, 8, 8), r"noise has shape \(1, 16, 8, 8\)"),
        (torch.zeros(1, 16, 1, 8, 8).numpy(), "noise has shape"),
        (torch.full((1, 16, 1, 8, 8), torch.nan), "noise is NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=words):
            sampled(noise=Other(noise))
    with pytest.raises(ValueError, match="zero everywhere"):
        sampled(noise=vary(run, 1, 2, 0.5, noise=run("DisableNoise")[0]))
