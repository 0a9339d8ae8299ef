"""Masks: distances, what is repainted, and composites that keep the original to the bit."""

import pytest
import torch

from krea2_model.images.masks import (
    FILLS,
    blend_weights,
    cell_mask,
    composite,
    distance_to,
    filled,
    mask_for,
    remaining_mask,
    repaint_mask,
    without_noise,
)


def square(height, width, top, left, side, value=1.0):
    mask = torch.zeros(1, height, width)
    mask[:, top : top + side, left : left + side] = value
    return mask


def brute_force_distance(region, limit):
    rows, columns = torch.nonzero(region, as_tuple=True)
    y, x = torch.meshgrid(*map(torch.arange, region.shape), indexing="ij")
    if not len(rows):
        return torch.full(region.shape, limit + 1.0)
    squared = (y[..., None] - rows) ** 2 + (x[..., None] - columns) ** 2
    return squared.min(dim=-1).values.sqrt().clamp(max=limit + 1)


@pytest.mark.parametrize("limit", [0, 1, 5, 60])
def test_distances_are_those_of_every_pixel_to_every_pixel(limit):
    generator = torch.Generator().manual_seed(limit)
    regions = torch.rand(4, 23, 37, generator=generator) > 0.985
    regions[3] = False
    expected = torch.stack([brute_force_distance(region, limit) for region in regions])
    assert torch.allclose(distance_to(regions, limit), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_distances_in_an_image_of_a_pixel_a_side(shape):
    region = torch.zeros(1, *shape, dtype=torch.bool)
    assert (distance_to(region, 3) == 4).all()
    region[:, 0, 0] = True
    assert distance_to(region, 3).flatten().tolist() == [
        min(distance, 4) for distance in range(max(shape))
    ]


def test_grow_is_a_disc_and_hard_masks_are_0_or_1():
    mask = torch.zeros(1, 21, 21)
    mask[0, 10, 10], mask[0, 0, 0] = 0.7, 0.4
    assert repaint_mask(mask).sum() == 1, "less than half is not painted"
    grown = repaint_mask(mask, grow=3)
    y, x = torch.meshgrid(torch.arange(21) - 10, torch.arange(21) - 10, indexing="ij")
    assert torch.equal(grown[0], ((x**2 + y**2) <= 9).float())
    assert torch.equal(repaint_mask(mask, grow=3, feather=5), grown), "feather is for soft masks"


def test_a_soft_mask_keeps_its_values_and_falls_off_around_what_is_grown():
    mask = square(1, 30, 0, 10, 5)
    mask[0, 0, 25] = 0.3
    soft = repaint_mask(mask, grow=2, feather=3, soft=True)[0, 0]
    assert soft[8:17].eq(1).all() and soft[25] == pytest.approx(0.3)
    assert soft[17:21].tolist() == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert soft[4:8].tolist() == pytest.approx([0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("top, left, side", [(8, 16, 8), (9, 16, 8), (7, 23, 1), (0, 0, 3)])
def test_cells_are_those_that_hold_a_masked_pixel(top, left, side):
    """No masked pixel is left out, and no cell without one is taken along."""
    cells = cell_mask(square(32, 48, top, left, side))
    expected = torch.zeros(1, 4, 6)
    expected[:, top // 8 : (top + side - 1) // 8 + 1, left // 8 : (left + side - 1) // 8 + 1] = 1
    assert torch.equal(cells, expected)


def test_a_soft_mask_takes_part_as_long_as_denoise_would():
    """Of eight steps, a mask of 0.5 takes part in the last four."""
    mask = torch.tensor([0.0, 0.1, 0.125, 0.5, 0.9, 1.0])
    steps = torch.stack([remaining_mask(mask, 1 - step / 8) for step in range(8)])
    assert steps.sum(dim=0).tolist() == [0, 0, 1, 4, 7, 8]
    assert set(steps.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("feather", [0, 1, 8])
@pytest.mark.parametrize("mask", [square(40, 50, 10, 15, 20), torch.rand(1, 40, 50).round()])
def test_outside_of_the_mask_every_bit_stays(feather, mask):
    original, painted = torch.rand(2, 40, 50, 3), torch.rand(2, 40, 50, 3)
    result = composite(original, painted, mask, feather)
    outside = (mask == 0).expand(2, -1, -1)
    assert torch.equal(result[outside], original[outside])
    assert (result[~outside] != original[~outside]).any()
    assert result.min() >= 0 and result.max() <= 1
    if feather == 0:
        assert torch.equal(result[~outside], painted[~outside])


def test_the_feather_lies_inside_and_rises_to_the_painted_image():
    weights = blend_weights(square(1, 40, 0, 10, 30), 4)[0, 0]
    assert weights[:10].eq(0).all() and weights[14:].eq(1).all(), "the border is no edge"
    rise = weights[10:14]
    assert (rise.diff() > 0).all() and 0 < rise[0] < rise[-1] < 1
    assert rise[1] == pytest.approx(1 - rise[2].item())


def test_any_value_above_0_counts_as_inside():
    """How much of the run a place took part in says nothing about how much of it is shown."""
    faint = square(40, 40, 8, 8, 24, value=0.1)
    assert torch.equal(blend_weights(faint, 4), blend_weights(faint.ceil(), 4))


def test_a_failed_run_leaves_the_rest_alone():
    original, failed = torch.rand(1, 16, 16, 3), torch.full((1, 16, 16, 3), float("nan"))
    mask = square(16, 16, 4, 4, 8)
    result = composite(original, failed, mask, 2)
    assert torch.equal(result[mask == 0], original[mask == 0])


def test_full_and_empty_masks():
    original, painted = torch.rand(1, 16, 16, 3), torch.rand(1, 16, 16, 3)
    assert torch.equal(composite(original, painted, torch.ones(1, 16, 16), 8), painted)
    assert torch.equal(composite(original, painted, torch.zeros(1, 16, 16), 8), original)


def test_alpha_is_kept_outside_and_full_inside():
    original, painted = torch.rand(1, 16, 16, 4) * 0.5, torch.rand(1, 16, 16, 3)
    mask = square(16, 16, 4, 4, 8)
    result = composite(original, painted, mask)
    assert torch.equal(result[mask == 0], original[mask == 0])
    assert (result[mask == 1][:, 3] == 1).all()


def test_each_image_of_a_batch_has_its_own_mask():
    original, painted = torch.rand(1, 8, 8, 3), torch.rand(2, 8, 8, 3)
    masks = torch.cat([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    result = composite(original, painted, masks)
    assert torch.equal(result[0], original[0]) and torch.equal(result[1], painted[1])
    with pytest.raises(ValueError, match="1 original"):
        composite(original, painted, torch.ones(3, 8, 8))


@pytest.mark.parametrize("how", FILLS)
def test_fill_replaces_what_is_masked_alone(how):
    image = torch.rand(1, 40, 30, 3) * 0.1
    mask = square(40, 30, 10, 10, 12)
    image[mask == 1] = torch.tensor([1.0, 0.0, 1.0])
    result = filled(image, mask, how)
    assert torch.equal(result[mask == 0], image[mask == 0])
    inside = result[mask == 1]
    if how == "original":
        assert torch.equal(result, image)
    elif how == "grey":
        assert inside.eq(0.5).all()
    else:
        assert inside.max() < 0.2, "nothing of what was there"


def test_surroundings_go_from_one_side_to_the_other():
    image = torch.zeros(1, 32, 64, 3)
    image[:, :, 32:] = 1.0
    mask = torch.zeros(1, 32, 64)
    mask[:, :, 16:48] = 1
    row = filled(image, mask, "surroundings")[0, 16, :, 0]
    assert row[17] < 0.2 and row[46] > 0.8 and (row.diff() > -0.02).all()
    everything = filled(image, torch.ones(1, 32, 64), "surroundings")
    assert torch.allclose(everything, torch.full_like(everything, 0.5))


def test_masks_are_scaled_where_the_aspect_agrees():
    image = torch.zeros(1, 100, 150, 3)
    half = square(50, 75, 0, 0, 25)
    scaled = mask_for(half, image)
    assert scaled.shape == (1, 100, 150)
    assert scaled[0, :49, :49].eq(1).all() and scaled[0, 52:].eq(0).all()
    assert mask_for(torch.ones(100, 150), image).shape == (1, 100, 150)
    assert mask_for(torch.ones(1, 1, 33, 50), image).shape == (1, 100, 150)
    assert mask_for(torch.full((1, 100, 150), 2.0), image).max() == 1


@pytest.mark.parametrize(
    "mask, count, message",
    [
        (torch.ones(1, 64, 64), 1, "mask is 64 x 64 px and the image 150 x 100.*Krea 2 Fit Image"),
        (torch.ones(3, 100, 150), 2, "3 masks for 2 images"),
        (torch.ones(100), 1, r"The mask has shape \(100,\)"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, count, message):
    with pytest.raises(ValueError, match=message):
        mask_for(mask, torch.zeros(count, 100, 150, 3))


@pytest.mark.parametrize("name", ["grow", "feather"])
@pytest.mark.parametrize("value", [-1, 1.5, 5000])
def test_bad_pixels(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        repaint_mask(torch.ones(1, 8, 8), **{name: value})


def test_bad_fill():
    with pytest.raises(ValueError, match="fill is 'noise'"):
        filled(torch.ones(1, 8, 8, 3), torch.ones(1, 8, 8), "noise")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 1, 1, 3)])
def test_what_is_nearly_0_or_1_is(shape):
    faint = torch.tensor([4.58e-5, 0.5 / 255, 8 / 255]).expand(shape)
    assert without_noise(faint).eq(0).all() and without_noise(1 - faint).eq(1).all()
    assert without_noise(faint.half()).eq(0).all() and without_noise((1 - faint).half()).eq(1).all()
    # One step of Raw's 28 is more, and stays to the bit.
    strong = torch.tensor([1 / 28, 0.5, 27 / 28]).expand(shape)
    assert torch.equal(without_noise(strong), strong)
    assert torch.equal(without_noise(without_noise(faint)), without_noise(faint))


def test_values_beyond_a_mask_s_are_its_ends():
    beyond = torch.tensor([-3.0, float("nan"), float("-inf"), 1.5, float("inf")])
    assert without_noise(beyond).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("shape", [(1, 64, 64), (5, 64, 64), (64, 64)])
def test_a_mask_that_nobody_painted_has_no_size(shape):
    empty = mask_for(torch.full(shape, 1 / 255), torch.zeros(2, 100, 150, 3))
    assert torch.equal(empty, torch.zeros(1, 100, 150))


def test_the_mask_of_a_run_has_no_noise():
    """A ramp of 100 pixels begins below what counts."""
    soft = repaint_mask(square(1, 300, 0, 0, 10), feather=100, soft=True)
    assert soft[soft > 0].min() > 8 / 255
