"""The detailer in ComfyUI: masks and SEGS, prompts of their own, runs, and what it refuses."""

from collections import namedtuple

import comfy.model_management
import numpy as np
import pytest
import torch

from nano_training.judge import read_thing
from nano_training.scenes import Scene, Thing, draw
from samples import image

SEG = namedtuple(
    "SEG", "cropped_image cropped_mask confidence crop_region bbox label control_net_wrapper"
)
BOXES = [(20, 20, 60, 60), (120, 30, 160, 70), (50, 100, 90, 140)]


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model="krea2-nano (built in)")


@pytest.fixture(scope="module")
def detail(run, nano):
    model, clip, vae = nano
    positive, negative = run("K2TextEncode", clip=clip, prompt="a red star", negative="")[:2]

    def call(picture, **options):
        inputs = {"preset": "custom", "steps": 2, "guidance": 0.0, "positive": positive}
        inputs |= {"model": model, "vae": vae, "negative": negative, "image": picture}
        return run("K2Detailer", **{**inputs, **options})

    return call


def masks(*boxes, height=180, width=200):
    found = torch.zeros(len(boxes), height, width)
    for mask, (left, top, right, bottom) in zip(found, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return found


def segs(*boxes, height=180, width=200, margin=10):
    """As a detector gives them: the crop is larger than its mask."""
    found = []
    for left, top, right, bottom in boxes:
        region = [left - margin, top - margin, right + margin, bottom + margin]
        mask = np.zeros((bottom - top + 2 * margin, right - left + 2 * margin), np.float32)
        mask[margin:-margin, margin:-margin] = 1
        found.append(SEG(None, mask, 0.9, region, (left, top, right, bottom), "face", None))
    return (height, width), found


def test_only_the_areas_change(detail):
    picture, options = image(180, 200, channels=4), {"grow": 0, "feather": 0, "blend": 0}
    result, mask = detail(picture, mask=masks(*BOXES), denoise=0.8, **options)
    assert result.shape == picture.shape
    changed = (result != picture).any(dim=-1)
    assert torch.equal(mask, masks(*BOXES).amax(dim=0, keepdim=True))
    assert not changed[mask == 0].any() and changed[mask == 1].float().mean() > 0.9


def test_segs_one_mask_and_several_are_the_same_areas(detail):
    picture = image(180, 200)
    several, one = masks(*BOXES), masks(*BOXES).amax(dim=0, keepdim=True)
    # Islands of one mask are numbered from top to bottom, as the boxes are.
    expected = detail(picture, mask=several)[0]
    for same in ({"mask": one}, {"segs": segs(*BOXES)}):
        assert torch.equal(detail(picture, **same)[0], expected)
    (height, width), parts = segs(*[[side // 2 for side in box] for box in BOXES], margin=5)
    halves = detail(picture, segs=((height // 2, width // 2), parts))[0]
    assert (halves - expected).abs().mean() < 0.02, "scaled to the image"


def test_batches_and_runs_one_by_one_are_one_picture(detail, nano, calls_of, monkeypatch):
    picture, options = image(180, 200), {"mask": masks(*BOXES), "denoise": 1.0}
    calls = calls_of(nano[0].model.diffusion_model)
    together = detail(picture, **options)[0]
    assert calls == [3, 3]
    calls.clear()
    alone = detail(picture, max_batch=1, **options)[0]
    assert calls == [1] * 6
    assert (together - alone).abs().max() < 1e-3
    calls.clear()
    # A device with room for two.
    management = comfy.model_management
    needed = nano[0].model.memory_required([2, 16, 1, 16, 16])
    room = nano[0].model_size() + management.minimum_inference_memory() + needed
    monkeypatch.setattr(management, "get_total_memory", lambda device: room)
    fits = detail(picture, **options)[0]
    assert calls == [2, 2, 1, 1]
    assert (fits - together).abs().max() < 1e-3
    calls.clear()
    detail(picture, sampler="euler_ancestral", **options)
    assert calls == [1] * 6, "its noise would depend on the batch"


def test_an_area_may_have_its_own_prompt(detail, run, nano):
    picture, options = image(180, 200), {"mask": masks(*BOXES), "denoise": 1.0, "blend": 0}
    plain = detail(picture, **options)[0]
    other = detail(picture, clip=nano[1], prompts="\na blue (square:1.2)\n", **options)[0]
    second = masks(BOXES[1])[0] > 0
    assert (other - plain)[0, ~second & (masks(BOXES[0], BOXES[2]).sum(0) > 0)].abs().max() < 1e-3
    assert (other - plain)[0, second].abs().mean() > 0.02
    alone = run("K2TextEncode", clip=nano[1], prompt="a blue (square:1.2)", negative="")[0]
    expected = detail(picture, positive=alone, **{**options, "mask": masks(*BOXES)})[0]
    assert (other - expected)[0, second].abs().max() < 1e-3


def test_progress_counts_all_runs(detail, monkeypatch):
    seen = []
    bar = comfy.utils.ProgressBar.update_absolute

    def update(self, value, total=None, preview=None, **options):
        seen.append((value, total or self.total))
        return bar(self, value, total, preview, **options)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    detail(image(180, 200), mask=masks(*BOXES), max_batch=2)
    assert [each for each in seen if each[1] == 4] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_cancelled_run_leaves_the_image_as_it_was(detail, monkeypatch):
    picture = image(180, 200)
    before, checks = picture.clone(), []

    def check():
        checks.append(1)
        if len(checks) > 40:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", check)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        for _ in range(20):
            detail(picture, mask=masks(*BOXES), max_batch=1)
    assert torch.equal(picture, before)


# krea2-nano paints these four at each of eight seeds (32 of 32).
def test_small_things_of_a_large_picture_become_what_the_prompt_says(detail, run, nano):
    colours = ["red", "green", "blue", "yellow"]
    picture = torch.from_numpy(draw(Scene((Thing("circle", "black"),), "white"), 512, 512))[None]
    picture[:] = picture[:, :1, :1]
    boxes = [(40, 40, 104, 104), (380, 60, 444, 124), (60, 400, 124, 464), (390, 390, 454, 454)]
    for left, top, right, bottom in boxes:
        small = torch.from_numpy(draw(Scene((Thing("circle", "black"),), "white"), 64, 64))
        picture[0, top:bottom, left:right] = small
    prompts = "\n".join(f"a {colour} star on white" for colour in colours)
    result, mask = detail(
        picture, mask=masks(*boxes, height=512, width=512), clip=nano[1], prompts=prompts,
        denoise=1.0, context=1.2, grow=0, feather=0, preset="auto", blend=2,
    )  # fmt: skip
    right = 0
    for (left, top, wide, high), colour in zip(boxes, colours, strict=True):
        found = read_thing(result[0, top:high, left:wide].numpy())
        right += found is not None and (found.colour, found.shape) == (colour, "star")
    assert torch.equal(result[mask.expand(1, -1, -1) == 0], picture[mask == 0])
    assert right >= 3  # a device may round one otherwise


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "either mask or segs"),
        ({"mask": masks(*BOXES), "segs": segs(*BOXES)}, "either mask or segs"),
        ({"mask": torch.zeros(1, 180, 200)}, "mask is empty"),
        ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
        ({"mask": masks(*BOXES, height=200)}, "same aspect"),
        ({"segs": ((180, 200), [])}, "holds no segment"),
        ({"segs": ((180, 400), segs(*BOXES)[1])}, "belongs to an image of 400 x 180"),
        ({"segs": ((180, 200), [1])}, "is no SEGS"),
        ({"segs": "faces"}, "is no SEGS"),
        ({"segs": segs((500, 500, 540, 540))}, "Segment 1 of segs is empty"),
        ({"mask": masks(*BOXES), "prompts": "a star"}, "connect clip"),
        ({"mask": masks(*BOXES), "guidance": 2.0, "negative": None}, "connected to negative"),
        ({"mask": masks(*BOXES), "context": 0.5}, "context is 0.5"),
        ({"mask": masks(*BOXES), "max_batch": -1}, "max_batch is -1"),
        ({"mask": masks(*BOXES), "image": image(180, 200, batch=2)}, "expected one image"),
        ({"mask": masks(*BOXES), "vae": None}, "vae is empty"),
    ],
)
def test_what_is_refused_is_named_before_sampling(detail, nano, calls_of, options, message):
    calls = calls_of(nano[0].model.diffusion_model)
    picture = options.pop("image", image(180, 200))
    with pytest.raises(ValueError, match=message):
        detail(picture, **options)
    assert not calls


def test_regions_are_refused(detail):
    states = torch.zeros(1, 4, 12 * 160)
    with pytest.raises(ValueError, match="positive has regions"):
        detail(image(180, 200), mask=masks(*BOXES), positive=[[states, {"krea2_regions": 1}]])
