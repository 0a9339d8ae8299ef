"""Krea 2 Upscale with prompts of single tiles: Python's picture, and what it refuses."""

import pytest
import torch

from parity import assert_close, relative_error
from samples import image

SEEN = "with the tile's picture"
PROMPT = "a (red:1.3) circle"


@pytest.fixture(scope="module")
def nano(run):
    model, clip, vae = run("K2Loader", model="krea2-nano (built in)")
    positive, negative = run("K2TextEncode", clip=clip, prompt="a house", negative="blue")[:2]
    return {"model": model, "positive": positive, "negative": negative, "vae": vae, "clip": clip}


@pytest.fixture(scope="module")
def upscaled(run, nano):
    def upscaled(**options):
        given = {"seed": 3, "parts": "tiles", "tile": 64, "steps": 2, "image": image(64, 48, 2)}
        return run("K2Upscale", **nano | given | options)[0]["samples"]

    return upscaled


@pytest.mark.parametrize("fused_before", [True, False])
def test_python_paints_the_same(run, pack, nano, upscaled, fused_before, monkeypatch):
    """With guidance, and where other packs make texts be fused at each step."""
    kit = pack("krea2_model")
    if not fused_before:
        monkeypatch.setattr(type(nano["model"].model), "_may_fuse_now", lambda *_: False)
    options = {"tile_prompt": SEEN, "prompt": PROMPT, "guidance": 2.0}
    found = run("K2VAEDecode", samples={"samples": upscaled(**options)}, vae=nano["vae"])[0]
    settings = kit.Upscale(
        2.0, parts="tiles", tile=64, steps=2, prompts=kit.TilePrompts(texts=[PROMPT] * 6)
    )
    expected = kit.Krea2Pipeline.nano()(
        "a house", "blue", guidance=2.0, seed=3, upscale=settings, denoise=0, output_type="np",
        start_image=image(64, 48, 2)[0].movedim(-1, 0), prompt_weights=True,
    )  # fmt: skip
    assert_close(found, torch.from_numpy(expected), 1e-3, "picture")
    plain = run("K2VAEDecode", samples={"samples": upscaled(guidance=2.0)}, vae=nano["vae"])[0]
    assert relative_error(found, plain) > 0.01


def test_each_image_of_a_batch_shows_its_own_parts(upscaled):
    pictures = torch.cat((image(64, 48, 2), image(64, 48, 7)))
    options = {"tile_prompt": SEEN, "prompt": PROMPT}
    both = upscaled(image=pictures, **options)
    assert_close(both[:1], upscaled(image=pictures[:1], **options), 1e-4, "the first")
    other = upscaled(image=torch.cat((pictures[:1], pictures[:1])), **options)
    assert_close(other[:1], both[:1], 1e-4, "whatever the second is")


def test_a_text_for_each_tile(upscaled, nano, run):
    same = "\n---\n".join(["a house"] * 6)
    assert_close(upscaled(prompt=same), upscaled(), 1e-4, "the same texts as positive")
    other = "\n---\n".join(["a house"] * 5 + ["a red circle"])
    found, plain = upscaled(prompt=other, steps=1), upscaled(steps=1)
    assert torch.equal(found[..., :8, :8], plain[..., :8, :8]), "the first tile alone"
    assert relative_error(found[..., -8:, -8:], plain[..., -8:, -8:]) > 1e-3
    latent = run("K2VAEEncode", pixels=image(64, 48, 2), vae=nano["vae"])[0]
    seen = upscaled(image=None, latent=latent, method="latent", tile_prompt=SEEN)
    assert relative_error(seen, upscaled(image=None, latent=latent, method="latent")) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile_prompt": SEEN, "clip": None}, "connect clip"),
        ({"tile_prompt": "all"}, "tile_prompt is 'all'"),
        ({"prompt": "a fox"}, "Connect it to positive"),
        ({"prompt": "a fox\n---\na hare"}, "There are 2 texts for 6 tiles"),
    ],
)
def test_refusals(upscaled, options, words):
    with pytest.raises(ValueError, match=words):
        upscaled(**options)


def test_without_tiles_positive_holds(upscaled):
    plain = upscaled(parts="whole")
    assert torch.equal(upscaled(parts="whole", tile_prompt=SEEN, prompt="a fox"), plain)
