"""Sizes from aspect ratios."""

import pytest

from krea2_model.images.sizes import ASPECTS, image_tokens, round_size, size_for_aspect


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("megapixels", [0.25, 1.0, 2.0, 4.0])
def test_sizes_are_near_what_is_asked(aspect, megapixels):
    width, height = size_for_aspect(aspect, megapixels)
    across, down = map(int, aspect.split(":"))
    assert width % 16 == height % 16 == 0
    assert width / height == pytest.approx(across / down, rel=0.06)
    assert width * height == pytest.approx(megapixels * 1024**2, rel=0.06)


def test_known_sizes():
    assert size_for_aspect("1:1", 1.0) == (1024, 1024)
    assert size_for_aspect("1:1", 4.0) == (2048, 2048)
    assert size_for_aspect("16:9", 1.0) == (1360, 768)
    assert image_tokens(1024, 1024) == 4096
    assert [round_size("width", side) for side in (1, 16, 17)] == [16, 16, 32]


@pytest.mark.parametrize("megapixels", [0, -1, float("nan"), float("inf"), 10_000])
def test_bad_areas(megapixels):
    with pytest.raises(ValueError, match="megapixels"):
        size_for_aspect("1:1", megapixels)
