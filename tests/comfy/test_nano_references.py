"""References in meaning: krea2-nano with its reference LoRA paints in the colours of a picture."""

import numpy as np
import pytest
import torch

from nano_training.judge import judge
from nano_training.references import Case, reference_exam
from nano_training.scenes import draw, rgb

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


@pytest.fixture
def encode(run, loaded):
    return lambda prompt: run("K2TextEncode", clip=loaded[1], prompt=prompt)[0]


@pytest.fixture
def refer(run, loaded):
    def call(positive, *scenes, **options):
        pictures = torch.from_numpy(np.stack([draw(scene) for scene in scenes]))
        options |= {"positive": positive, "vae": loaded[2], "image": pictures}
        return run("K2Reference", **options)[0]

    return call


def test_colours_come_from_the_reference_and_the_layout_from_the_prompt(paint, encode, refer):
    """Some of the exam through the nodes; more of it is in tests/unit."""
    cases: list[Case] = reference_exam()[::4]
    right = {"colour": 0, "background": 0, "shape": 0, "place": 0}
    for seed, case in enumerate(cases):
        picture = paint(refer(encode(case.prompt), case.reference), seed)
        for part, is_right in judge(picture, case.scene).items():
            right[part] += is_right
    assert all(count >= 0.8 * len(cases) for count in right.values()), right


def test_strength_leads_to_the_reference(paint, encode, refer):
    """The mean distance to the reference's colours falls as the strength rises."""
    distances = []
    for strength in (0.0, 0.2, 1.0):
        found = []
        for seed, case in enumerate(reference_exam()[:4]):
            picture = paint(refer(encode(case.prompt), case.reference, strength=strength), seed)
            wanted = rgb(case.reference.background)
            found.append(np.linalg.norm(np.median(picture[:4], axis=(0, 1)) - wanted))
        distances.append(float(np.mean(found)))
    assert distances == sorted(distances, reverse=True), distances
    assert distances[-1] < 0.5 * distances[0], distances


def test_two_styles_at_a_half_lie_between(paint, run, loaded):
    """Krea 2 Style Mix through references: on the way from one background to the other."""
    exam = reference_exam()
    between = []
    for seed, (one, other) in enumerate(zip(exam[:4], exam[4:8], strict=True)):
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
    inside = [0.1 < place < 0.9 for place in between]
    assert sum(inside) >= 3, between


def test_apart_keeps_the_colours(paint, encode, refer):
    """References that see themselves alone: another picture, in the same colours mostly."""
    cases, right, errors = reference_exam()[:5], 0, []
    for seed, case in enumerate(cases):
        apart, beside = (
            paint(refer(encode(case.prompt), case.reference, apart=apart), seed)
            for apart in (True, False)
        )
        right += judge(apart, case.scene)["background"]
        errors.append(float(np.abs(apart - beside).mean() * 255))
    assert right >= 4, right
    assert 0.01 < np.mean(errors) < 3, errors
