"""Framing: sizes, crops and paddings, and parts that are put back to the bit."""

import pytest
import torch

from krea2_model.images.crop import align_to_original, crop, crop_boxes, stitch
from krea2_model.images.resize import (
    colours,
    extend,
    pad,
    pad_to_tokens,
    resize,
    resize_and_crop,
    target_size,
)


def ramps(height, width):
    """An image whose red and green say where a pixel is."""
    image = torch.zeros(1, height, width, 3)
    image[..., 0] = torch.linspace(0, 1, width)
    image[..., 1] = torch.linspace(0, 1, height)[:, None]
    return image


def spot(height, width, top, left, rows, columns):
    mask = torch.zeros(1, height, width)
    mask[:, top : top + rows, left : left + columns] = 1
    return mask


@pytest.mark.parametrize(
    "size, megapixels, aspect, expected",
    [
        ((1024, 1024), 1.0, "image", (1024, 1024)),
        ((4000, 3000), 1.0, "image", (1184, 880)),
        ((300, 400), 1.0, "image", (880, 1184)),
        ((1000, 500), 0.0, "image", (992, 496)),
        ((1000, 500), 1.0, "16:9", (1360, 768)),
        ((1, 1), 0.0, "image", (16, 16)),
        ((1, 1), 1.0, "image", (1024, 1024)),
    ],
)
def test_sizes_follow_the_image(size, megapixels, aspect, expected):
    assert target_size(*size, megapixels, aspect) == expected


@pytest.mark.parametrize("megapixels", [-1.0, float("nan")])
def test_bad_areas(megapixels):
    with pytest.raises(ValueError, match="megapixels is"):
        target_size(100, 100, megapixels, "image")


def test_impossible_aspects_are_named():
    with pytest.raises(ValueError, match="aspect is '5:1'"):
        target_size(100, 100, 1.0, "5:1")
    with pytest.raises(ValueError, match="at most 16384"):
        target_size(20000, 1, 1.0, "image")


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (200, 33), (1, 1)])
@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("target", [(64, 64), (112, 48)])
def test_images_and_masks_have_the_size_that_was_asked_for(size, mode, target):
    width, height = size
    mask = torch.zeros(1, height, width)
    image, mask = resize_and_crop(ramps(height, width), mask, *target, mode)
    assert image.shape == (1, target[1], target[0], 3) and mask.shape == image.shape[:3]
    assert image.min() >= 0 and image.max() <= 1
    assert (mask.any() and mode == "pad") or not mask.any() or size == (1, 1)


def test_crop_cuts_both_ends_alike_and_pad_continues_them():
    wide = ramps(32, 96)
    mask = torch.zeros(1, 32, 96)
    cut, _ = resize_and_crop(wide, mask, 32, 32, "crop")
    assert torch.equal(cut, wide[:, :, 32:64]), "where nothing is scaled, to the bit"
    whole, new = resize_and_crop(wide, mask, 96, 64, "pad")
    assert torch.equal(whole[:, 16:48], wide)
    assert torch.equal(whole[:, :16], wide[:, :1].expand(-1, 16, -1, -1))
    assert new[:, :16].eq(1).all() and new[:, 48:].eq(1).all() and not new[:, 16:48].any()
    grey, _ = resize_and_crop(wide, mask, 96, 64, "pad", "grey")
    assert grey[:, :16].eq(0.5).all()
    flat, _ = resize_and_crop(wide, mask, 48, 64, "stretch")
    assert flat[0, 32, :, 0].diff().min() > 0 and flat[0, 0, -1, 0] > 0.97


def test_bad_modes_are_named():
    image, mask = ramps(32, 32), torch.zeros(1, 32, 32)
    with pytest.raises(ValueError, match="mode is 'fill'"):
        resize_and_crop(image, mask, 32, 32, "fill")
    with pytest.raises(ValueError, match="padding is 'blue'"):
        pad(image, 1, 1, 1, 1, "blue")


