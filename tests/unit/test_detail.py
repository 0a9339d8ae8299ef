"""The detailer without ComfyUI; tests/comfy/test_same_picture.py compares it with the node."""

import pytest
import torch

from krea2_model import DetailAreas, Krea2Pipeline, NegativeGuidance
from samples import picture

BOXES = [(20, 20, 60, 60), (120, 30, 160, 70), (50, 100, 90, 140)]
FAST = {"steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def turbo():
    return Krea2Pipeline.nano()


def inside(boxes, height=180, width=200):
    mask = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_only_the_areas_change_and_the_rest_stays_to_the_bit(turbo):
    original = picture(180, 200)
    areas = DetailAreas(boxes=BOXES, grow=0, feather=0, blend=0)
    (painted,) = turbo.detail(original, "a star", areas, denoise=0.8, **FAST)
    changed = (painted != original).any(dim=0)
    assert painted.shape == original.shape
    assert not changed[~inside(BOXES)].any() and changed[inside(BOXES)].float().mean() > 0.9


def test_one_batch_or_one_by_one_is_one_picture_and_one_bar_counts_all(turbo):
    original, areas, seen = picture(180, 200), DetailAreas(boxes=BOXES), []
    options = {"denoise": 1.0, **FAST}
    prompts = ["a red star", "a blue circle on the left", "a green square"]

    def count(step, latents, predicted):
        seen.append((step, len(latents)))

    together = turbo.detail(original, prompts, areas, callback=count, **options)
    assert seen == [(1, 3), (2, 3)]
    seen.clear()
    alone = turbo.detail(original, prompts, areas, callback=count, max_batch=1, **options)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert (together - alone).abs().max() < 1e-3
    first = turbo.detail(original, prompts[0], DetailAreas(boxes=BOXES[:1]), **options)[0]
    box = inside(BOXES[:1])
    assert (first[:, box] - alone[0][:, box]).abs().max() < 1e-3, "its prompt and seed are its own"


def test_weights_of_the_negative_are_read_with_those_of_the_prompt(turbo):
    original, areas = picture(180, 200), DetailAreas(boxes=BOXES[:1])

    def detail(negative, **options):
        options = {"negative_prompt": negative, **FAST, **options}
        return turbo.detail(original, "a red star", areas, denoise=1.0, **options)

    for how in ({"guidance": 3.0}, {"negative_guidance": NegativeGuidance()}):
        weighted = detail("a (red:2) circle", prompt_weights=True, **how)
        assert (weighted != detail("a red circle", prompt_weights=True, **how)).any()
        assert (weighted != detail("a (red:2) circle", **how)).any()
        plain = detail("a \\(red:2\\) circle", prompt_weights=True, **how)
        assert (plain == detail("a (red:2) circle", **how)).all()
    assert (detail("a blue", negative_guidance=NegativeGuidance(scale=0)) == detail("")).all()


def test_a_later_area_sees_the_earlier_one(turbo):
    original = picture(180, 200)
    boxes = [(20, 20, 100, 100), (60, 60, 140, 140)]
    options = {"denoise": 0.6, **FAST}
    both = turbo.detail(original, "a star", DetailAreas(boxes=boxes), seed=[5, 6], **options)
    first = turbo.detail(original, "a star", DetailAreas(boxes=boxes[:1]), seed=5, **options)
    second = turbo.detail(first[0], "a star", DetailAreas(boxes=boxes[1:]), seed=6, **options)
    assert (both - second).abs().max() < 1e-3


def test_a_run_can_be_cancelled_between_areas(turbo):
    def cancel(step, latents, predicted):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        areas = DetailAreas(boxes=BOXES)
        turbo.detail(picture(180, 200), "a star", areas, max_batch=1, callback=cancel, **FAST)


def test_masks_come_alone_in_a_list_or_as_a_batch(turbo):
    original, mask = picture(180, 200), inside(BOXES).float()
    expected = turbo.detail(original, "a star", mask, **FAST)
    parts = [inside([box]).float() for box in BOXES]
    for same in (DetailAreas(mask), [mask], mask[None], parts, torch.stack(parts)):
        assert torch.equal(turbo.detail(original, "a star", same, **FAST), expected)


def test_unknown_arguments_are_refused_first(turbo):
    with pytest.raises(TypeError, match="detail has no argument width; options of it: guidance_"):
        turbo.detail(picture(64, 64), "a star", DetailAreas(), width=64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"areas": DetailAreas()}, "either masks or boxes"),
        ({"areas": torch.zeros(180, 200)}, "mask is empty"),
        ({"areas": torch.zeros(90, 200)}, "empty"),
        ({"areas": DetailAreas(boxes=BOXES, context=0.5)}, "context is 0.5"),
        ({"areas": DetailAreas(boxes=BOXES, grow=-1)}, "grow is -1"),
        ({"areas": DetailAreas(boxes=BOXES, megapixels=0)}, "megapixels is 0"),
        ({"prompt": ["a", "b"]}, "2 prompts for 3 areas"),
        ({"denoise": 0}, "denoise is 0"),
        ({"start_sigma": 2}, "start_sigma is 2"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"seed": [1, 2]}, "list of 3"),
        ({"negative_guidance": 4}, "negative_guidance is 4"),
        ({"output_type": "latent"}, "expected pil, np or pt"),
        ({"image": 5}, "image is int"),
    ],
)
def test_bad_arguments_are_named_before_the_model_runs(turbo, monkeypatch, options, message):
    monkeypatch.setattr(turbo, "encode_prompt", None)
    arguments = {"image": picture(180, 200), "prompt": "a star", "areas": DetailAreas(boxes=BOXES)}
    with pytest.raises(ValueError, match=message):
        turbo.detail(**{**arguments, **options})
