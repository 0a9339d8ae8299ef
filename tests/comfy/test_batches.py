"""Many at once: each image of a batch is the one its prompt and seed make alone."""

import numpy as np
import pytest
import torch

from nano_training.judge import colour_name, read_thing
from parity import assert_close

NANO = "krea2-nano (built in)"
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "black")


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model=NANO)


def paint(run, nano, positive, negative, batch, **options):
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128, batch=batch)[0]
    samples = run("K2Sampler", model=nano[0], positive=positive, negative=negative, latent=latent,
                  seed=3, **options)[0]  # fmt: skip
    return run("K2VAEDecode", samples=samples, vae=nano[2])[0].numpy()


def test_eight_prompts_in_a_batch_are_the_eight_right_pictures(run, nano):
    prompts = [f"a large {colour} circle on a white background" for colour in COLOURS]
    positive, negative, count, lines = run(
        "K2PromptBatch", clip=nano[1], prompts="\n".join(["", *prompts, "  "])
    )
    assert count == 8 and lines.splitlines() == prompts
    pictures = paint(run, nano, positive, negative, count, seeds="one an image")
    found = [read_thing(picture) for picture in pictures]
    assert [thing.colour for thing in found] == list(COLOURS)
    # And each is the picture of its seed alone.
    for index in (0, 5):
        texts = run("K2TextEncode", clip=nano[1], prompt=prompts[index])
        latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
        alone = run("K2Sampler", model=nano[0], positive=texts[0], negative=texts[1],
                    latent=latent, seed=3 + index)[0]  # fmt: skip
        alone = run("K2VAEDecode", samples=alone, vae=nano[2])[0].numpy()[0]
        assert np.abs(alone - pictures[index]).max() < 1e-3


def test_wildcards_are_drawn_for_each_image(run, nano):
    options = {"clip": nano[1], "prompts": "a {red|blue} circle\na star", "images_per_prompt": 6}
    *_, count, lines = run("K2PromptBatch", **options, wildcard_seed=4)
    lines = lines.splitlines()
    assert count == 12 and lines[6:] == ["a star"] * 6
    assert set(lines[:6]) == {"a red circle", "a blue circle"}
    again = run("K2PromptBatch", **options, wildcard_seed=4)[-1].splitlines()
    other = run("K2PromptBatch", **options, wildcard_seed=400)[-1].splitlines()
    assert again == lines != other


@pytest.mark.parametrize("prompts, options, message", [
    (" \n ", {}, "prompts is empty"),
    ("a {red", {}, "brace at position 2"),
    ("a", {"images_per_prompt": 5000}, "1 prompt with 5000 images each: 5000"),
])  # fmt: skip
def test_bad_prompts_are_named(run, nano, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run("K2PromptBatch", clip=nano[1], prompts=prompts, **options)


def test_a_seed_an_image(run, raw, conditioning):
    """Image i of a batch is the one seed + i makes, with or without the numbers of a longer one."""
    texts = {"positive": conditioning(6, 1), "negative": conditioning(4, 2), "preset": "custom",
             "steps": 2, "guidance": 0.0}  # fmt: skip

    def sample(batch, seed, seeds="one for the batch", **extra):
        latent = {"samples": torch.zeros(batch, 16, 1, 16, 24), **extra}
        return run("K2Sampler", model=raw, latent=latent, seed=seed, seeds=seeds, **texts)[0][
            "samples"
        ]

    batch = sample(3, 7, "one an image")
    for index in range(3):
        assert_close(batch[index], sample(1, 7 + index)[0], 1e-5, f"image {index}")
    part = sample(2, 7, "one an image", batch_index=[2, 0])
    assert_close(part, batch[[2, 0]], 1e-5, "two of the batch")
    assert not torch.allclose(sample(3, 7)[1], batch[1], atol=1e-2), "ComfyUI's own stream differs"
    assert torch.isfinite(sample(2, 2**64 - 1, "one an image")).all()
    with pytest.raises(ValueError, match="seeds is 'many'"):
        sample(1, 1, "many")


def test_contact_sheet(run):
    red, blue = (torch.tensor(c).expand(2, 32, 48, 3) for c in ([1.0, 0, 0], [0, 0, 1.0]))
    sheet = run("K2ContactSheet", images=[red, blue], captions=["one\ntwo", "three"], columns=[2],
                cell=[48], text_size=[10])[0]  # fmt: skip
    assert sheet.ndim == 4 and len(sheet) == 1 and sheet.shape[-1] == 3
    names = {colour_name(pixel) for pixel in sheet.reshape(-1, 3).numpy()[::7]}
    assert {"red", "blue", "white"} <= names
    with pytest.raises(ValueError, match="3 captions"):
        run("K2ContactSheet", images=[red], captions=["a\nb\nc"])
