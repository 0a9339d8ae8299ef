"""Large images: tiles and scaled positions on a MODEL, and the second stage, on krea2-nano."""

import pytest
import torch

from parity import assert_close
from samples import image


@pytest.fixture(scope="module")
def nano(run):
    """MODEL, CLIP and VAE, and an encoded prompt with its negative."""
    parts = run("K2Loader", model="krea2-nano (built in)")
    texts = run("K2TextEncode", clip=parts[1], prompt="a red circle", negative="")[:2]
    return parts, dict(zip(("positive", "negative"), texts, strict=True))


SAMPLER = {"preset": "custom", "steps": 2, "guidance": 0.0, "seed": 3}


def upscaled(run, nano, **options):
    (model, _, vae), texts = nano
    inputs = {"model": model, "vae": vae, "seed": 3, "scale": 2.0} | options
    return run("K2Upscale", positive=texts["positive"], **inputs)[0]["samples"]


def test_one_tile_that_covers_the_image_changes_nothing(run, nano):
    (model, *_), texts = nano
    latent = {"samples": torch.zeros(1, 16, 1, 16, 16)}
    tiled = run("K2TiledSampling", model=model)[0]
    plain, found = (
        run("K2Sampler", model=m, **texts, latent=latent, **SAMPLER)[0]["samples"]
        for m in (model, tiled)
    )
    assert torch.equal(plain, found)


def test_tiles_work_with_core_s_sampler_and_guidance(run, nano, pack):
    """KSampler too sees tiles: each call of the network has a tile's size."""
    (model, *_), texts = nano
    tiled, seen = run("K2TiledSampling", model=model, tile=64)[0], []
    hook = tiled.model.diffusion_model.first.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    try:
        shifted = run("K2ModelSampling", model=tiled, width=112, height=64)[0]
        options = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler"}
        latent = {"samples": torch.zeros(1, 16, 1, 8, 14)}
        found = run("KSampler", model=shifted, **texts, latent_image=latent, scheduler="simple",
                    denoise=1.0, **options)[0]["samples"]  # fmt: skip
    finally:
        hook.remove()
    assert found.shape == latent["samples"].shape and torch.isfinite(found).all()
    assert set(seen) == {16}


@pytest.mark.parametrize(("tiled", "sigma"), [(True, 0.3), (True, 1.0), (False, 0.3)])
def test_only_tiles_of_a_picture_have_a_size_of_training(run, nano, caplog, tiled, sigma):
    """From pure noise each tile would paint the whole prompt, and the sampler says so."""
    (model, *_), texts = nano
    if tiled:
        model = run("K2TiledSampling", model=model)[0]
    latent = {"samples": torch.zeros(1, 16, 1, 20, 20)}
    options = SAMPLER | {"steps": 1, "start_sigma": sigma}
    run("K2Sampler", model=model, **texts, latent=latent, **options)
    assert ("160 x 160 px is far from" in caplog.text) == (not tiled or sigma == 1)


def test_memory_is_that_of_a_tile(run, nano):
    model = nano[0][0]
    tiled = run("K2TiledSampling", model=model)[0]
    needed = []
    for patcher, sides in ((tiled, (512, 64)), (model, (16, 16))):
        patcher.model.current_patcher = patcher
        needed.append(patcher.model.memory_required([1, 16, 1, *sides]))
    assert needed[0] == needed[1]


@pytest.mark.parametrize("method", ["pixels", "latent"])
def test_upscale_takes_an_image_or_its_latent(run, nano, method):
    vae, picture = nano[0][2], image(64, 48, 2)
    (latent,) = run("K2VAEEncode", pixels=picture, vae=vae)[:1]
    (decoded,) = run("K2VAEDecode", samples=latent, vae=vae)[:1]
    of_latent = upscaled(run, nano, latent=latent, method=method)
    assert of_latent.shape == (1, 16, 1, 16, 12)
    given = picture if method == "latent" else decoded
    of_image = upscaled(run, nano, image=given, method=method)
    assert_close(of_latent, of_image, 1e-5, "upscaled")


def test_python_upscales_to_the_same_picture(run, nano, pack):
    """From noise in two stages, and of a picture."""
    (model, _, vae), texts = nano
    latent = run("K2EmptyLatent", aspect="custom", width=64, height=64)[0]
    first = run("K2Sampler", model=model, **texts, latent=latent, preset="auto", seed=3)[0]
    pipeline = pack("krea2_model").Krea2Pipeline.nano()
    settings = pack("krea2_model").Upscale(2.5, parts="tiles", tile=64)
    for start, options in (
        ({"latent": first}, {"height": 64, "width": 64}),
        ({"image": image(64, 64, 3)}, {"start_image": image(64, 64, 3)[0].movedim(-1, 0),
                                       "denoise": 0}),
    ):  # fmt: skip
        found = upscaled(run, nano, scale=2.5, parts="tiles", tile=64, **start)
        (picture,) = run("K2VAEDecode", samples={"samples": found}, vae=vae)[:1]
        expected = pipeline(
            "a red circle", seed=3, upscale=settings, output_type="np", prompt_weights=True,
            **options,
        )  # fmt: skip
        assert expected.shape == (1, 160, 160, 3)
        assert_close(picture, torch.from_numpy(expected), 1e-3, "picture")


