"""Prompts of single tiles in Krea 2 Upscale and Krea 2 Tiled Sampling."""

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


SIZE = (96, 128)
SAMPLER = {"preset": "custom", "steps": 2, "guidance": 0.0, "denoise": 0.6, "seed": 3}


def tiled(run, nano, **options):
    """The MODEL in six tiles, its parts of a picture seen."""
    given = {"tile": 64, "clip": nano["clip"], "tile_prompt": SEEN, "prompt": PROMPT}
    return run("K2TiledSampling", model=nano["model"], **given | options)[0]


def sampled(run, nano, model, pictures=None, **options):
    pictures = image(*SIZE, 2) if pictures is None else pictures
    latent = run("K2VAEEncode", pixels=pictures, vae=nano["vae"])[0]
    texts = {"positive": nano["positive"], "negative": nano["negative"]}
    return run("K2Sampler", model=model, latent=latent, **texts, **SAMPLER | options)[0]["samples"]


@pytest.fixture
def encodings(nano, monkeypatch):
    """What is encoded, and when the model is loaded for a run."""
    import comfy.sampler_helpers

    seen, clip = [], type(nano["clip"])
    encode, load = clip.encode_from_tokens_scheduled, comfy.sampler_helpers.prepare_sampling

    def encoding(self, *inputs, **options):
        seen.append("text")
        return encode(self, *inputs, **options)

    def loading(*inputs, **options):
        seen.append("run")
        return load(*inputs, **options)

    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", encoding)
    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", loading)
    return seen


def test_any_sampler_paints_tiles_with_their_texts(run, nano):
    """Core's samplers, by both of their ways, as Krea 2 Sampler."""
    model = tiled(run, nano, image=image(*SIZE, 2))
    shift = {"preset": "custom", "shift": "fixed", "mu": 1.15}
    expected = sampled(run, nano, model, **shift)
    latent = run("K2VAEEncode", pixels=image(*SIZE, 2), vae=nano["vae"])[0]
    size = {"width": 128, "height": 96}
    shifted = run("K2ModelSampling", model=model, shift="fixed", mu=1.15, **size)[0]
    sigmas = run("K2Sigmas", model=model, latent=latent, steps=2, denoise=0.6, **shift)[0]
    guider = run("BasicGuider", model=shifted, conditioning=nano["positive"])[0]
    found = run(
        "SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=3)[0], guider=guider,
        sampler=run("KSamplerSelect", sampler_name="euler")[0], sigmas=sigmas,
        latent_image=latent,
    )[0]["samples"]  # fmt: skip
    assert_close(found, expected, 1e-5, "SamplerCustomAdvanced")
    core = {"seed": 3, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
    core |= {"positive": nano["positive"], "negative": nano["negative"], "latent_image": latent}
    plain = run("K2TiledSampling", model=shifted, tile=64)[0]
    of_tiles, without = (
        run("KSampler", model=one, denoise=0.6, **core)[0]["samples"] for one in (shifted, plain)
    )
    assert relative_error(of_tiles, without) > 1e-3


def test_texts_are_encoded_once_before_the_model_is_loaded(run, nano, encodings):
    model = tiled(run, nano, image=image(*SIZE, 2))
    assert encodings == []
    sampled(run, nano, model)
    assert encodings == 6 * ["text"] + ["run"]
    sampled(run, nano, model, seed=4)
    assert encodings[7:] == ["run"], "kept"
    sampled(run, nano, model, image(96, 64, 2))
    assert encodings[8:] == 2 * ["text"] + ["run"], "tiles of another size"


def test_the_picture_is_resized_to_the_run(run, nano, pack):
    larger = image(120, 200, 2)
    fitted = pack("krea2_model.images.resize").resize(larger, 128, 96)
    found, expected, other = (
        sampled(run, nano, tiled(run, nano, image=picture))
        for picture in (larger, fitted, image(*SIZE, 7))
    )
    assert torch.equal(found, expected)
    assert relative_error(found, other) > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_images_of_a_batch_see_the_pictures_in_turn(run, nano, sampler):
    """Together, and one by one, as a sampler that draws noise does it."""
    pictures = torch.cat((image(*SIZE, 2), image(*SIZE, 7)))
    options = {"sampler": sampler, "seeds": "one an image"}
    both = sampled(run, nano, tiled(run, nano, image=pictures), pictures, **options)
    for index in (0, 1):
        one = pictures[index : index + 1]
        model = tiled(run, nano, image=one)
        alone = sampled(run, nano, model, one, **options | {"seed": SAMPLER["seed"] + index})
        assert_close(both[index : index + 1], alone, 1e-4, f"image {index}")


def test_other_tiles_replace_the_prompts(run, nano, upscaled):
    model = tiled(run, nano, image=image(*SIZE, 2))
    plain = run("K2TiledSampling", model=nano["model"], tile=64)[0]
    again = run("K2TiledSampling", model=model, tile=64)[0]
    assert torch.equal(sampled(run, nano, again), sampled(run, nano, plain))
    assert torch.equal(upscaled(model=model), upscaled())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": None}, "connect clip"),
        ({}, "there is no picture. Connect the one that is sampled to image"),
        ({"tile_prompt": "all"}, "tile_prompt is 'all'"),
        ({"tile_prompt": "whole"}, "Connect it to positive"),
    ],
)
def test_tiled_sampling_refuses(run, nano, options, words):
    with pytest.raises(ValueError, match=words):
        tiled(run, nano, **options)


def test_another_number_of_texts_is_refused_before_the_model_is_loaded(run, nano, encodings):
    model = tiled(run, nano, tile_prompt="whole", prompt="a fox\n---\na hare")
    with pytest.raises(ValueError, match="There are 2 texts for 6 tiles"):
        sampled(run, nano, model)
    assert encodings == []
