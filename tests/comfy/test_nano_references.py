"""References in meaning: krea2-nano with its reference LoRA paints in the colours of pictures.

The exam of one reference is in tests/unit, and test_same_picture.py holds the nodes to it.
"""

import numpy as np
import pytest
import torch

from nano_training.references import reference_exam
from nano_training.scenes import draw

NANO, LORA = "krea2-nano (built in)", "krea2-nano reference (built in)"


@pytest.fixture(scope="module")
def loaded(run):
    with torch.inference_mode():
        model, clip, vae = run("K2Loader", model=NANO)
        model, clip, _ = run("K2LoraLoader", model=model, clip=clip, lora=LORA)
    return model, clip, vae


@pytest.fixture
def paint(run, loaded):
    """The picture (H, W, 3) of a conditioning."""
    model, _, vae = loaded
    latent = {"samples": torch.zeros(1, 16, 1, 16, 16)}

    def call(positive, seed=0):
        samples = run("K2Sampler", model=model, positive=positive, latent=latent, seed=seed)[0]
        return run("K2VAEDecode", samples=samples, vae=vae)[0][0].numpy()

    return call


def test_two_styles_at_a_half_lie_between(paint, run, loaded):
    """Krea 2 Style Mix through references: on the way from one background to the other."""
    exam = reference_exam()
    between = []
    for seed, (one, other) in enumerate(zip(exam[:2], exam[4:6], strict=True)):
        images = [torch.from_numpy(draw(case.reference))[None] for case in (one, other)]

        def background(shares, images=images, one=one, seed=seed):
            inputs = {"clip": loaded[1], "prompt": one.prompt, "vae": loaded[2]}
            inputs |= {"preset": "custom", "through": "references", "shares": shares}
            inputs |= {"image_1": images[0], "image_2": images[1]}
            picture = paint(run("K2StyleMix", **inputs)[0], seed)
            return np.median(picture[:4], axis=(0, 1))

        first, second, mixed = background("1, 0"), background("0, 1"), background("1, 1")
        way = second - first
        between.append(float((mixed - first) @ way / (way @ way)))
    assert all(0.1 < place < 0.9 for place in between), between
