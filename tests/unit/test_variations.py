"""Neighbours of a picture and walks between two: noise, prompts, and what the pictures do."""

import itertools

import pytest
import torch

from krea2_model import Krea2Pipeline, PromptBlend, Upscale, Variation
from krea2_model.features.arguments import start_noise
from krea2_model.features.variations import slerp

RED, BLUE = "a red circle on a white background", "a large blue square on a black background"
SMALL = {"height": 64, "width": 64, "steps": 4, "output_type": "pt"}


@pytest.fixture(scope="module")
def nano():
    return Krea2Pipeline.nano()


def noise(batch=1, seed=3, **options):
    return start_noise(None, (batch, 16, 8), (128, 128), 128, seed, **options)


def test_the_ends_of_the_arc_are_exact_and_the_norm_is_kept():
    start, end = noise(seed=1)[0], noise(seed=2)[0]
    assert slerp(start, end, 0) is start and slerp(start, end, 1) is end
    assert slerp(start, start.clone(), 0.3) is start
    low, high = sorted((start.norm(), end.norm()))
    shares = [0.1, 0.25, 0.5, 0.75, 0.9]
    steps = [slerp(start, end, share) for share in shares]
    for step in steps:
        assert low - 1e-3 <= step.norm() <= high + 1e-3
        assert abs(step.std() - 1) < 0.02, "as normal as the ends"
    for ours, theirs in itertools.pairwise([start, *steps, end]):
        assert (ours - start).norm() < (theirs - start).norm()
        assert (ours - end).norm() > (theirs - end).norm()
    # The angle rises in proportion.
    angle = torch.nn.functional.cosine_similarity
    total, part = (torch.acos(angle(start.flatten(), x.flatten(), dim=0)) for x in (end, steps[1]))
    assert abs(part / total - 0.25) < 1e-3


def test_opposite_noise_has_no_arc():
    start = noise()[0]
    assert torch.isfinite(slerp(start, -start, 0.25)).all()


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_no_way_leads_from_noise_that_is_zero(share):
    """It would give NaN, and the run an error that blames the weights."""
    start = noise()[0]
    for ends in ((start, 0 * start), (0 * start, start)):
        with pytest.raises(ValueError, match="zero everywhere"):
            slerp(*ends, share)


def test_each_image_has_its_own_noise_whatever_the_batch():
    vary = Variation(seed=9, strength=0.4)
    together = noise(4, vary=[vary])
    for index in range(4):
        alone = noise(1, vary=[Variation(seed=9 + index, strength=0.4)])
        assert torch.equal(together[index], alone[0])
    listed = noise(2, [3, 5], vary=[Variation([1, 2], [0.2, 1.0])])
    assert torch.equal(listed[1], noise(1, 2)[0])
    assert torch.equal(listed[0], slerp(noise(1, 3)[0], noise(1, 1)[0], 0.2))
    chain = noise(1, vary=[vary, Variation(2, 0.5)])
    assert torch.equal(chain[0], slerp(noise(1, vary=[vary])[0], noise(1, 2)[0], 0.5))


def test_the_ends_are_the_plain_pictures_to_the_bit(nano):
    own, other = nano(RED, seed=3, **SMALL), nano(RED, seed=8, **SMALL)
    assert torch.equal(nano(RED, seed=3, vary=Variation(8, 0.0), **SMALL), own)
    assert torch.equal(nano(RED, seed=3, vary=Variation(8, 1.0), **SMALL), other)
    assert not torch.equal(own, other)
    blue = nano(BLUE, seed=3, **SMALL)
    assert torch.equal(nano(RED, seed=3, blend=PromptBlend(BLUE, 0.0), **SMALL), own)
    assert torch.equal(nano(RED, seed=3, blend=PromptBlend(BLUE, 1), **SMALL), blue)


def test_the_second_stage_has_the_noise_of_the_other_seed_too(nano):
    options = SMALL | {"upscale": Upscale(1.5), "steps": 2}
    expected = nano(RED, seed=8, **options)
    assert torch.equal(nano(RED, seed=3, vary=Variation(8, 1.0), **options), expected)


