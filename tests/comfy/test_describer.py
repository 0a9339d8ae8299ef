"""Captions of images on the loaded encoder."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from samples import image


@pytest.fixture
def clip(models, run):
    return run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]


@pytest.fixture
def brief(pack, monkeypatch):
    """Short texts: random weights write noise at any length."""
    describer = pack("krea2_model.text.describer")
    for name in ("short", "style"):
        length = describer.CaptionLength(f"{name}.", tokens=8)
        monkeypatch.setitem(describer.CAPTION_LENGTHS, name, length)
    monkeypatch.setattr(describer, "SYSTEM_PROMPT", "Write.")


@pytest.fixture
def describe(run, brief):
    return lambda clip, image, **inputs: run(
        "K2Describe", clip=clip, image=image, **{"length": "short", **inputs}
    )[0]


def test_each_image_of_a_batch_has_a_caption_as_it_would_alone(describe, clip):
    batch = image(64, 96, batch=3)
    captions = describe(clip, batch, creativity=1)
    assert len(set(captions)) == 3 and all(captions)
    assert describe(clip, batch[1:2], creativity=1) == captions[1:2]
    assert describe(clip, batch, creativity=1, length="style") != captions


def test_it_writes_what_the_pipeline_writes(describe, pack, clip, models):
    """One path without ComfyUI and one under its management: the same words."""
    pixels = image(64, 96, seed=3)
    file = models / "text_encoders/qwen3vl_tiny.safetensors"
    loading = pack("krea2_model.checkpoints.text_encoder")
    encoder = loading.load_text_encoder(file, dtype=torch.float32)
    alone = pack("krea2_model.text.describer").Describer(encoder)
    options = {"creativity": 1, "seed": 5}
    expected = alone(pixels[0].movedim(-1, 0), ["short"], **options)
    assert describe(clip, pixels, **options) == expected


def test_a_caption_of_ones_own_goes_on_and_nothing_is_written(describe, clip, monkeypatch, pack):
    language = pack("krea2_model.text.language_model").LanguageModel
    monkeypatch.setattr(language, "__call__", lambda *args: pytest.fail("the encoder was run"))
    assert describe(clip, image(64, 96, batch=2), caption="a (red:1.2) fox") == ["a (red:1.2) fox"]


def test_the_same_inputs_write_nothing_anew(describe, clip, pack, monkeypatch):
    language = pack("krea2_model.text.language_model").LanguageModel
    call, calls = language.__call__, []
    monkeypatch.setattr(
        language, "__call__", lambda self, *args: calls.append(self) or call(self, *args)
    )
    first = describe(clip, image(64, 96), seed=1)
    count = len(calls)
    assert describe(clip, image(64, 96), seed=1) == first and len(calls) == count
    describe(clip, image(64, 96, seed=1), seed=1)
    assert len(calls) > count, "another image"
    count = len(calls)
    describe(clip, image(64, 96), seed=2)
    assert len(calls) > count, "another seed"


def test_large_images_are_made_smaller(describe, clip):
    large = image(128, 192)
    assert describe(clip, large, seed=1, creativity=1, max_side=64) != describe(
        clip, large, seed=1, creativity=1
    )


def test_what_cannot_describe_is_refused(run, describe, clip, core_clip, models):
    nano = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
    for other, message in (
        (nano, "random and cannot write"),
        (core_clip, "clip is not from a Krea 2 loader"),
        (None, "clip is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(other, image())
    with pytest.raises(ValueError, match="max_side is 16; expected 32"):
        describe(clip, image(), max_side=16)
    with pytest.raises(ValueError, match="length is 'huge'"):
        describe(clip, image(), length="huge")
    folder = models / "text_encoders"
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    blind = folder / "blind_encoder.safetensors"
    save_file({n: t for n, t in tensors.items() if not n.startswith("visual.")}, blind)
    with pytest.raises(ValueError, match="has no vision tower"):
        describe(run("K2TextEncoderLoader", file=blind.name)[0], image())
    blind.unlink()
