"""Regional prompts: shapes, words of place, and what krea2-nano paints where."""

import random

import numpy as np
import pytest
import torch

from krea2_model import Krea2Pipeline, Region, Regions
from krea2_model.images.region_shapes import RegionShape, RegionShapes
from krea2_model.region_places import place_of
from nano_training.judge import background_colour, read_thing
from nano_training.scenes import COLOURS, SHAPES

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 0.5, 1)


def shares(*shapes, grid=(4, 4)):
    return RegionShapes(shapes).shares(*grid).unflatten(1, grid)


def test_boxes_cover_exact_areas():
    found = shares(RegionShape.of((0, 0, 0.375, 1)), RegionShape.of((0.5, 0.5, 0.5, 0.5)))
    expected = torch.zeros(2, 4, 4)
    expected[0, :, 0], expected[0, :, 1] = 1.0, 0.5
    expected[1, 2:, 2:] = 1.0
    torch.testing.assert_close(found, expected)


def test_later_regions_lie_on_top_and_the_background_is_the_rest():
    background, below = RegionShape.of("background"), RegionShape.of((0, 0, 1, 0.5))
    found = shares(background, below, RegionShape.of(LEFT))
    assert found[2, :, :2].eq(1).all() and found[2, :, 2:].eq(0).all()
    assert found[1, :2, 2:].eq(1).all() and found[1, :, :2].eq(0).all()
    assert found[0, 2:, 2:].eq(1).all() and found.sum(0).eq(1).all()


def test_soft_edges_meet_half_way():
    soft = shares(RegionShape.of(LEFT, soft=0.5), grid=(8, 8))[0]
    row = soft[0]
    assert row[0] == 1 and row[-1] == 0
    torch.testing.assert_close(row + row.flip(0), torch.ones(8))
    assert (row.diff() <= 0).all() and 0 < row[3] < 1


def test_a_mask_is_averaged_over_tokens_and_has_the_image_s_aspect():
    mask = torch.zeros(64, 64)
    mask[:, :24] = 1
    found = shares(RegionShape.of(mask=mask))[0]
    torch.testing.assert_close(found, torch.tensor([1, 0.5, 0, 0]).expand(4, 4))
    with pytest.raises(ValueError, match="expected the same aspect"):
        shares(RegionShape.of(mask=torch.ones(64, 32)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Regions([]), "There are no regions; expected 1 to 8"),
        (lambda: Regions([Region("a", box=LEFT)] * 9), "There are 9 regions"),
        (lambda: Regions([Region("a", box=(0.5, 0, 0.6, 1))]), "lies outside of the image"),
        (lambda: Regions([Region("a", box=(0, 0, 0, 1))]), "box is empty"),
        (lambda: Regions([Region("a")]), "neither a box nor a mask"),
        (lambda: Regions([Region("a", box="background")] * 2), "are the background"),
        (lambda: Regions([Region("a", box=LEFT, soft=2)]), "soft edge is 2"),
        (lambda: Region("a", box=LEFT, strength=11), "strength is 11"),
        (lambda: Region("a", box=LEFT, start=0.7, end=0.3), "start 0.7 and end 0.3"),
        (lambda: Region(3, box=LEFT), "region's prompt"),
        (lambda: Region("a", box=LEFT, loras=["file"]), "expected a pair"),
        (lambda: Regions([Region("a", box=LEFT)], separate=1.5), "separate is 1.5"),
        (lambda: Regions(["a fox"]), "entry of regions"),
        (lambda: shares(RegionShape.of((0, 0, 0.01, 0.01))), "covers less than half a token"),
        (
            lambda: shares(RegionShape.of((0, 0, 0.25, 1)), RegionShape.of(LEFT)),
            "lies below others",
        ),
    ],
)
def test_bad_regions_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_places_in_words():
    for box, words in (
        (LEFT, "on the left"),
        ((0, 0.5, 1, 0.5), "at the bottom"),
        ((0.6, 0, 0.4, 0.4), "in the top right"),
        ((0.25, 0.25, 0.5, 0.5), ""),
        ("background", "in the background"),
    ):
        assert place_of(RegionShape.of(box)) == words


@pytest.fixture(scope="module")
def turbo(tokenizer_folder):
    return Krea2Pipeline.nano()


LAYOUTS = (
    (LEFT, RIGHT),
    ((0, 0, 0.5, 0.5), (0.5, 0, 0.5, 0.5), (0.25, 0.5, 0.5, 0.5)),
    ((0, 0, 1, 0.5), (0, 0.5, 1, 0.5)),
)


def cases(count):
    """Layouts with another colour and shape in each region."""
    draw = random.Random(77)
    colours = [name for name in COLOURS if name not in ("white", "black")]
    for number in range(count):
        layout = LAYOUTS[number % len(LAYOUTS)]
        yield layout, draw.sample(colours, len(layout)), draw.sample(list(SHAPES), len(layout))


def read(picture, layout, colours):
    """Of each region: colour and shape found, and the share of others' colours in it."""
    background, side = background_colour(picture), len(picture)
    palette = np.array([COLOURS[name] for name in colours]) / 255
    for number, (left, top, width, height) in enumerate(layout):
        rows, columns = (
            slice(round(first * side), round((first + length) * side))
            for first, length in ((top, height), (left, width))
        )
        part = picture[rows, columns]
        found = read_thing(part, background)
        painted = part[np.abs(part - background).max(axis=2) > 0.25]
        distances = np.square(painted[:, None] - palette).sum(axis=2)
        nearest = distances.argmin(axis=1)[distances.min(axis=1) < 0.06]
        bleeding = float(np.mean(nearest != number)) if len(nearest) else 0.0
        yield found and found.colour, found and found.shape, bleeding


def test_colour_and_shape_are_where_they_were_asked_for(turbo):
    """Of 40 such cases 35 were right, all with two regions; these are the first 15."""
    right, bleeding = [], []
    for number, (layout, colours, shapes) in enumerate(cases(15)):
        regions = [
            Region(f"a {colour} {shape}", box=box)
            for box, colour, shape in zip(layout, colours, shapes, strict=True)
        ]
        picture = turbo("", seed=500 + number, regions=regions, output_type="np")[0]
        found = list(read(picture, layout, colours))
        wanted = list(zip(colours, shapes, strict=True))
        right.append([(colour, shape) for colour, shape, _ in found] == wanted)
        bleeding.append(np.mean([share for *_, share in found]))
    assert np.mean(right) >= 0.8, np.mean(right)
    assert np.mean(bleeding) < 0.05, np.mean(bleeding)


def test_a_lora_in_a_region_leaves_the_rest_of_the_picture(turbo):
    """krea2-nano's notebook LoRA, on one side alone."""
    from krea2_model import nano

    def paint(*loras):
        regions = [Region("a red circle", LEFT, loras=loras), Region("a blue star", RIGHT)]
        return turbo("", seed=3, regions=regions, output_type="np")[0] * 255

    plain, with_lora = paint(), paint((nano.LORA, 1.0))
    half = plain.shape[1] // 2
    change = np.abs(with_lora - plain).mean(axis=(0, 2))
    assert change[:half].mean() > 10
    # A token of the border is left out.
    assert change[half + 16 :].mean() < 2
