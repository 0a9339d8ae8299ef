"""Style mixes: averages of prompts that see an image each."""

import pytest
import torch

from krea2_model.text.style_mix import mix_styles, shares_of
from parity import assert_close


def states(seed, tokens):
    return torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(seed))


TEXT, SEEN, IMAGES = states(0, 3), [states(1, 8), states(2, 8)], slice(1, 4)


def test_the_formula():
    mixed = mix_styles(TEXT, SEEN, IMAGES, [0.25, 0.75], 0.6, 0.5)
    words = TEXT + 0.6 * sum(
        share * (seen[:, 5:] - TEXT) for share, seen in zip((0.25, 0.75), SEEN, strict=True)
    )
    assert_close(mixed[:, 5:], words, 1e-6, "words")
    front = 0.25 * SEEN[0][:, :5] + 0.75 * SEEN[1][:, :5]
    front[:, 1:4] = (front[:, 1:4] + front[:, 1:4].mean(dim=1, keepdim=True)) / 2
    assert_close(mixed[:, :5], front, 1e-6, "what stands in front")


def test_strength_0_is_the_text_itself():
    assert mix_styles(TEXT, SEEN, IMAGES, [0.5, 0.5], 0.0) is TEXT


def test_one_image_at_strength_1_is_what_it_was():
    assert torch.equal(mix_styles(TEXT, SEEN[:1], IMAGES, [1.0]), SEEN[0])


def test_shares():
    assert shares_of([3, 1]) == [0.75, 0.25]
    assert shares_of([0, 2]) == [0, 1]
    for weights in ([0, 0], [-1, 2], [float("nan")], [float("inf")], []):
        with pytest.raises(ValueError, match="expected"):
            shares_of(weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"strength": -1},
        {"strength": float("nan")},
        {"suppression": 2},
        {"shares": [1.0]},
        {"with_image": [states(1, 8), states(2, 9)]},
        {"with_image": [states(1, 2)] * 2},
    ],
)
def test_bad_values_are_refused(changes):
    given = {"text": TEXT, "with_image": SEEN, "images": IMAGES, "shares": [0.5, 0.5]}
    with pytest.raises(ValueError, match="expected"):
        mix_styles(**(given | changes))
