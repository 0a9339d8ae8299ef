"""Inpainting without ComfyUI; tests/comfy/test_same_picture.py compares it with the nodes."""

import numpy as np
import pytest
import torch
from PIL import Image

from krea2_model import Inpaint, Krea2Pipeline
from krea2_model.features.inpainting import Canvas
from samples import picture


@pytest.fixture(scope="module")
def turbo():
    return Krea2Pipeline.nano()


def square(height=70, width=100):
    mask = torch.zeros(height, width)
    mask[20:50, 40:80] = 1
    return mask


def test_the_rest_stays_to_the_bit(turbo):
    image = picture(70, 100)
    inpaint = Inpaint(square(), grow=0, feather=0)
    painted = turbo("a star", start_image=image, inpaint=inpaint, steps=2, output_type="pt")[0]
    changed = (painted != image).any(dim=0)
    assert painted.shape == image.shape
    assert changed[20:50, 40:80].float().mean() > 0.9
    changed[20:50, 40:80] = False
    assert not changed.any()


def test_a_batch_has_one_original(turbo):
    options = {"steps": 1, "output_type": "pt", "num_images": 2}
    inpaint = Inpaint(square(64, 64), grow=0, feather=0)
    first, second = turbo("a star", start_image=picture(64, 64), inpaint=inpaint, **options)
    assert torch.equal(first[:, :10], second[:, :10]) and not torch.equal(first, second)


def test_masks_may_be_files_arrays_and_grey_pictures(tmp_path):
    image, mask = picture(70, 100), square()
    grey = Image.fromarray((mask * 255).byte().numpy())
    grey.save(tmp_path / "mask.png")
    expected = Canvas(image, Inpaint(mask)).cells
    path, wide = tmp_path / "mask.png", mask[None].expand(3, -1, -1)
    for same in (grey, path, str(path), np.array(grey), wide):
        assert torch.equal(Canvas(image, Inpaint(same)).cells, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give start_image"),
        ({"start_image": picture(64, 64), "width": 64, "height": 64}, "keeps its size"),
        ({"start_image": picture(64, 96)}, "same aspect"),
        ({"start_image": picture(64, 64), "inpaint": torch.zeros(64, 64)}, "nothing would be"),
        ({"start_image": picture(64, 64), "inpaint": 5}, "int; expected a mask"),
        (
            {"start_image": picture(64, 64), "inpaint": Inpaint(square(64, 64), grow=-1)},
            "grow is -1",
        ),
        ({"start_image": picture(64, 64), "inpaint": Inpaint(square(64, 64), fill="x")}, "fill is"),
    ],
)
def test_bad_masks_are_named(turbo, options, message):
    with pytest.raises(ValueError, match=message):
        turbo("a star", **{"inpaint": square(64, 64), **options})
