"""Shapes of regions: the share of each in the image's tokens."""

import pytest
import torch

from krea2_model.images.region_shapes import Box, RegionShape, RegionShapes


def box(*values, soft=0.0):
    return RegionShape.of(values, soft=soft)


def rasterised(shape: RegionShape, side: int = 480) -> torch.Tensor:
    """A box by points: those inside of it, then an average over a window as wide as its edge."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    left, top, width, height = shape.box

    def along(first, size):
        # Past the image's border a box goes on, so that the border is no edge.
        first, last = (-9 if first == 0 else first), (9 if first + size == 1 else first + size)
        if shape.soft == 0:
            return ((at > first) & (at < last)).double()
        offsets = (torch.arange(side) + 0.5) / side * shape.soft - shape.soft / 2
        points = at[:, None] + offsets
        return ((points > first) & (points < last)).double().mean(dim=1)

    return along(top, height)[:, None] * along(left, width)


def averaged(cells: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    height, width = cells.shape
    parts = cells.reshape(rows, height // rows, columns, width // columns)
    return parts.mean(dim=(1, 3)).float()


@pytest.mark.parametrize("soft", [0.0, 0.1])
@pytest.mark.parametrize("values", [(0.13, 0.21, 0.4, 0.33), (0, 0.5, 1, 0.5), (0, 0, 1, 1)])
def test_the_share_of_a_box_is_the_area_that_it_covers(values, soft):
    shape = box(*values, soft=soft)
    found = RegionShapes([shape]).shares(8, 8).view(8, 8)
    torch.testing.assert_close(found, averaged(rasterised(shape), 8, 8), atol=1e-2, rtol=0)


def test_later_regions_lie_on_top_and_the_background_is_the_rest():
    lower, upper = box(0, 0, 0.6, 1, soft=0.2), box(0.4, 0.25, 0.4, 0.5, soft=0.1)
    shapes = RegionShapes([RegionShape.of("background"), lower, upper])
    rest, below, above = shapes.shares(12, 12).view(3, 12, 12)
    # On 480 points, where the product of two edges is the product of their areas.
    one, two = rasterised(lower), rasterised(upper)
    torch.testing.assert_close(above, averaged(two, 12, 12), atol=1e-2, rtol=0)
    torch.testing.assert_close(below, averaged(one * (1 - two), 12, 12), atol=1.5e-2, rtol=0)
    torch.testing.assert_close(rest, 1 - above - below, atol=1e-3, rtol=0)
    assert RegionShapes([lower, upper]).shares(12, 12).sum(0).max() <= 1 + 1e-6


def test_a_mask_counts_by_its_area_at_any_size():
    mask = torch.zeros(90, 150)
    mask[:, 15:60], mask[45:, 60:150] = 1.0, 0.5
    found = RegionShapes([RegionShape.of(mask=mask)]).shares(6, 10).view(6, 10)
    torch.testing.assert_close(found, averaged(mask.double(), 6, 10), atol=1e-3, rtol=0)
    # No divisor of its sides.
    found = RegionShapes([RegionShape.of(mask=mask)]).shares(7, 11).view(7, 11)
    assert abs(found.mean() - mask.mean()) < 1e-4
    # A mask of a box is the box, with a soft edge too.
    mask = torch.zeros(100, 100)
    mask[:, :30] = 1
    soft = RegionShapes([RegionShape.of(mask=mask, soft=0.1)]).shares(6, 6)
    expected = RegionShapes([box(0, 0, 0.3, 1, soft=0.1)]).shares(6, 6)
    torch.testing.assert_close(soft, expected, atol=5e-3, rtol=0)


def test_soft_edges_are_as_wide_on_both_sides_of_an_oblong_image():
    shares = RegionShapes([box(0, 0, 0.5, 0.5, soft=0.25)]).shares(8, 16).view(8, 16)
    # Two tokens wide, across and down.
    assert torch.equal(shares[0] > 0, torch.arange(16) < 9)
    assert torch.equal(shares[:, 0] > 0, torch.arange(8) < 5)
    assert torch.equal(shares[0] == 1, torch.arange(16) < 7)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([], "no regions; expected 1 to 8"),
        ([box(0, 0, 1, 1)] * 9, "9 regions; expected 1 to 8"),
        ([RegionShape.of("background")] * 2, "Regions 1 and 2 are the background"),
        ([box(0, 0, 1, 1), box(0.5, 0.5, 0.02, 0.02)], "Region 2 covers less than half a token"),
        ([box(0.2, 0.2, 0.2, 0.2), box(0, 0, 1, 1)], "Region 1 lies below others"),
        ([box(0, 0, 1, 1), RegionShape.of("background")], "Region 2 is the background and has no"),
        ([RegionShape.of(mask=torch.ones(20, 60))], "Region 1's mask is 60 x 20 px and the image"),
    ],
)
def test_what_has_no_place_is_refused_by_name(shapes, words):
    with pytest.raises(ValueError, match=words):
        RegionShapes(shapes).shares(8, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Box.of((0, 0, 1)), r"box is \[0.0, 0.0, 1.0\]; expected four"),
        (lambda: Box.of("left"), "box is 'left'; expected four fractions"),
        (lambda: Box.of((0, 0, 0, 1)), "is empty"),
        (lambda: Box.of((0, 0, float("nan"), 1)), "is empty"),
        (lambda: Box.of((0.6, 0, 0.5, 1)), "lies outside of the image"),
        (lambda: Box.of((-0.1, 0, 0.5, 1)), "lies outside of the image"),
        (lambda: box(0, 0, 1, 1, soft=2), "soft edge is 2; expected 0"),
        (lambda: RegionShape.of(), "neither a box nor a mask"),
        (lambda: RegionShape.of((0, 0, 1, 1), torch.ones(4, 4)), "both a box and a mask"),
        (lambda: RegionShape.of(mask=torch.zeros(4, 4)), "mask is empty"),
        (lambda: RegionShape.of(mask=torch.zeros(1, 4, 4)), "expected .height, width."),
    ],
)
def test_bad_shapes_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_rounded_fractions_are_inside():
    assert Box.of((0.3334, 0, 0.667, 1)).width == pytest.approx(0.6666)
