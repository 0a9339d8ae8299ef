"""Boosts of references and their places, against dense masks and the formula."""

import functools
from itertools import product

import pytest
import torch

from diffusers_reference import TINY, random_transformer
from krea2_model.features.run_features import RunFeatures
from krea2_model.nn.attention import attend
from krea2_model.sampling import denoise
from krea2_model.transformer.backend import ExtendedBackend
from krea2_model.transformer.extensions import AttentionExtensions
from krea2_model.transformer.model import grid_positions
from krea2_model.transformer.references import (
    BoostMask,
    Reference,
    ReferenceSettings,
    boost_factors,
)
from krea2_model.transformer.regions import RegionPlan, RegionSettings
from krea2_model.transformer.text_attention import NegativeGuidance, TextAttention, TextStates
from parity import assert_close, relative_error
from samples import random

# Tokens: a region's text of 3, a text of 4, an image of 3 x 4; references of 6 and 8.
REGION, TEXT, ROWS, COLUMNS = 3, 4, 3, 4
IMAGE = ROWS * COLUMNS
COUNTS = (6, 8)
SHARE = torch.tensor([1, 1, 0.5, 0, 0, 0, 0.25, 1, 0, 0, 0, 0])
MASK = torch.tensor([[1.0, 0.5, 0, 0], [1, 1, 0.25, 0], [0, 0, 0, 0]])
CPU = torch.device("cpu")
TIME = 0.9


@pytest.fixture(scope="module")
def model():
    return random_transformer(TINY)


def references(boosts=(3.0, 0.4), mask=MASK, strength=1.0):
    """Two references, the second with its boost in a part of the image."""
    masks = (None, None if mask is None else BoostMask(mask))
    settings = (ReferenceSettings(None, strength, boost=b, boost_mask=m)
                for b, m in zip(boosts, masks, strict=True))  # fmt: skip
    latents = (random(1, 16, 4, 6, seed=10), random(1, 16, 8, 4, seed=11))
    return [Reference(*each) for each in zip(latents, settings, strict=True)]


class DenseExtensions(AttentionExtensions):
    """The same by one attention with a bias for every pair of tokens.

    factors: (IMAGE,) of each reference. regions: the share of a region whose text is first.
    """

    def __init__(self, factors, share, *given):
        super().__init__(*given)
        self.factors, self.share = factors, share

    def bias(self, text, share, total):
        bias, image = torch.zeros(total, total), slice(text, text + IMAGE)
        if share is not None:
            own = slice(0, REGION)
            bias[own] = -torch.inf
            bias[own, own] = 0
            bias[own, image] = share.log()
            bias[own, image.stop :] = 0
            bias[image, own] = share.log()[:, None]
            bias[image.stop :, own] = -torch.inf
        first = image.stop
        for count, factors in zip(COUNTS, self.factors, strict=True):
            bias[image, first : first + count] = factors.log()[:, None]
            first += count
        return bias.clamp(min=-1e30)

    def attend(self, attention, partial, block, query, key, value, mask, query_slice=None):
        def dense(text, share):
            def attend_all(query, key, value, mask=None):
                bias = self.bias(text, share, key.shape[2])
                rows = slice(text, text + IMAGE) if query_slice else slice(0, query.shape[2])
                bias = bias[rows][None, None]
                return attend(query, key, value, bias if mask is None else bias + mask)

            if self.references is None:
                return attend_all
            return functools.partial(self.references.attend, attend_all, block)

        both = dense(self._text_tokens, self.share), dense(self.front, None)
        return self.text.attend(both[0], query, key, value, mask, query_slice, both[1])


@pytest.mark.parametrize(
    ("region", "nag", "cached", "strength"), [*product((False, True), (False, True), (False, True),
                                                       (1.0, 1.6))],
)  # fmt: skip
def test_boosts_equal_a_dense_mask(model, region, nag, cached, strength):
    """Alone, and with a region, a negative (NAG), cached references and strengths."""
    width, given = model.config.hidden_size, references(strength=strength)
    regions = None
    if region:
        text = TextStates(random(1, REGION, width, seed=3))
        regions = RegionPlan([text], [RegionSettings()], lambda rows, columns: SHARE[None])
    step = RunFeatures(regions).at(TIME, (ROWS, COLUMNS), CPU).with_references(given)
    weights = torch.tensor([[1.0, 0.4, 1.0, 1.5]])
    negative = TextStates(random(1, 5, width, seed=9)) if nag else None
    settings = NegativeGuidance(scale=3.0, limit=1.2, blend=0.6) if nag else None
    text = TextAttention(weights, None, negative, settings, step.texts)
    states, _ = step.join(random(1, TEXT, width, seed=7), None)
    cache = model.cache_references(given, states.dtype) if cached else None

    def velocity(extensions):
        backend = ExtendedBackend()
        backend.extensions = extensions
        return model(
            random(1, 16, 6, 8, seed=8), torch.tensor([TIME]), states, backend=backend,
            references=None if cached else given,
        )  # fmt: skip

    factors = torch.full((IMAGE,), 3.0), 1 + MASK.flatten() * (0.4 - 1)
    dense = DenseExtensions(factors, SHARE if region else None, text, cache)
    found = velocity(AttentionExtensions(text, cache, step.groups))
    assert_close(found, velocity(dense), 1e-5, "boosts")
    without = AttentionExtensions(text, cache, None if regions is None else step.regions.groups)
    assert relative_error(found, velocity(without)) > 1e-3