def test_shrinking_has_no_aliasing():
    """Stripes of a pixel each become their mean."""
    stripes = torch.zeros(1, 64, 64, 3)
    stripes[:, :, ::2] = 1
    assert (resize(stripes, 16, 16) - 0.5).abs().max() < 0.1
    assert resize(stripes, 64, 64) is stripes


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_colours(channels):
    assert colours(torch.rand(2, 5, 6, channels)).shape == (2, 5, 6, 3)


@pytest.mark.parametrize("shape", [(5, 6, 3), (1, 0, 6, 3), (1, 5, 6, 2), (0, 5, 6, 3)])
def test_what_is_no_image_is_named(shape):
    with pytest.raises(ValueError, match="The image has shape .*expected .batch, height"):
        colours(torch.rand(shape))


def test_extended_images_hold_the_original_and_mask_what_is_new():
    image = torch.rand(2, 40, 50, 3)
    larger, mask = extend(image, 24, 8, 0, 0)
    # 24 and 8 more for multiples of 16, where the image grows anyway.
    assert larger.shape == (2, 48, 80, 3) and mask.shape == (2, 48, 80)
    assert torch.equal(larger[:, 8:, 30:], image)
    assert not mask[:, 8:, 30:].any() and mask.sum() == 2 * (48 * 80 - 40 * 50)
    assert torch.equal(larger[:, 20, 0], larger[:, 20, 30]), "the outermost pixels go on"
    right, _ = extend(image, 0, 0, 16, 0)
    assert right.shape == (2, 48, 80, 3) and torch.equal(right[:, :40, :50], image)


def test_the_feather_of_an_extended_image_reaches_into_it_where_it_grew():
    image = torch.rand(1, 64, 64, 3)
    _, mask = extend(image, 0, 0, 16, 0, feather=3)
    row = mask[0, 32]
    assert row[64:].eq(1).all() and not row[:61].any()
    assert row[61:64].tolist() == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize(
    "sides, message",
    [
        ((0, 0, 0, 0), "are all 0"),
        ((-8, 0, 0, 0), "left is -8"),
        ((0, 20000, 0, 0), "height is 20032; expected"),
    ],
)
def test_impossible_extensions(sides, message):
    with pytest.raises(ValueError, match=message):
        extend(torch.rand(1, 32, 32, 3), *sides)


def test_sides_are_continued_to_whole_tokens():
    image, mask = pad_to_tokens(torch.rand(1, 17, 1, 3), torch.ones(1, 17, 1))
    assert image.shape == (1, 32, 16, 3) and mask.shape == (1, 32, 16) and mask.all()


