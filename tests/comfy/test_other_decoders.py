"""Other decoders on our latents: the Wan 2x decoder, and ComfyUI's pixel-diffusion decoder."""

import comfy.ops
import comfy.supported_models
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.pixeldit.pid import PidNet
from comfy_extras.nodes_pid import PiDConditioning

import tiny_checkpoints
from parity import assert_close
from samples import random, saved

FILE = "Wan2.1_VAE_upscale2x_tiny.safetensors"
# The sizes of the pixel-diffusion decoder, which its class has as constants.
PIXEL = {
    "hidden_size": 48, "num_groups": 4, "patch_depth": 2, "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "txt_embed_dim": 24,
    "lq_hidden_dim": 8, "lq_interval": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def latent(run):
    """A LATENT as Krea 2 Sampler gives it."""
    model, clip, _ = run("K2Loader", model="krea2-nano (built in)")
    positive = run("K2TextEncode", clip=clip, prompt="a red star", negative="")[0]
    size = run("K2EmptyLatent", aspect="custom", width=64, height=48)[0]
    options = {"preset": "custom", "steps": 2, "guidance": 0.0}
    return run("K2Sampler", model=model, positive=positive, latent=size, **options)[0]


@pytest.fixture(scope="module")
def upscaling(models):
    config = tiny_checkpoints.VAEConfig(base_dim=16, upscale=2)
    saved(models / "vae" / FILE, tiny_checkpoints.vae_tensors(config))
    return FILE


def test_the_2x_decoder_gives_what_core_s_channels_hold(run, upscaling, latent):
    """Core's VAE Decode leaves 12 channels, which other packs shuffle."""
    core = run("VAEDecode", samples=latent, vae=run("VAELoader", vae_name=upscaling)[0])[0]
    assert core.shape == (1, 48, 64, 12)
    expected = F.pixel_shuffle(core.movedim(-1, 1), 2).movedim(1, -1)
    vae = run("K2VAELoader", file=upscaling)[0]
    for node in ("K2VAEDecode", "VAEDecode"):
        found = run(node, samples=latent, vae=vae)[0]
        assert found.shape == (1, 96, 128, 3)
        assert_close(found, expected, 1e-5, f"{node} at twice the size")
    assert run("K2VAEEncode", pixels=found, vae=vae)[0]["samples"].shape == (1, 16, 1, 12, 16)


def test_the_2x_decoder_in_tiles(run, upscaling):
    vae = run("K2VAELoader", file=upscaling)[0]
    latent = {"samples": random(1, 16, 1, 16, 24)}
    whole = run("K2VAEDecode", samples=latent, vae=vae)[0]
    one = run("VAEDecodeTiled", samples=latent, vae=vae, tile_size=512, overlap=64)[0]
    assert_close(one, whole, 1e-5, "one tile")
    tiles = run("VAEDecodeTiled", samples=latent, vae=vae, tile_size=128, overlap=32)[0]
    assert tiles.shape == (1, 256, 384, 3)
    assert_close(tiles, whole, 1e-5, "tiles")


def test_composite_reduces_what_the_2x_decoder_painted(run):
    original, painted = torch.rand(1, 40, 56, 3), torch.rand(1, 96, 128, 3)
    mask = torch.zeros(1, 40, 56)
    mask[:, 10:30, 10:30] = 1
    result = run("K2Composite", original=original, painted=painted, mask=mask, feather=0)[0]
    assert torch.equal(result[mask == 0], original[mask == 0])
    assert (result - original)[mask == 1].abs().mean() > 0.05


def pixel_decoder_tensors():
    """Its file: one gate, and the modulation of pixel blocks in one matrix each."""
    torch.manual_seed(4)
    operations = comfy.ops.disable_weight_init
    network = PidNet(lq_num_res_blocks=4, dtype=torch.float32, operations=operations, **PIXEL)
    tensors = {}
    for name, tensor in network.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        tensors[name] = torch.randn(tensor.shape) * 0.5 * fan_in**-0.5
    for name in [name for name in tensors if "adaLN_modulation_msa" in name]:
        parts = [tensors.pop(name), tensors.pop(name.replace("_msa", "_mlp"))]
        width, trail = PIXEL["pixel_hidden_size"], parts[0].shape[1:]
        both = torch.cat([part.view(-1, 3, width, *trail) for part in parts], dim=1)
        merged = name.replace("adaLN_modulation_msa", "adaLN_modulation.0")
        tensors[merged] = both.reshape(-1, *trail)
    return tensors


@pytest.fixture
def pixel_decoder(models, run, monkeypatch):
    monkeypatch.setattr(comfy.supported_models.PiD, "unet_extra_config", PIXEL)
    saved(models / "diffusion_models" / "pid_tiny.safetensors", pixel_decoder_tensors())
    return run("UNETLoader", unet_name="pid_tiny.safetensors", weight_dtype="default")[0]


def test_the_pixel_diffusion_decoder_takes_our_latent(run, pack, pixel_decoder, latent):
    assert latent["samples"].shape == (1, 16, 1, 6, 8)
    text = [[random(1, 5, PIXEL["txt_embed_dim"]), {}]]
    positive = PiDConditioning.execute(text, latent, "qwenimage", 0.0)[0]
    # It reads the latents in the model's own scale, which is what pipelines give as "latent".
    config = tiny_checkpoints.VAEConfig()
    mean, std = (
        torch.tensor(v).view(1, 16, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    expected = (latent["samples"][:, :, 0] - mean) / std
    assert_close(positive[0][1]["lq_latent"], expected, 1e-5, "its latent")
    empty = {"samples": torch.zeros(1, 3, 192, 256)}
    options = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}

    def decode(positive):
        return run(
            "KSampler", model=pixel_decoder, positive=positive, negative=text, denoise=1.0,
            latent_image=empty, **options,
        )[0]["samples"]  # fmt: skip

    image = decode(positive)
    assert image.shape == (1, 3, 192, 256) and torch.isfinite(image).all()
    other = PiDConditioning.execute(text, {"samples": 0 * latent["samples"]}, "qwenimage", 0.0)[0]
    assert not torch.allclose(decode(other), image, atol=1e-3), "the latent decides the image"
