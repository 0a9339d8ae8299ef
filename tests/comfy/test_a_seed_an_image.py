"""With "one an image", image i of a batch is the one that seed + i makes alone: every sampler."""

import comfy.samplers
import pytest
import torch

from parity import relative_error

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
# In float32 a batch and an image alone differ by the order of sums; samplers that go one by one
# are the same to the bit. dpmpp_sde and its like divide by small numbers.
LIMIT = 1e-3


@pytest.fixture(scope="module")
def small(models, run):
    return run("K2ModelLoader", file="krea2_tiny_raw.safetensors")[0]


@pytest.fixture
def sampled(run, small, conditioning):
    """A run; a batch has a prompt an image."""

    def call(sampler, seed, rows, latent=None, model=small, **options):
        positive, negative = conditioning(6, 1, batch=3), conditioning(4, 2)
        positive = [[positive[0][0][rows], {}]]
        image = torch.randn(3, 16, 1, 8, 8, generator=torch.Generator().manual_seed(4))[rows]
        latent = {"samples": image} | {
            name: value[rows] if isinstance(value, torch.Tensor) else value
            for name, value in (latent or {}).items()
        }
        options = {"preset": "custom", "steps": 3, "guidance": 1.0} | options
        return run("K2Sampler", model=model, positive=positive, negative=negative, latent=latent,
                   sampler=sampler, seed=seed, **options)[0]["samples"]  # fmt: skip

    return call


ALL, TWO = slice(0, 3), slice(0, 2)


def alone(index):
    return slice(index, index + 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_image_is_that_of_its_seed(sampled, sampler):
    batch = sampled(sampler, 7, TWO, seeds="one an image")
    assert len(batch) == 2 and torch.isfinite(batch).all()
    assert relative_error(batch[1], sampled(sampler, 8, alone(1))[0]) < LIMIT


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_masks_and_part_of_the_time(sampled, sampler):
    """The noise of masked parts, which ddim draws anew, is the image's own as well."""
    generator = torch.Generator().manual_seed(8)
    latent = {"noise_mask": torch.rand(3, 1, 8, 8, generator=generator).round()}
    options = {"latent": latent, "denoise": 0.7, "steps": 2}
    batch = sampled(sampler, 7, TWO, seeds="one an image", **options)
    single = sampled(sampler, 8, alone(1), **options)
    assert relative_error(batch[1], single[0]) < LIMIT


@pytest.mark.parametrize("sampler", ["euler", "er_sde", "dpmpp_sde", "ddim"])
def test_numbers_of_a_longer_batch(sampled, sampler):
    batch = sampled(sampler, 7, ALL, latent={"batch_index": [4, 0, 2]}, seeds="one an image")
    for index, number in enumerate([4, 0, 2]):
        single = sampled(sampler, 7 + number, alone(index))
        assert relative_error(batch[index], single[0]) < LIMIT


def test_steps_are_skipped_in_each_image_alike(run, small, sampled):
    """What remembers a run knows where the next image begins."""
    model = run("K2Approximate", model=small, evaluate="every 2nd step")[0]
    options = {"model": model, "steps": 10, "guidance": 0.0}
    batch = sampled("er_sde", 7, ALL, seeds="one an image", **options)
    single = sampled("er_sde", 9, alone(2), **options)
    assert relative_error(batch[2], single[0]) < LIMIT


def test_each_image_has_its_reference_and_its_negative(run, small, conditioning, latent):
    """Rows of references, of words' weights and of a negative inside attention."""
    generator = torch.Generator().manual_seed(2)
    references = torch.randn(2, 16, 1, 4, 4, generator=generator)
    weights = torch.rand(2, 6, generator=generator)
    texts = conditioning(6, 1, batch=2)[0][0], conditioning(5, 2, batch=2)[0][0]

    def sample(rows, seed, **options):
        positive = [[texts[0][rows], {
            "reference_latents": [references[rows]], "reference_latents_method": "index",
            "krea2_token_weights": weights[rows],
        }]]  # fmt: skip
        model = run("K2NegativeGuidance", model=small, negative=[[texts[1][rows], {}]])[0]
        latent = {"samples": torch.zeros(2, 16, 1, 8, 8)[rows]}
        return run("K2Sampler", model=model, positive=positive, latent=latent, seed=seed, steps=3,
                   preset="custom", guidance=0.0, sampler="euler_ancestral", **options)[0][
            "samples"
        ]  # fmt: skip

    batch = sample(slice(0, 2), 7, seeds="one an image")
    assert relative_error(batch[1], sample(slice(1, 2), 8)[0]) < LIMIT
    assert relative_error(batch[0], sample(slice(0, 1), 7)[0]) < LIMIT


def test_progress_counts_the_steps_of_all_images(sampled, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute",
        lambda bar, value, total=None, preview=None: seen.append((value, total)),
    )  # fmt: skip
    sampled("lcm", 7, ALL, seeds="one an image")
    assert seen == [(step, 9) for step in range(1, 10)]


def test_samplers_that_need_not_go_alone_go_together(sampled, small, calls_of):
    sizes = calls_of(small.model.diffusion_model.blocks[0])
    sampled("euler", 7, ALL, seeds="one an image", guidance=0.0)
    assert sizes == [3] * 3
    sizes.clear()
    sampled("er_sde", 7, ALL, seeds="one an image", guidance=0.0)
    assert sizes == [1] * 9