def test_pictures_move_away_as_the_strength_rises(nano):
    strengths = [0.0, 0.1, 0.3, 0.6, 1.0]
    totals = torch.zeros(len(strengths))
    for seed, prompt in itertools.product((1, 20, 41), ("two stars", "a green triangle")):
        vary = Variation([seed + 7] * len(strengths), strengths)
        found = nano(prompt, num_images=len(strengths), seed=seed, vary=vary, **SMALL)
        totals += (found - found[:1]).abs().mean(dim=(1, 2, 3))
    assert totals[0] < 1e-5 and (totals.diff() > 0).all(), totals


@pytest.mark.parametrize("guidance", [0, 1.5])
def test_a_walk_goes_from_one_plain_picture_to_the_other(nano, guidance):
    options = SMALL | {"guidance": guidance}
    frames = list(nano.walk(RED, BLUE, frames=5, seed=3, to_seed=8, **options))
    assert torch.equal(frames[0], nano(RED, seed=3, **options)[0])
    assert torch.equal(frames[-1], nano(BLUE, seed=8, **options)[0])
    distance = [(frame - frames[0]).abs().mean() for frame in frames]
    # At its end the other picture is there, and small differences go either way.
    assert all(one < other + 0.01 for one, other in itertools.pairwise(distance)), distance
    assert distance[1] < distance[2] < distance[-1]
    steps = [(one - other).abs().mean() for one, other in itertools.pairwise(frames)]
    assert max(steps) < distance[-1], "neighbouring frames are nearer than the ends"


def test_a_walk_of_seeds_alone_keeps_the_prompt(nano):
    frames = list(nano.walk(RED, frames=2, seed=3, to_seed=8, **SMALL))
    assert torch.equal(frames[-1], nano(RED, seed=8, **SMALL)[0]) and len(frames) == 2


def test_a_blend_keeps_what_both_texts_share(nano):
    """The white ground stays, and the circle has the colour of neither, at 128 px."""
    texts = [f"a {colour} circle on a white background" for colour in ("red", "blue")]
    options = {"seed": 3, "output_type": "pt", "steps": 8}
    ends = [nano(text, **options)[0] for text in texts]
    middle = nano(texts[0], blend=PromptBlend(texts[1]), **options)[0]
    corner, inside = (..., slice(0, 16), slice(0, 16)), (..., slice(56, 72), slice(56, 72))
    for end in ends:
        assert (middle[corner] - end[corner]).abs().mean() < 0.05
        assert (middle[inside] - end[inside]).abs().mean() > 0.1


def test_a_blend_with_guidance_is_the_same_where_texts_could_share_a_call(nano, monkeypatch):
    options = SMALL | {"seed": 3, "guidance": 1.5, "blend": PromptBlend(BLUE)}
    found = []
    for shares in (False, True):
        monkeypatch.setattr("krea2_model.pipeline.stages.pays_to_share", lambda *sizes, s=shares: s)
        found.append(nano(RED, **options))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vary": Variation}, "expected a Variation"),
        ({"vary": 0.3}, "vary is 0.3"),
        ({"blend": "a star"}, "blend is 'a star'; expected a PromptBlend"),
        ({"vary": Variation([1, 2], 0.5)}, r"\[1, 2\]"),
        ({"vary": Variation(1, [0.5, 0.6])}, "2 strengths; expected a number, or 1"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_called(nano, options, words):
    with pytest.raises(ValueError, match=words):
        nano(RED, callback=lambda *step: pytest.fail("computed"), **SMALL, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Variation(-1), "seed is -1"),
        (lambda: Variation(1, 1.5), "strength is 1.5; expected 0"),
        (lambda: Variation("x"), "seed is 'x'"),
        (lambda: Variation(1, []), r"strength is \[\]"),
        (lambda: PromptBlend("x", float("nan")), "share is nan"),
        (lambda: PromptBlend(3), "prompt is 3"),
        (lambda: Krea2Pipeline.walk(None, "a"), "nothing to walk to"),
        (lambda: Krea2Pipeline.walk(None, "a", "b", frames=1), "frames is 1"),
        (lambda: Krea2Pipeline.walk(None, "a", "b", vary=[]), "vary is no option"),
        (lambda: Krea2Pipeline.walk(None, "a", to_seed=-1), "seed is -1"),
    ],
)
def test_bad_values_are_refused_at_once(make, words):
    with pytest.raises(ValueError, match=words):
        make()
