"""krea2-nano through a real ComfyUI: tests that ask what the picture shows."""

import shutil
from pathlib import Path

import comfy.model_management
import numpy as np
import pytest
import torch

from nano_training.judge import colour_name, read_thing
from nano_training.scenes import Scene, Thing, draw
from parity import assert_close

NANO = "krea2-nano (built in)"
NANO_RAW = "krea2-nano Raw (built in)"


@pytest.fixture(scope="module")
def turbo(run):
    """MODEL, CLIP and VAE of nano Turbo."""
    return run("K2Loader", model=NANO)


@pytest.fixture(scope="module")
def raw(run):
    """MODEL, CLIP and VAE of nano Raw."""
    return run("K2Loader", model=NANO_RAW)


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


# The scheduler "simple" takes its sigmas from a table of 1000; an eighth of it is a whole number.
@pytest.mark.parametrize(
    "variant, steps, cfg, limit", [("turbo", 8, 1.0, 1e-5), ("raw", 28, 4.5, 1e-3)]
)
def test_stock_ksampler_agrees(run, request, variant, steps, cfg, limit):
    model, clip, vae = request.getfixturevalue(variant)
    texts = run("K2TextEncode", clip=clip, prompt="a green star on a pink background", negative="")
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
    options = {"positive": texts[0], "negative": texts[1], "seed": 3}
    ours = run("K2Sampler", model=model, latent=latent, **options)[0]["samples"]
    shifted = run("K2ModelSampling", model=model, width=128, height=128)[0]
    stock = run(
        "KSampler", model=shifted, latent_image=latent, steps=steps,
        cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0, **options,
    )[0]["samples"]  # fmt: skip
    assert_close(stock, ours, limit, "KSampler against K2Sampler on krea2-nano")
    picture = run("VAEDecode", samples={"samples": stock}, vae=vae)[0].numpy().squeeze()
    assert read_thing(picture).colour == "green"


FEW_STEPS = {"preset": "custom", "steps": 3, "guidance": 2.0, "shift": "fixed", "mu": 1.15}


@pytest.mark.parametrize("variant", ["turbo", "raw"])
def test_core_loads_the_files(run, pack, models, request, paint, variant):
    """ComfyUI's own loaders take transformer and VAE; the sizes of its encoder are fixed."""
    parts = request.getfixturevalue(variant)
    nano = pack("krea2_model.nano")
    copies = [
        shutil.copy(nano.TRANSFORMERS[variant], models / "diffusion_models/nano.safetensors"),
        shutil.copy(nano.VAE, models / "vae/nano.safetensors"),
    ]
    model = run("UNETLoader", unet_name="nano.safetensors", weight_dtype="default")[0]
    vae = run("VAELoader", vae_name="nano.safetensors")[0]
    for copy in copies:
        copy.unlink()  # or "auto" would find it for other models
    prompt = "a small yellow ring in the top left corner on a black background"
    core = paint((model, parts[1], vae), prompt, **FEW_STEPS)
    assert np.abs(core - paint(parts, prompt, **FEW_STEPS)).max() < 0.02


def line_contrast(pictures):
    """How much lighter than its lines (rows 14 and 15 of 16) paper is at the left, in red."""
    red = pictures[:, :, :8, 0].mean(axis=(0, 2))
    lines = np.arange(len(red)) % 16 >= 14
    return red[~lines].mean() - red[lines].mean()


def test_lora_changes_the_style_and_at_strength_0_nothing(run, pack, models, turbo, paint):
    """Trained on Raw, it works on Turbo too."""
    parts = turbo
    (models / "loras").mkdir(exist_ok=True)
    file = shutil.copy(pack("krea2_model.nano").LORA, models / "loras")
    model, *others = parts
    prompt = "a large blue star on a white background"

    def with_lora(strength):
        patched = run(
            "LoraLoaderModelOnly",
            model=model,
            lora_name=Path(file).name,
            strength_model=strength,
        )[0]
        return paint((patched, *others), prompt)

    plain = paint(parts, prompt)
    assert np.array_equal(with_lora(0.0), plain)
    assert abs(line_contrast(plain)) < 0.05
    styled = with_lora(1.0)
    assert line_contrast(styled) > 0.2
    # What the prompt names is still there, and the model itself is as it was.
    blue = [colour_name(pixel) == "blue" for pixel in styled[0].reshape(-1, 3)]
    assert np.mean(blue) > 0.02
    assert np.array_equal(paint(parts, prompt), plain)


def test_partial_offload_paints_the_same(turbo, paint):
    prompt = "a blue triangle at the bottom"
    expected = paint(turbo, prompt, **FEW_STEPS)
    patcher = turbo[0].clone()
    comfy.model_management.unload_all_models()
    patcher.load(torch.device("cpu"), lowvram_model_memory=patcher.model_size() // 3)
    assert patcher.model.model_lowvram
    offloaded = paint((patcher, *turbo[1:]), prompt, **FEW_STEPS)
    assert np.abs(offloaded - expected).max() < 1e-4
    patcher.detach()


def test_denoise_strength(run, turbo, paint):
    """A little keeps the picture that is there; a lot follows the prompt."""
    picture = draw(Scene((Thing("circle", "red"),), "white"))
    pixels = torch.from_numpy(picture)[None]
    latent = run("K2VAEEncode", pixels=pixels, vae=turbo[2])[0]
    prompt = "a blue circle on a white background"
    colours = [
        read_thing(paint(turbo, prompt, latent=latent, denoise=denoise)[0]).colour
        for denoise in (0.1, 0.95)
    ]
    assert colours == ["red", "blue"]


def test_batch_with_different_prompts(run, turbo):
    """A list of texts gives each image of a batch its own."""
    model, clip, vae = turbo
    texts = ["a red circle", "a yellow square at the top on a blue background"]
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(texts))
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128, batch=2)[0]
    samples = run("K2Sampler", model=model, positive=positive, latent=latent, seed=2)[0]
    pictures = run("K2VAEDecode", samples=samples, vae=vae)[0].numpy()
    things = [read_thing(picture) for picture in pictures]
    assert [(t.colour, t.shape) for t in things] == [("red", "circle"), ("yellow", "square")]


def test_auto_never_mixes_nano_with_other_models(pack, models):
    pairing, kinds = pack("nodes.pairing"), pack("krea2_model.checkpoints.identify")
    nano = pack("krea2_model.nano")
    for part, path in ((kinds.TEXT_ENCODER, nano.text_encoder_file()), (kinds.VAE, nano.VAE)):
        for transformer in nano.TRANSFORMERS.values():
            assert pairing.find_fitting(part, transformer) == path
        own = pairing.find_fitting(part, models / "diffusion_models/krea2_tiny_turbo.safetensors")
        assert own != path


def test_sizes_far_from_the_trained_one_are_warned_of(run, turbo, paint, caplog):
    latent = run("K2EmptyLatent", aspect="custom", width=272, height=256)[0]
    paint(turbo, "a red circle", latent=latent, preset="custom", steps=1, guidance=0.0)
    assert "272 x 256 px is far from the 128 x 128" in caplog.text
    caplog.clear()
    paint(turbo, "a red circle", preset="custom", steps=1, guidance=0.0)
    assert "far from" not in caplog.text
