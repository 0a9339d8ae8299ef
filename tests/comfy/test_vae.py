"""VAE beside core's on the same checkpoint."""

import json
import shutil

import comfy.latent_formats
import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file

from live_bytes import LiveBytes
from parity import assert_close


@pytest.fixture
def vae(models, run):
    return run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]


@pytest.fixture
def core_vae(models, run):
    return run("VAELoader", vae_name="qwen_image_vae_tiny.safetensors")[0]


@pytest.mark.parametrize("height, width", [(8, 8), (6, 11)])
def test_decode_equals_core(run, vae, core_vae, height, width):
    latent = {"samples": torch.randn(2, 16, 1, height, width)}
    ours = run("VAEDecode", samples=latent, vae=vae)[0]
    core = run("VAEDecode", samples=latent, vae=core_vae)[0]
    assert ours.shape == (2, 8 * height, 8 * width, 3)
    assert_close(ours, core, 1e-5, f"VAEDecode {height}x{width} against core")
    assert torch.equal(run("K2VAEDecode", samples=latent, vae=vae)[0], ours)


def test_encode_equals_core(run, vae, core_vae):
    image = torch.rand(1, 64, 48, 3)
    ours = run("VAEEncode", pixels=image, vae=vae)[0]["samples"]
    core = run("VAEEncode", pixels=image, vae=core_vae)[0]["samples"]
    assert ours.shape == (1, 16, 1, 8, 6)
    assert_close(ours, core, 1e-5, "VAEEncode against core")
    assert torch.equal(run("K2VAEEncode", pixels=image, vae=vae)[0]["samples"], ours)


def test_four_images_give_four_latents(run, vae):
    """Core takes a batch for a film and gives one latent."""
    images = torch.rand(4, 32, 32, 3)
    latents = run("VAEEncode", pixels=images, vae=vae)[0]["samples"]
    assert latents.shape == (4, 16, 1, 4, 4)
    alone = run("VAEEncode", pixels=images[2:3], vae=vae)[0]["samples"]
    assert torch.equal(latents[2:3], alone)


def test_our_decode_node_takes_core_vae(run, core_vae):
    images = run("K2VAEDecode", samples={"samples": torch.randn(2, 16, 1, 4, 4)}, vae=core_vae)[0]
    assert images.shape == (2, 32, 32, 3)


def test_odd_images_are_cropped_and_alpha_is_dropped(run, vae):
    image = torch.rand(1, 35, 50, 4)
    latents = run("K2VAEEncode", pixels=image, vae=vae)[0]["samples"]
    expected = run("K2VAEEncode", pixels=image[:, 1:33, 1:49, :3], vae=vae)[0]["samples"]
    assert torch.equal(latents, expected)


def test_stock_tiled_nodes(run, vae):
    latent = {"samples": torch.randn(1, 16, 1, 16, 24)}
    whole = run("VAEDecode", samples=latent, vae=vae)[0]
    one_tile = run("VAEDecodeTiled", samples=latent, vae=vae, tile_size=512, overlap=64)[0]
    assert_close(one_tile, whole, 1e-5, "one tile against the whole")
    tiles = run("VAEDecodeTiled", samples=latent, vae=vae, tile_size=64, overlap=16)[0]
    assert_close(tiles, whole, 1e-5, "tiles against the whole")
    encoded = run("VAEEncodeTiled", pixels=whole, vae=vae, tile_size=64, overlap=16)[0]["samples"]
    assert encoded.shape == latent["samples"].shape


