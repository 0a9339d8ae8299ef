"""The Wan 2x decoder: a VAE whose last convolution gives 2 x 2 pixels as 12 channels."""

import diffusers
import pytest
import torch
import torch.nn.functional as F

from krea2_model import Inpaint, Krea2Pipeline, QwenImageVAE, VAEConfig, load_vae
from krea2_model.checkpoints.vae_keys import restore_temporal
from krea2_model.tools.describe import describe
from parity import assert_close
from samples import picture, random, saved

CONFIG = VAEConfig(base_dim=16, upscale=2)


@pytest.fixture(scope="module")
def reference():
    """diffusers' class for it, which leaves the pixels as channels."""
    torch.manual_seed(1)
    model = diffusers.AutoencoderKLWan(base_dim=16, out_channels=12)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(4)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("upscaling")
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(folder)


@pytest.fixture(scope="module")
def original_names(vae, tmp_path_factory):
    """The file as it is published: original names, time axes, an encoder."""
    tensors = restore_temporal(vae.state_dict(), vae.config)
    assert tensors["decoder.head.2.weight"].shape == (12, 16, 3, 3, 3)
    path = tmp_path_factory.mktemp("original") / "Wan2.1_VAE_upscale2x.safetensors"
    return saved(path, tensors)


def test_it_decodes_as_diffusers_does(reference, vae):
    latents = random(2, 16, 6, 9)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1) for v in (CONFIG.latents_mean, CONFIG.latents_std)
    )
    decoded = reference.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    expected = F.pixel_shuffle(decoded, 2)
    found = vae.decode(latents)
    assert vae.config.upscale == 2 and found.shape == (2, 3, 96, 144)
    assert_close(found, expected, 3e-5, "decoding at twice the size")


def test_it_encodes_as_before(reference, vae):
    images = picture(64, 48)[None] * 2 - 1
    assert vae.encode(images).shape == (1, 16, 8, 6)
    expected = reference.encode(images[:, :, None]).latent_dist.mean[:, :, 0]
    assert_close(vae.encode_unnormalised(images), expected, 1e-5, "encoding")


def test_a_file_in_original_names_is_the_same_and_is_described(vae, original_names):
    latents = random(1, 16, 4, 4)
    assert torch.equal(load_vae(original_names).decode(latents), vae.decode(latents))
    assert "decodes to 2 times the width and height" in describe(original_names)


def test_tiles_are_of_twice_the_size_too(vae):
    latents, calls = random(1, 16, 16, 24), []
    tiled = vae.decode_tiled(latents, 64, lambda done, total: calls.append(total))
    assert tiled.shape == (1, 3, 256, 384) and set(calls) == {6}
    assert_close(tiled, vae.decode(latents), 1e-5, "tiles")


def test_pipelines_give_twice_the_size_and_inpaint_keeps_the_picture_s():
    nano = Krea2Pipeline.nano()
    torch.manual_seed(0)
    vae = QwenImageVAE(CONFIG).eval()
    pipeline = Krea2Pipeline(nano.transformer, nano.text_encoder, vae)
    options = {"steps": 1, "output_type": "pt"}
    assert pipeline("a star", width=64, height=48, **options).shape == (1, 3, 96, 128)
    mask, image = torch.zeros(40, 56), picture(40, 56)
    mask[10:30, 10:30] = 1
    painted = pipeline("a star", start_image=image, inpaint=Inpaint(mask, grow=0), **options)[0]
    assert painted.shape == image.shape
    assert torch.equal(painted[:, :, 45:], image[:, :, 45:]) and not torch.equal(painted, image)
    detail = pipeline.detail(image, "a star", mask, **options)[0]
    assert detail.shape == image.shape and not torch.equal(detail, image)
