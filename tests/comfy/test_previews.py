"""Live previews: krea2-nano in its own colours, the released model in ComfyUI's."""

import shutil

import comfy.latent_formats
import latent_preview
import pytest
import torch
import torch.nn.functional as F
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

NANO = "krea2-nano (built in)"
PROMPTS = [
    "a red circle on a white background", "a blue square on a yellow background",
    "a small pink triangle on a green background", "a large orange ring on a black background",
]  # fmt: skip


@pytest.fixture(scope="module")
def painted(run):
    """Model, latents as the sampler has them, and the decoded pictures (B, 3, 16, 16)."""
    model, clip, vae = run("K2Loader", model=NANO)
    positive, negative, count, _ = run("K2PromptBatch", clip=clip, prompts="\n".join(PROMPTS))
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128, batch=count)[0]
    samples = run("K2Sampler", model=model, positive=positive, negative=negative, latent=latent,
                  seed=1)[0]  # fmt: skip
    images = run("K2VAEDecode", samples=samples, vae=vae)[0].movedim(-1, 1)
    return model, model.model.process_latent_in(samples["samples"]), F.avg_pool2d(images, 8)


def error(latent_format, latents, pictures):
    """Mean difference of previews from the pictures, of 255."""
    previewer = latent_preview.get_previewer(torch.device("cpu"), latent_format)
    found = []
    for one, picture in zip(latents.split(1), pictures, strict=True):
        preview = previewer.decode_latent_to_preview(one)
        assert isinstance(preview, Image.Image) and preview.size == (16, 16)
        values = torch.frombuffer(bytearray(preview.tobytes()), dtype=torch.uint8)
        found.append((values.view(16, 16, 3).movedim(-1, 0) - picture * 255).abs().mean())
    return torch.stack(found).mean().item()


@pytest.mark.parametrize(
    "method",
    [LatentPreviewMethod.Latent2RGB, LatentPreviewMethod.Auto, LatentPreviewMethod.TAESD],
)
def test_previews_of_nano_have_its_colours(painted, monkeypatch, method):
    monkeypatch.setattr(args, "preview_method", method)
    model, latents, pictures = painted
    assert error(model.model.latent_format, latents, pictures) < 15
    assert error(comfy.latent_formats.Wan21(), latents, pictures) > 60
    # Half precision, and latents without an axis for frames.
    assert error(model.model.latent_format, latents.half(), pictures) < 15
    assert error(model.model.latent_format, latents[:, :, 0], pictures) < 15


def test_without_the_neighbours_colours_are_roughly_right(painted, pack, monkeypatch):
    """As in a ComfyUI that knows factors alone."""
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    _, latents, pictures = painted
    latent_format = pack("nodes.managed.previews").NanoLatents()
    latent_format.latent_rgb_factors_reshape = None
    assert error(latent_format, latents, pictures) < 40


def test_the_first_run_shows_them(run, painted, monkeypatch):
    import comfy.utils

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    shown = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute",
        lambda bar, value, total=None, preview=None: shown.append(preview),
    )  # fmt: skip
    model, clip, _ = run("K2Loader", model=NANO)
    text = run("K2TextEncode", clip=clip, prompt=PROMPTS[1])[0]
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
    run("K2Sampler", model=model, positive=text, latent=latent, seed=1)
    kind, picture, _ = shown[-1]
    red, green, blue = picture.getpixel((1, 14))
    assert kind == "JPEG" and min(red, green) > 190 and blue < 120, "the yellow background"
    red, green, blue = picture.getpixel((8, 8))
    assert blue > 150 and red < 100, "the blue square"


def test_copies_and_conversions_of_nano_are_known(run, pack, base, models):
    nano = pack("krea2_model.nano")
    shutil.copy(nano.TRANSFORMERS["raw"], models / "diffusion_models" / "renamed.safetensors")
    kind = pack("nodes.managed.previews").NanoLatents
    for options in ({"file": "renamed.safetensors"}, {"file": NANO, "dtype": "int8"}):
        assert isinstance(run("K2ModelLoader", **options)[0].model.latent_format, kind)
    transformer = pack("krea2_model.checkpoints.transformer").load_transformer(
        nano.TRANSFORMERS["turbo"]
    )
    assert transformer.config == pack("krea2_model.nano.preview").TRANSFORMER_CONFIG


def test_others_stay_as_they_are(turbo, raw, painted):
    for model in (turbo, raw):
        assert type(model.model.latent_format) is comfy.latent_formats.Wan21
    latents = torch.randn(2, 16, 1, 4, 6)
    for way in ("process_in", "process_out"):
        ours, stock = (
            getattr(latent_format, way)(latents)
            for latent_format in (painted[0].model.latent_format, comfy.latent_formats.Wan21())
        )
        assert torch.equal(ours, stock)