def test_saved_vae_loads_in_core_and_here(run, base, models, vae):
    """In the layout of VAE files, with time axes, which core's loader needs."""
    latent = torch.randn(1, 16, 1, 8, 8)
    expected, image = vae.decode(latent), torch.rand(1, 32, 32, 3)
    run("VAESave", vae=vae, filename_prefix="saved_vae/vae")
    (saved,) = (base / "output" / "saved_vae").glob("*.safetensors")
    original = load_file(models / "vae" / "qwen_image_vae_tiny.safetensors")
    assert {k: v.shape for k, v in load_file(saved).items()} == {
        k: v.shape for k, v in original.items()
    }
    saved.rename(models / "vae" / "resaved.safetensors")
    for node, name in (("VAELoader", "vae_name"), ("K2VAELoader", "file")):
        again = run(node, **{name: "resaved.safetensors"})[0]
        decoded = run("K2VAEDecode", samples={"samples": latent}, vae=again)[0]
        assert_close(decoded, expected, 1e-5, f"saved VAE through {node}")
        assert_close(again.encode(image), vae.encode(image), 1e-5, f"encoding through {node}")


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_running_out_of_memory_falls_back_to_tiles(vae, monkeypatch, direction, caplog):
    """Tiles of 1024, then 512: the largest that fits is taken, and the result is the tiled one."""
    model, tried = vae.first_stage_model, []
    # A tile sees a margin on each side.
    part, name, most = (
        (model.decoder, "enlarge", 512 + 2 * 13 * 8)
        if direction == "decode"
        else (model.encoder, "reduce", 512 + 2 * 9 * 8)
    )
    converted = getattr(part, name)

    def limited(source):
        pixels = source.shape[-1] * (8 if direction == "decode" else 1)
        tried.append(pixels)
        if pixels > most:
            raise torch.OutOfMemoryError("no memory")
        return converted(source)

    latents = torch.randn(1, 16, 1, 4, 160)
    whole, image = vae.decode(latents), torch.rand(1, 32, 1280, 3)
    encoded = vae.encode(image)
    monkeypatch.setattr(part, name, limited)
    if direction == "decode":
        assert_close(vae.decode(latents), whole, 1e-4, "in tiles")
        assert tried[:2] == [1280, 1128] and max(tried[2:]) == most
    else:
        assert_close(vae.encode(image), encoded, 1e-4, "in tiles")
        assert tried[:2] == [1280, 1096] and max(tried[2:]) == most
    assert "smaller tiles" in caplog.text


def test_other_errors_are_not_taken_for_lack_of_memory(vae, monkeypatch):
    def broken(source):
        raise RuntimeError("something else")

    monkeypatch.setattr(vae.first_stage_model, "decode_unnormalised", broken)
    with pytest.raises(RuntimeError, match="something else"):
        vae.decode(torch.randn(1, 16, 1, 4, 4))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 3, 8, 8), (16, 8, 8)])
def test_wrong_latents_are_refused(run, vae, shape):
    with pytest.raises(ValueError, match="The latent has shape .*Use Krea 2 Size"):
        run("K2VAEDecode", samples={"samples": torch.randn(shape)}, vae=vae)


def test_image_too_small_is_refused(run, vae):
    with pytest.raises(ValueError, match="at least 8"):
        run("K2VAEEncode", pixels=torch.rand(1, 4, 64, 3), vae=vae)


def test_offload_and_reload(vae):
    latent = torch.randn(1, 16, 1, 4, 4)
    expected = vae.decode(latent)
    comfy.model_management.unload_all_models()
    assert torch.equal(vae.decode(latent), expected)


def test_bfloat16(run, models, vae):
    half = run("K2VAELoader", file="qwen_image_vae_tiny.safetensors", dtype="bf16")[0]
    latent = torch.randn(1, 16, 1, 8, 8)
    assert half.vae_dtype == torch.bfloat16
    assert 0 < (half.decode(latent) - vae.decode(latent)).abs().mean() < 0.02


