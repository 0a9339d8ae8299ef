"""Image to image: how much of the image is left, exact starts, and sizes that follow the image."""

import numpy as np
import pytest
import torch

from in_process import NODES
from nano_training.judge import background_colour, judge
from nano_training.scenes import draw, held_out_prompts
from parity import assert_close


@pytest.fixture(scope="module")
def raw_parts(run):
    return run("K2Loader", model="krea2-nano Raw (built in)")


def test_less_and_less_of_the_layout_is_kept(run, raw_parts):
    """Four pictures, each repainted to the prompt of another, at denoise 0.3, 0.6 and 0.9.

    Measured on six in ten steps: 0.99, 0.57 and 0.28 of the pixels stay, colours change by 0.01,
    0.22 and 0.60, and things overlap what was there by 0.91, 0.15 and 0.04.
    """
    model, clip, vae = raw_parts
    exam = [entry for entry in held_out_prompts() if len(entry[1].things) == 1][:4]
    prompts, scenes = zip(*exam, strict=True)
    images = np.stack([draw(scene) for scene in scenes[2:] + scenes[:2]])
    latent = run("K2VAEEncode", pixels=torch.from_numpy(images), vae=vae)[0]
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(list(prompts)))
    negative = run("K2TextEncode", clip=clip, prompt="", negative="")[1]
    kept, distance, things = [], [], []
    for denoise in (0.3, 0.6, 0.9):
        samples = run(
            "K2Sampler", model=model, positive=positive, negative=negative, latent=latent, seed=1,
            preset="custom", steps=6, guidance=3.5, denoise=denoise,
        )[0]  # fmt: skip
        pictures = run("K2VAEDecode", samples=samples, vae=vae)[0].numpy()
        change = np.abs(pictures - images).max(axis=3)
        kept.append((change < 0.2).mean())
        distance.append(change.mean())
        overlap = [
            (a & b).sum() / (a | b).sum()
            for a, b in zip(map(thing, images), map(thing, pictures), strict=True)
        ]
        things.append(np.mean(overlap))
    assert kept[0] > 0.95 and kept[0] > kept[1] + 0.1 > kept[2] + 0.3
    assert distance[0] < 0.03 and distance[0] < 0.7 * distance[1] < 0.5 * distance[2]
    assert things[0] > 0.85 and things[0] - 0.3 > things[1] > things[2]
    verdicts = [judge(*pair) for pair in zip(pictures, scenes, strict=True)]
    assert np.mean([verdict["background"] for verdict in verdicts]) >= 0.8, "and 0.9 obeys"


def thing(picture):
    return np.abs(picture - background_colour(picture)).max(axis=2) > 0.3


@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.123])
@pytest.mark.parametrize("preset", ["turbo", "raw"])
def test_a_run_starts_at_the_sigma_that_is_asked_for(run, pack, turbo, latent, sigma, preset):
    inputs = {"model": turbo, "latent": latent, "preset": preset}
    sigmas = run("K2Sigmas", start_sigma=sigma, denoise=0.2, **inputs)[0]
    assert sigmas[0] == torch.tensor(sigma) and sigmas[-1] == 0
    assert len(sigmas) == len(run("K2Sigmas", **inputs)[0]), "no step is left out"
    time = pack("krea2_model.schedule").unshift_time(
        sigma, 1.15 if preset == "turbo" else pack("krea2_model.schedule").shift_mu(96)
    )
    by_denoise = run("K2Sigmas", denoise=time, **inputs)[0]
    assert torch.allclose(sigmas, by_denoise, atol=1e-6)


def test_the_sampler_starts_there_too_and_says_so(run, turbo, conditioning):
    image = {"samples": torch.randn(2, 16, 1, 6, 10)}
    inputs = {"model": turbo, "positive": conditioning(4, 1), "latent": image, "seed": 1}
    (text,) = (
        NODES["K2Sampler"].execute(**inputs, start_sigma=0.4, denoise=0.7).ui.as_dict()["text"]
    )
    lines = text.split("\n")
    assert "starts at sigma 0.400" in lines and "not used: denoise 0.7" in lines
    assert max(map(len, lines)) <= 40
    exact = run("K2Sampler", **inputs, start_sigma=0.6545666)[0]["samples"]
    shown = run("K2Sampler", **inputs, denoise=0.375)[0]["samples"]
    assert_close(exact, shown, 1e-4, "start_sigma against the denoise that has this sigma")


@pytest.mark.parametrize("node", ["K2Sampler", "K2Sigmas"])
def test_a_sigma_that_cannot_be_is_refused(node):
    assert NODES[node].validate_inputs(start_sigma=0.5) is True
    assert NODES[node].validate_inputs(start_sigma=0.0) is True
    assert "sigma is 1.5; expected a number from 0" in NODES[node].validate_inputs(start_sigma=1.5)


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_a_fitted_image_goes_through_the_sampler_at_its_size(
    run, models, turbo, conditioning, mode
):
    """With alpha, in a batch, at a size that nothing divides."""
    vae = run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]
    images = torch.rand(2, 75, 101, 4)
    fitted, mask, width, height = run(
        "K2FitImage", image=images, megapixels=0.01, aspect="3:2", mode=mode
    )
    assert fitted.shape == (2, height, width, 3) == (2, 80, 128, 3)
    assert mask.any() == (mode == "pad")
    latent = run("K2VAEEncode", pixels=fitted, vae=vae)[0]
    samples = run(
        "K2Sampler", model=turbo, positive=conditioning(4, 1), latent=latent, denoise=0.5
    )[0]
    assert run("K2VAEDecode", samples=samples, vae=vae)[0].shape == fitted.shape


def test_fit_keeps_an_image_that_fits_and_takes_its_mask_along(run):
    image, mask = torch.rand(1, 64, 96, 3), torch.zeros(1, 32, 48)
    mask[:, :16] = 1
    fitted, half, width, height = run("K2FitImage", image=image, mask=mask, megapixels=0.0)
    assert torch.equal(fitted, image) and (width, height) == (96, 64)
    assert half[:, :30].eq(1).all() and half[:, 34:].eq(0).all()
    larger, half, *_ = run("K2FitImage", image=image, mask=mask, megapixels=0.02)
    assert larger.shape[1:3] == half.shape[1:]
    # What Load Image gives for an image without a mask.
    _, none, *_ = run("K2FitImage", image=image, mask=torch.zeros(1, 64, 64), megapixels=0.0)
    assert none.shape == (1, 64, 96) and not none.any()
    with pytest.raises(ValueError, match="mask is 64"):
        run("K2FitImage", image=image, mask=torch.ones(1, 64, 64))


def test_an_image_of_one_pixel(run):
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
    fitted, *_ = run("K2FitImage", image=red, megapixels=0.05)
    assert (fitted - red).abs().max() < 1e-6 and fitted.shape == (1, 224, 224, 3)
