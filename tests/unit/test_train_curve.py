"""Curves of a run's numbers, drawn without a library of plots."""

import numpy as np

from krea2_training.engine.curve import draw_curves, moving_means

BLUE = (31, 111, 180)


def heights(image, left, right):
    """Rows of the mean's line between two columns."""
    pixels = np.asarray(image)[:, left:right]
    return np.nonzero((pixels == BLUE).all(axis=-1))[0]


def test_a_falling_number_falls_from_left_to_right():
    image = draw_curves({"loss": [(step, 2.0 / step) for step in range(1, 101)]}, steps=200)
    first, last = heights(image, 80, 100), heights(image, 320, 340)
    assert first.mean() < last.mean() - 50
    assert not len(heights(image, 370, 620)), "the run is half over"


def test_a_panel_for_each_number():
    points = [(1, 1.0), (2, 0.0), (3, -1.0)]
    one, two = draw_curves({"loss": points}), draw_curves({"loss": points, "other": points})
    assert two.height == 2 * one.height
    assert np.array_equal(np.asarray(two)[50 : one.height], np.asarray(one)[50:])
    draw_curves({"one step": [(1, 0.5)], "constant": [(1, 0.5), (2, 0.5)]})


def test_means_are_of_what_was_until_then():
    numbers = [float(number) for number in range(30)]
    means = moving_means(numbers)
    assert means[:3] == [0.0, 0.5, 1.0] and means[-1] == sum(numbers[10:]) / 20