@pytest.fixture
def other_statistics(models):
    """A diffusers folder whose VAE has statistics of its own, and that VAE in diffusers."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(3)
    mean, std = torch.randn(16).tolist(), (1 + torch.rand(16) * 2).tolist()
    vae = AutoencoderKLQwenImage(base_dim=16, latents_mean=mean, latents_std=std).eval()
    folder = models / "diffusers" / "Other-Krea-2"
    vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "Krea2Pipeline"}')
    yield folder, vae
    shutil.rmtree(folder)


@pytest.mark.parametrize("tiled", [False, True])
def test_statistics_of_a_folder_s_own(run, other_statistics, tiled):
    """What the sampler makes, normalised, is decoded as diffusers' pipeline decodes it."""
    _, reference = other_statistics
    ours = run("K2VAELoader", file="Other-Krea-2", dtype="fp32")[0]
    normalised = torch.randn(1, 16, 1, 8, 8)
    config = reference.config
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    expected = reference.decode(normalised * std + mean).sample[:, :, 0].clamp(-1, 1)
    # As ComfyUI hands a sampler's result on: by the statistics of its latent format.
    latents = comfy.latent_formats.Wan21().process_out(normalised)
    # A tile that covers all is the whole, through the code of tiles.
    found = ours.decode_tiled(latents, 8, 8, 0) if tiled else ours.decode(latents)
    assert_close(found.movedim(-1, 1) * 2 - 1, expected, 1e-5, "decoded by diffusers")

    image = torch.rand(1, 64, 64, 3)
    moments = reference.encode((image * 2 - 1).movedim(-1, 1).unsqueeze(2)).latent_dist.mode()
    encoded = ours.encode_tiled(image, 64, 64, 0) if tiled else ours.encode(image)
    back = comfy.latent_formats.Wan21().process_in(encoded)
    assert_close(back, (moments - mean) / std, 1e-5, "encoded by diffusers")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"z_dim": 8}, r"vae/config.json has z_dim 8, and the weights beside it have 16"),
        ({"latents_mean": [0.0] * 15}, r"config.json has 15 values of latents_mean; expected 16"),
        ({"latents_std": [0.0] * 16}, r"vae/config.json has latents_std .*numbers above 0"),
        ({"latents_std": "wide"}, r"vae/config.json has latents_std 'wide'"),
    ],
)  # fmt: skip
def test_statistics_that_cannot_be(run, other_statistics, change, message):
    folder, _ = other_statistics
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        run("K2VAELoader", file="Other-Krea-2")


@pytest.mark.parametrize("side", [64, 96])
def test_the_estimates_count_what_an_image_takes(pack, vae, side):
    """Beside a constant for what kernels take as workspace, which small images do not fill."""
    workspace = 2 * pack("krea2_model.vae.model").MAX_SCORE_BYTES
    model = vae.first_stage_model
    latents, image = torch.randn(1, 16, side // 8, side // 8), torch.randn(1, 3, side, side)
    for what, convert, source in (
        ("decode", model.decode_unnormalised, latents), ("encode", model.encode_unnormalised, image)
    ):  # fmt: skip
        estimate = getattr(vae, f"memory_used_{what}")(source.shape, torch.float32) - workspace
        with LiveBytes() as live:
            convert(source)
        assert live.peak <= estimate < 4 * live.peak, what


def test_the_estimates_on_a_gpu_count_the_released_vae(pack, vae, monkeypatch):
    """On meta, with norms as a GPU has them: one kernel without a float32 copy."""
    module = pack("krea2_model.vae.model")
    monkeypatch.setattr(module.F, "rms_norm", lambda hidden, *rest: torch.empty_like(hidden))
    model = module.QwenImageVAE(module.VAEConfig(), device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(vae, "first_stage_model", model)
    monkeypatch.setattr(vae, "device", torch.device("cuda"))
    for side in (1024, 2048):
        for what, convert, shape in (
            ("decode", model.decode_unnormalised, (1, 16, side // 8, side // 8)),
            ("encode", model.encode_unnormalised, (1, 3, side, side)),
        ):
            with LiveBytes("meta") as live:
                convert(torch.empty(shape, device="meta", dtype=torch.bfloat16))
            estimate = getattr(vae, f"memory_used_{what}")(shape, torch.bfloat16)
            workspace = 2 * module.MAX_SCORE_BYTES
            assert 1.2 * live.peak <= estimate - workspace < 1.6 * live.peak, (what, side)