@pytest.mark.parametrize("megapixels", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("height, width", [(600, 900), (333, 77), (20, 30), (1, 1)])
def test_boxes_hold_the_mask_and_lie_in_the_image(height, width, megapixels):
    generator = torch.Generator().manual_seed(height)
    for _ in range(8):
        top = int(torch.randint(height, (), generator=generator))
        left = int(torch.randint(width, (), generator=generator))
        rows, columns = max(1, (height - top) // 3), max(1, (width - left) // 2)
        mask = spot(height, width, top, left, rows, columns)
        (box,), across, down = crop_boxes(mask, 1.5, megapixels)
        assert 0 <= box.left <= left and left + columns <= box.left + box.width <= width
        assert 0 <= box.top <= top and top + rows <= box.top + box.height <= height
        assert across % 16 == down % 16 == 0
        inside = box.width < width and box.height < height
        if inside:
            assert box.width / box.height == pytest.approx(across / down, rel=0.02)
            assert box.width >= 1.5 * columns and box.height >= 1.5 * rows


def test_boxes_of_a_batch_have_one_size_and_their_own_places():
    masks = torch.cat([spot(400, 600, 10, 20, 40, 60), spot(400, 600, 300, 500, 60, 30),
                       torch.zeros(1, 400, 600)])  # fmt: skip
    boxes, *_ = crop_boxes(masks, 1.5, 0.25)
    assert len({(box.width, box.height) for box in boxes}) == 1
    assert (boxes[0].left, boxes[0].top) == (5, 0)
    assert boxes[1].left <= 500 and boxes[1].left + boxes[1].width >= 530
    assert abs(boxes[2].left + boxes[2].width / 2 - 300) <= 1, "nothing masked: in the middle"


def test_impossible_crops():
    with pytest.raises(ValueError, match="The mask is empty"):
        crop_boxes(torch.zeros(1, 64, 64), 1.5, 1.0)
    with pytest.raises(ValueError, match="context is 0.5"):
        crop_boxes(torch.ones(1, 64, 64), 0.5, 1.0)


@pytest.mark.parametrize("megapixels", [0.0, 0.1])
@pytest.mark.parametrize("feather", [0, 6])
def test_what_is_stitched_leaves_the_rest_to_the_bit(megapixels, feather):
    image = torch.rand(2, 300, 400, 3)
    masks = torch.cat([spot(300, 400, 30, 50, 40, 60), spot(300, 400, 250, 300, 50, 50)])
    part, part_mask, cut = crop(image, masks, 1.5, megapixels)
    assert part.shape[:3] == part_mask.shape and len(part) == 2
    whole = stitch(cut, torch.ones_like(part), feather)
    assert torch.equal(whole[masks == 0], image[masks == 0])
    assert (whole[masks == 1] != image[masks == 1]).any(dim=-1).all()
    middle = whole[0, 48:52, 78:82], whole[1, 280:299, 320:330]
    assert all(torch.allclose(part, torch.ones_like(part)) for part in middle)
    assert torch.equal(cut.images, image), "and the original is not changed"


def test_what_comes_back_unchanged_lies_where_it_was():
    """Resized there and back: a shift of a pixel would show in ramps."""
    image, mask = ramps(300, 400), spot(300, 400, 100, 150, 60, 90)
    part, _, cut = crop(image, mask, 1.5, 0.1)
    assert part.shape[1:3] != (cut.boxes[0].height, cut.boxes[0].width)
    assert (stitch(cut, part) - image).abs().max() < 0.5 / 400


def test_a_stitch_with_another_mask():
    image, mask = torch.rand(1, 200, 200, 3), spot(200, 200, 90, 90, 20, 20)
    part, part_mask, cut = crop(image, mask, 2.0, 0.0)
    grown = torch.ones_like(part_mask)
    box = cut.boxes[0]
    whole = stitch(cut, torch.ones_like(part), mask=grown)
    inside = torch.zeros(200, 200, dtype=torch.bool)
    inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
    assert whole[0][inside].eq(1).all() and torch.equal(whole[0][~inside], image[0][~inside])


def test_a_crop_takes_many_paintings_and_a_batch_one_each():
    image, mask = torch.rand(1, 100, 100, 3), spot(100, 100, 40, 40, 10, 10)
    part, _, cut = crop(image, mask, 1.5, 0.0)
    many = stitch(cut, torch.rand(3, *part.shape[1:]))
    assert many.shape == (3, 100, 100, 3) and not torch.equal(many[0], many[1])
    _, _, two = crop(image.expand(2, -1, -1, -1), mask, 1.5, 0.0)
    with pytest.raises(ValueError, match="3 painted"):
        stitch(two, torch.rand(3, *part.shape[1:]))


def test_sizes_that_were_cropped_or_continued_are_aligned():
    original = torch.rand(1, 100, 50, 3)
    mask = torch.ones(1, 100, 50)
    same, whole = align_to_original(original, torch.cat([original, original[:, -12:]], dim=1), mask)
    assert torch.equal(same, original) and whole.all()
    # As the VAE crops: 96 rows from the second on, 48 columns from the first on.
    cropped, part = align_to_original(original, original[:, 2:98, 1:49], mask)
    assert torch.equal(cropped[:, 2:98, 1:49], original[:, 2:98, 1:49])
    assert part.sum() == 96 * 48 and part[:, 2:98, 1:49].all()
    with pytest.raises(ValueError, match="painted image is 64"):
        align_to_original(original, torch.rand(1, 64, 64, 3), mask)
