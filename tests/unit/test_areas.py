"""Areas of an image: from masks and boxes to crops in turns and batches, and back to the bit."""

import pytest
import torch

from krea2_model.images.areas import (
    MAX_AREAS,
    AreaCanvas,
    batches,
    masks_of,
    masks_of_boxes,
    painted_mask,
    plan_areas,
)
from samples import image

PLAIN = {"megapixels": 0.0625, "grow": 0, "feather": 0}


def mask(height, width, *boxes):
    values = torch.zeros(1, height, width)
    for left, top, right, bottom in boxes:
        values[:, top:bottom, left:right] = 1
    return values


def sides(areas):
    return [(a.repaint.box.left, a.repaint.box.top, a.turn) for a in areas]


def test_islands_are_areas_from_top_to_bottom_and_touching_corners_are_one():
    one = mask(200, 300, (200, 10, 240, 50), (10, 60, 50, 90), (50, 90, 80, 120))
    boxes = [part.box for part in masks_of(one)]
    assert [(b.left, b.top, b.width, b.height) for b in boxes] == [
        (200, 10, 40, 40), (10, 60, 70, 60)
    ]  # fmt: skip
    (whole,) = masks_of(one, islands=False)
    assert (whole.box.width, whole.box.height) == (230, 110)


def test_islands_within_each_other_s_extent_do_not_mix():
    ring = mask(100, 100, (10, 10, 90, 90))
    ring[:, 20:80, 20:80] = 0
    ring[:, 40:60, 40:60] = 0.6
    first, second = masks_of(ring)
    assert first.values.sum() == 80 * 80 - 60 * 60 and not first.overlaps(second)
    assert second.values.eq(0.6).all() and second.box.width == 20


def test_specks_are_left_out_and_named_where_nothing_else_is_left(caplog):
    speck = mask(100, 100, (1, 1, 4, 4), (50, 50, 70, 70))
    assert len(masks_of(speck)) == 1 and "1 area of less" in caplog.text
    with pytest.raises(ValueError, match="The area of the mask is smaller"):
        masks_of(mask(100, 100, (1, 1, 4, 4)))
    with pytest.raises(ValueError, match="mask is empty"):
        masks_of(torch.zeros(2, 100, 100))
    many = mask(
        400, 400, *((x, y, x + 9, y + 9) for x in range(0, 390, 20) for y in range(0, 390, 20))
    )
    with pytest.raises(ValueError, match=f"400 areas; expected at most {MAX_AREAS}"):
        plan_areas(masks_of(many), 400, 400, **PLAIN)


def test_boxes_are_cut_at_the_image_and_bad_ones_refused():
    (part,) = masks_of_boxes([(-5, 10, 20.4, 500)], 64, 48)
    assert (part.box.left, part.box.top, part.box.width, part.box.height) == (0, 10, 20, 38)
    for box in ((20, 0, 10, 10), (100, 0, 120, 10), (0, 0, 1), (0, 0, float("nan"), 1), "abcd"):
        with pytest.raises(ValueError, match="Box 1 is"):
            masks_of_boxes([box], 64, 48)


def test_areas_of_like_shape_share_a_size_and_hold_their_mask():
    masks = mask(600, 800, (50, 50, 150, 160), (300, 60, 390, 150), (500, 300, 700, 340))
    areas = plan_areas(masks_of(masks), 800, 600, **PLAIN)
    assert [(a.width, a.height) for a in areas] == [(256, 256), (256, 256), (336, 192)]
    for area in areas:
        assert area.repaint.within(area.box).sum() == area.repaint.values.sum()
        aspect = area.box.width / area.box.height
        assert aspect == pytest.approx(area.width / area.height, rel=0.02)
        assert area.box.width >= 2 * area.repaint.box.width - 1


def test_a_narrow_image_keeps_content_in_shape():
    """A box of one of the common aspects does not fit; stretching would show."""
    (area,) = plan_areas(masks_of(mask(300, 90, (0, 0, 90, 100))), 90, 300, **PLAIN)
    assert area.box.width == 90
    aspect = area.box.width / area.box.height
    assert aspect == pytest.approx(area.width / area.height, rel=0.06)


def test_an_area_that_overlaps_an_earlier_one_has_a_later_turn():
    boxes = (10, 10, 60, 60), (50, 50, 100, 100), (200, 200, 250, 250), (90, 90, 140, 140)
    masks = torch.cat([mask(300, 300, box) for box in boxes])
    areas = plan_areas(masks_of(masks), 300, 300, **PLAIN)
    assert [area.turn for area in areas] == [0, 1, 0, 2]
    # Growing makes neighbours overlap.
    apart = masks_of(mask(300, 300, (10, 10, 60, 60), (70, 10, 120, 60)))
    for grow, turns in ((0, [0, 0]), (8, [0, 1])):
        grown = plan_areas(apart, 300, 300, **{**PLAIN, "grow": grow})
        assert [area.turn for area in grown] == turns


def test_batches_are_of_one_turn_and_size_and_no_larger_than_fits():
    masks = mask(600, 800, *((x, 50, x + 50, 100) for x in range(0, 800, 160)), (0, 300, 200, 340))
    areas = plan_areas(masks_of(masks), 800, 600, **PLAIN)
    groups = [[a.number for a in group] for group in batches(areas, lambda w, h: 3)]
    assert groups == [[0, 1, 2], [3, 4], [5]]
    alone = [[a.number for a in g] for g in batches(areas, lambda w, h: 9, lambda a: a.number == 1)]
    assert alone == [[0, 2, 3, 4], [1], [5]]


def test_what_is_pasted_stays_within_the_masks_to_the_bit():
    original = image(300, 300, channels=4)
    masks = mask(300, 300, (20, 20, 70, 60), (150, 180, 220, 260))
    areas = plan_areas(masks_of(masks), 300, 300, megapixels=0.0625, grow=4, feather=6)
    canvas, before = AreaCanvas(original), original.clone()
    for group in batches(areas, lambda width, height: 8):
        crops, cells = canvas.crop(group)
        assert crops.shape == (len(group), group[0].height, group[0].width, 3)
        assert cells.shape == crops.shape[:3] and cells.amax(dim=(1, 2)).eq(1).all()
        canvas.paste(group, torch.zeros_like(crops), blend=2)
    assert torch.equal(original, before)
    result, painted = canvas.image, painted_mask(areas, 300, 300)
    changed = (result != original).any(dim=-1)
    assert not changed[painted == 0].any()
    assert changed[painted == 1].float().mean() > 0.9
    assert result[0, 40, 40].tolist() == [0, 0, 0, 1]
