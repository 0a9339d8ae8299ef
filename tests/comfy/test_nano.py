"""krea2-nano through a real ComfyUI: tests that ask what the picture shows."""

import shutil

import comfy.model_management
import numpy as np
import pytest
import torch

from nano_training.judge import judge, read_thing
from nano_training.scenes import Scene, Thing, draw, held_out_prompts
from parity import assert_close

NANO = "krea2-nano (built in)"


@pytest.fixture(scope="module")
def parts(run):
    """MODEL, CLIP and VAE."""
    return run("K2Loader", model=NANO)


@pytest.fixture(scope="module")
def paint(run):
    """Paint with our nodes: pictures (N, H, W, 3) in [0, 1]."""

    def call(parts, prompt, seed=1, negative="", latent=None, **options):
        model, clip, vae = parts
        texts = run("K2TextEncode", clip=clip, prompt=prompt, negative=negative)
        latent = latent or run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
        (samples,) = run(
            "K2Sampler", model=model, positive=texts[0], negative=texts[1], latent=latent,
            seed=seed, **options,
        )  # fmt: skip
        return run("K2VAEDecode", samples=samples, vae=vae)[0].numpy()

    return call


# The weights that are shipped now know colours and places, and not yet shapes and two things.
@pytest.mark.xfail(reason="krea2-nano is half trained", strict=False)
def test_held_out_prompts(parts, paint):
    exam = held_out_prompts()
    exam = exam[:16] + exam[-8:]
    verdicts = [
        judge(paint(parts, prompt, seed=seed)[0], scene)
        for seed, (prompt, scene) in enumerate(exam)
    ]

    def share(part):
        return np.mean([verdict[part] for verdict in verdicts if part in verdict])

    assert share("background") >= 0.8
    assert share("colour") >= 0.75
    assert share("shape") >= 0.6
    assert share("place") >= 0.75
    assert share("two colours") >= 0.5


def test_stock_ksampler_agrees(run, parts, paint):
    model, clip, vae = parts
    texts = run("K2TextEncode", clip=clip, prompt="a green star on a pink background", negative="")
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
    options = {"positive": texts[0], "negative": texts[1], "seed": 3}
    ours = run("K2Sampler", model=model, latent=latent, **options)[0]["samples"]
    shifted = run("K2ModelSampling", model=model, width=128, height=128)[0]
    stock = run(
        "KSampler", model=shifted, latent_image=latent, steps=28,
        cfg=4.5, sampler_name="euler", scheduler="simple", denoise=1.0, **options,
    )[0]["samples"]  # fmt: skip
    # The scheduler "simple" takes its sigmas from a table of 1000.
    assert_close(stock, ours, 1e-3, "KSampler against K2Sampler on krea2-nano")
    picture = run("VAEDecode", samples={"samples": stock}, vae=vae)[0].numpy().squeeze()
    assert read_thing(picture).colour == "green"


def test_core_loads_the_files(run, pack, models, parts, paint):
    """ComfyUI's own loaders take transformer and VAE; the sizes of its encoder are fixed."""
    nano = pack("krea2_model.nano")
    shutil.copy(nano.TRANSFORMERS["raw"], models / "diffusion_models" / "nano_raw.safetensors")
    shutil.copy(nano.VAE, models / "vae" / "nano_vae.safetensors")
    model = run("UNETLoader", unet_name="nano_raw.safetensors", weight_dtype="default")[0]
    vae = run("VAELoader", vae_name="nano_vae.safetensors")[0]
    prompt = "a small yellow ring in the top left corner on a black background"
    expected = paint(parts, prompt)
    for copy in (
        models / "diffusion_models" / "nano_raw.safetensors",
        models / "vae" / "nano_vae.safetensors",
    ):
        copy.unlink()  # or "auto" would find it for other models
    core = paint((model, parts[1], vae), prompt, preset="custom", steps=28, guidance=3.5)
    assert np.abs(core - expected).max() < 0.02


def test_partial_offload_paints_the_same(parts, paint):
    expected = paint(parts, "a blue triangle at the bottom")
    patcher = parts[0].clone()
    comfy.model_management.unload_all_models()
    patcher.load(torch.device("cpu"), lowvram_model_memory=patcher.model_size() // 3)
    assert patcher.model.model_lowvram
    offloaded = paint((patcher, *parts[1:]), "a blue triangle at the bottom")
    assert np.abs(offloaded - expected).max() < 1e-4
    patcher.detach()


def test_denoise_strength(run, parts, paint):
    """A little keeps the picture that is there; a lot follows the prompt."""
    picture = draw(Scene((Thing("circle", "red"),), "white"))
    pixels = torch.from_numpy(picture)[None]
    latent = run("K2VAEEncode", pixels=pixels, vae=parts[2])[0]
    prompt = "a blue circle on a white background"
    colours = [
        read_thing(paint(parts, prompt, latent=latent, denoise=denoise)[0]).colour
        for denoise in (0.1, 0.95)
    ]
    assert colours == ["red", "blue"]


@pytest.mark.xfail(reason="krea2-nano is half trained", strict=False)
def test_batch_with_different_prompts(run, parts, paint):
    """A list of texts gives each image of a batch its own."""
    model, clip, vae = parts
    texts = ["a red circle", "a small yellow star at the top on a blue background"]
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(texts))
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128, batch=2)[0]
    samples = run(
        "K2Sampler",
        model=model,
        positive=positive,
        latent=latent,
        seed=2,
        preset="custom",
        guidance=0.0,
    )[0]
    pictures = run("K2VAEDecode", samples=samples, vae=vae)[0].numpy()
    found = [(read_thing(picture).colour, read_thing(picture).shape) for picture in pictures]
    assert found == [("red", "circle"), ("yellow", "star")]


def test_auto_never_mixes_nano_with_other_models(pack, models):
    files, kinds = pack("nodes.files"), pack("krea2_model.identify")
    nano = pack("krea2_model.nano")
    for part, path in ((kinds.TEXT_ENCODER, nano.TEXT_ENCODER), (kinds.VAE, nano.VAE)):
        assert files.find_fitting(part, nano.TRANSFORMERS["raw"]) == path
        own = files.find_fitting(part, models / "diffusion_models/krea2_tiny_turbo.safetensors")
        assert own != path


def test_sizes_far_from_the_trained_one_are_warned_of(run, parts, paint, caplog):
    latent = run("K2EmptyLatent", aspect="custom", width=272, height=256)[0]
    paint(parts, "a red circle", latent=latent, preset="custom", steps=1, guidance=0.0)
    assert "272 x 256 px is far from the 128 x 128" in caplog.text
    caplog.clear()
    paint(parts, "a red circle", preset="custom", steps=1, guidance=0.0)
    assert "far from" not in caplog.text