def test_a_boost_acts_on_the_image_s_queries_alone(model):
    """So it is less than a strength, which all queries have; without either they agree."""
    text = random(1, TEXT, model.config.hidden_size, seed=7)

    def run(*given):
        options = {"sigmas": [1.0, 0.5, 0.0], "guidance": 1.0, "share_calls": True}
        steps = denoise(model, random(1, 16, 6, 8, seed=8), text, 0.3 * text,
                        references=given, **options)  # fmt: skip
        return list(steps)[-1][1]

    picture = random(1, 16, 4, 6, seed=10)
    plain, strong, boosted = (
        run(Reference(picture, ReferenceSettings(**given)))
        for given in ({}, {"strength": 4.0}, {"boost": 4.0})
    )
    assert relative_error(boosted, plain) > 1e-3
    assert relative_error(boosted, strong) > 1e-3
    none = BoostMask(torch.zeros(6, 8))
    masked = Reference(picture, ReferenceSettings(boost=4.0, boost_mask=none))
    # The two texts of a step no longer share a call, which rounds otherwise.
    assert_close(run(masked), plain, 1e-5, "a boost nowhere")


def test_factors_of_a_boost():
    """In the mean of the mask under each token, and from the first token after the image on."""
    mask = torch.zeros(48, 64)
    mask[:16, :24] = 1.0
    first, second = (reference.latents for reference in references())
    given = [
        Reference(first),
        Reference(second, ReferenceSettings(boost=3.0, boost_mask=BoostMask(mask))),
    ]
    ((at, count, factors),) = boost_factors(given, ROWS, COLUMNS)
    assert (at, count) == COUNTS
    expected = torch.tensor([[3.0, 2.0, 1.0, 1.0], [1.0] * 4, [1.0] * 4])
    assert torch.allclose(factors.reshape(ROWS, COLUMNS), expected)


def test_positions_with_an_offset():
    found = grid_positions([(0, 2, 3), (2, 2, 1, 0.5, 1.5)])
    expected = [[0, row, column] for row in range(2) for column in range(3)]
    assert found.tolist() == [*expected, [2, 0.5, 1.5], [2, 1.5, 1.5]]
    assert torch.equal(grid_positions([(1, 2, 3, 0.0, 0.0)]), grid_positions([(1, 2, 3)]))


@pytest.mark.parametrize("cached", [False, True])
def test_an_offset_moves_a_reference(model, cached):
    """A shift of all images along one axis changes nothing: positions are relative.

    So a reference shifted by half a token equals the plain one beside an image shifted back.
    """
    text = random(1, TEXT, model.config.hidden_size, seed=7)
    picture, latents = random(1, 16, 4, 6, seed=10), random(1, 16, 6, 8, seed=8)

    def velocity(offset, positions=None):
        given, backend = [Reference(picture, ReferenceSettings(offset=offset))], ExtendedBackend()
        if cached:
            backend = ExtendedBackend(None, model.cache_references(given, text.dtype))
            given = None
        if positions is not None:
            prepare = backend.prepare_tokens

            def moved(text, image, text_positions, image_positions):
                out = prepare(text, image, text_positions, image_positions)
                shift = torch.tensor([0.0, *positions])
                image = image_positions.clone()
                image[:, :IMAGE] -= shift
                return *out[:2], text_positions - shift, image

            backend.prepare_tokens = moved
        return model(latents, torch.tensor([TIME]), text, references=given, backend=backend)

    found = velocity((0.5, 1.25))
    assert_close(found, velocity((0.0, 0.0), (0.5, 1.25)), 1e-4, "an offset")
    assert relative_error(found, velocity((0.0, 0.0))) > 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offset": (1.0,)}, "offset is"),
        ({"offset": (float("nan"), 0.0)}, "offset is"),
        ({"boost": -1.0}, "boost is -1"),
        ({"boost": float("inf")}, "boost is inf"),
        ({"boost_mask": torch.ones(2, 2)}, "BoostMask"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ReferenceSettings(**settings)
    with pytest.raises(ValueError, match=r"\(height, width\)"):
        BoostMask(torch.ones(1, 2, 2))