class Doubler(torch.nn.Module):
    """In place of an upscale model, behind ComfyUI's interface."""

    scale = 2.0

    def __init__(self):
        super().__init__()
        self.patcher = type("Patcher", (), {"load_device": torch.device("cpu")})()

    def forward(self, pixels):
        return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_any_upscale_model_makes_the_pixels(run, nano, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: None)
    picture = image(32, 32, 4)
    larger = picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
    # At the smallest sigma the result is nearly what was enlarged.
    found = upscaled(run, nano, image=picture, upscale_model=Doubler(), sigma=0.01)
    (encoded,) = run("K2VAEEncode", pixels=larger, vae=nano[0][2])[:1]
    monkeypatch.undo()
    plain = upscaled(run, nano, image=picture, sigma=0.01)
    assert (found - encoded["samples"]).abs().mean() < (plain - encoded["samples"]).abs().mean() / 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "image and latent: neither is connected"),
        ({"image": image(32, 32), "latent": {"samples": torch.zeros(1, 16, 1, 4, 4)}}, "both"),
        ({"image": image(32, 32), "scale": 1.0}, "scale is 1.0; expected above 1"),
        ({"image": image(32, 32), "scale": 1.1}, "expected a larger image. Raise the scale"),
        ({"image": image(32, 32), "sigma": 0.0}, "sigma is 0.0; expected above 0"),
        ({"image": image(32, 32), "tile": 100}, "size is 100; expected a multiple of 16"),
        ({"image": image(32, 32), "overlap": 0.7}, "overlap of tiles is 0.7"),
        ({"image": image(32, 32), "guidance": 2.0}, "Guidance is 2 but nothing is connected"),
        ({"image": image(32, 32), "parts": "half"}, "parts is 'half'; expected one of auto"),
        (
            {"image": image(32, 32), "upscale_model": object(), "method": "latent"},
            "enlarges pixels",
        ),
    ],
)
def test_upscale_refuses(run, nano, options, words):
    with pytest.raises(ValueError, match=words):
        upscaled(run, nano, **options)


def test_widgets_are_checked_before_a_run(pack):
    large, upscale = pack("nodes.large"), pack("nodes.upscale")
    assert "multiple of 16" in large.K2TiledSampling.validate_inputs(tile=100)
    assert "0 to 0.5" in large.K2TiledSampling.validate_inputs(overlap=0.6)
    assert "above 0 to 4" in large.K2RotaryScaling.validate_inputs(strength=0.0)
    assert "2 to 64" in large.K2SparseAttention.validate_inputs(block=1)
    assert "above 1" in upscale.K2Upscale.validate_inputs(scale=0.5)
    assert upscale.K2Upscale.validate_inputs(scale=2.0, tile=None) is True


def test_core_s_own_model_is_refused_by_name(run, models):
    core = run("K2ModelLoader", file="krea2_tiny_turbo.safetensors",
               implementation="ComfyUI's own")[0]  # fmt: skip
    for node, feature in (("K2TiledSampling", "tiles"), ("K2RotaryScaling", "scaled rotary"),
                          ("K2SparseAttention", "sparse attention")):  # fmt: skip
        with pytest.raises(ValueError, match=f"which has no {feature}"):
            run(node, model=core)


@pytest.mark.parametrize("batch", [2, 0])
def test_a_batch_of_tiles_is_the_picture_of_single_ones(run, nano, batch):
    """With guidance, whose two texts of different length share a call."""
    (model, *_), texts = nano
    latent = {"samples": torch.zeros(1, 16, 1, 12, 16)}
    options = {**texts, "latent": latent, **SAMPLER, "guidance": 2.0}
    found, calls = [], []
    for count in (1, batch):
        tiled, seen = run("K2TiledSampling", model=model, tile=64, batch=count)[0], []
        hook = tiled.model.diffusion_model.first.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        found.append(run("K2Sampler", **{**options, "model": tiled})[0]["samples"])
        hook.remove()
        calls.append(len(seen))
    assert_close(found[0], found[1], 1e-5, "latents")
    assert calls[1] == calls[0] / (batch or 6)


def test_parts_of_references_are_cut_in_the_graph_as_in_python(run, nano, pack):
    (model, clip, vae), texts = nano
    reference = image(96, 128, 5)
    latent = {"samples": torch.zeros(1, 16, 1, 12, 16)}
    tiled = run("K2TiledSampling", model=model, tile=64, cut_references=True)[0]
    positive = run("K2Reference", positive=texts["positive"], image=reference, vae=vae)[0]
    found = run("K2Sampler", model=tiled, positive=positive, latent=latent, **SAMPLER)[0]["samples"]
    krea2 = pack("krea2_model")
    settings = krea2.TileSettings(64, cut_references=True)
    pictures = [reference[0].movedim(-1, 0)]
    expected = krea2.Krea2Pipeline.nano()(
        "a red circle", width=128, height=96, steps=2, guidance=0, seed=3, tiles=settings,
        references=pictures, output_type="np", prompt_weights=True,
    )  # fmt: skip
    (decoded,) = run("K2VAEDecode", samples={"samples": found}, vae=vae)[:1]
    assert_close(decoded, torch.from_numpy(expected), 1e-3, "picture")


def test_sparse_attention_is_exact_at_its_sigma_and_below(run, nano):
    """With guidance too, whose two texts of different length would share a call."""
    (model, *_), texts = nano
    latent = {"samples": torch.zeros(1, 16, 1, 16, 24)}
    found = {}
    for above in (0.0, 0.999, 1.0):
        sparse = run("K2SparseAttention", model=model, above=above, block=2, stride=4)[0]
        options = {**texts, "latent": latent, **SAMPLER, "guidance": 2.0}
        found[above] = run("K2Sampler", model=sparse, **options)[0]["samples"]
    plain = run("K2Sampler", model=model, **options)[0]["samples"]
    assert_close(found[1.0], plain, 1e-4, "off")
    for above, other in ((0.0, plain), (0.999, plain), (0.0, found[0.999])):
        assert (found[above] - other).abs().mean() > 1e-3 * plain.abs().mean()
