"""Tokens in groups, against one attention with a dense mask of all pairs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_reference import TINY, random_transformer
from krea2_model.guidance import unshifted
from krea2_model.images.region_shapes import RegionShape, RegionShapes
from krea2_model.nn import partial_attention
from krea2_model.nn.attention import attend
from krea2_model.nn.partial_attention import Partial, attend_partially, merge
from krea2_model.transformer.backend import ExtendedBackend
from krea2_model.transformer.extensions import AttentionExtensions
from krea2_model.transformer.regions import RegionPlan, RegionSettings
from krea2_model.transformer.text_attention import NegativeGuidance, TextAttention, TextStates
from krea2_model.transformer.token_groups import RegionTokens, TokenGroups
from parity import assert_close
from samples import random

# Tokens: two regions of 3 and 2, a text of 4, an image of 12, two references of 5 and 6.
LENGTHS, TEXT, IMAGE, REFERENCES = (3, 2), 4, 12, (5, 6)
FRONT = sum(LENGTHS)
SOFT = torch.tensor(
    [[1, 1, 0.5, 0, 0, 0, 0.25, 1, 0, 0, 0, 0], [0, 0, 0.3, 1, 1, 0.7, 0, 0, 0, 0, 0, 0]]
)
HARD = SOFT.round()
STRENGTHS = (1.0, 1.7)


def groups(shares, **options):
    regions = [
        RegionTokens(length, share, strength)
        for length, share, strength in zip(LENGTHS, shares, STRENGTHS, strict=True)
    ]
    return TokenGroups(IMAGE, regions, **options)


def dense_bias(shares, references=(), text_factor=1.0, separate=False, factors=()):
    """The rule of what sees what, pair by pair: (L, L), rows are queries."""
    text, first = FRONT + TEXT, FRONT + TEXT + IMAGE
    total = first + sum(references)
    bias = torch.zeros(total, total)
    owner = torch.cat((1 - shares.sum(0, keepdim=True), shares)).argmax(0)
    at = 0
    for length, share, strength in zip(LENGTHS, shares, STRENGTHS, strict=True):
        own = range(at, at + length)
        for token in own:
            bias[token, :] = -torch.inf
            bias[token, own] = 0
            bias[token, text:first] = share.log()
            bias[token, first:] = 0
        for pixel in range(IMAGE):
            bias[text + pixel, own] = (share[pixel] * strength).log()
        bias[first:, own] = -torch.inf
        at += length
    for pixel in range(IMAGE):
        covered = shares[:, pixel].sum()
        bias[text + pixel, FRONT:text] = (1 - covered * (1 - torch.tensor(text_factor))).log()
        if separate:
            bias[text + pixel, text:first][owner != owner[pixel]] = -torch.inf
        for start, count, values in factors:
            bias[text + pixel, first + start : first + start + count] = values[pixel].log()
    return bias


def heads(total, seed=1):
    return random(2, 4, total, 8, seed=seed), *(random(2, 2, total, 8, seed=s) for s in (2, 3))


def from_dense(query, key, value, bias, mask=None):
    bias = bias[None, None].clamp(min=-1e30)
    return attend(query, key, value, bias if mask is None else bias + mask)


@pytest.mark.parametrize("by_parts", [True, False])
@pytest.mark.parametrize("references", [(), REFERENCES])
@pytest.mark.parametrize(
    "options",
    [{}, {"text_factor": 0.4}, {"text_factor": 0.0}, {"separate": True}],
    ids=["plain", "weak text", "no text", "separate"],
)
@pytest.mark.parametrize("shares", [SOFT, HARD], ids=["soft", "hard"])
def test_groups_equal_a_dense_mask(shares, options, references, by_parts, monkeypatch):
    monkeypatch.setattr("krea2_model.transformer.token_groups._MASK_BYTES", 500)
    query, key, value = heads(FRONT + TEXT + IMAGE + sum(references))
    partial = attend_partially if by_parts else None
    text = FRONT + TEXT
    made = groups(shares, **options)
    found = made.attend(attend, partial, text, query, key, value, None, False)
    expected = from_dense(query, key, value, dense_bias(shares, references, **options))
    assert_close(found, expected, 1e-5, "all tokens")
    image = slice(text, text + IMAGE)
    only = made.attend(attend, partial, text, query[:, :, image], key, value, None, True)
    assert_close(only, expected[:, image], 1e-5, "image tokens")


@pytest.mark.parametrize("by_parts", [True, False])
def test_references_have_a_factor_for_each_image_query(by_parts):
    factors = random(IMAGE, seed=4).abs()
    factors[3] = 0
    query, key, value = heads(FRONT + TEXT + IMAGE + sum(REFERENCES))
    ranges = [(REFERENCES[0], REFERENCES[1], factors)]
    made = groups(SOFT).with_references(ranges, torch.device("cpu"))
    partial = attend_partially if by_parts else None
    found = made.attend(attend, partial, FRONT + TEXT, query, key, value, None, False)
    bias = dense_bias(SOFT, REFERENCES, factors=ranges)
    assert_close(found, from_dense(query, key, value, bias), 1e-5, "references")


@pytest.mark.parametrize("additive", [True, False])
def test_a_mask_of_keys_counts_too(additive):
    """Padding of a text, and the strength of a reference."""
    total = FRONT + TEXT + IMAGE + sum(REFERENCES)
    query, key, value = heads(total)
    mask = torch.ones(2, 1, 1, total, dtype=torch.bool)
    mask[1, ..., FRONT + 2 : FRONT + TEXT] = False
    values = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    if additive:
        values[..., -REFERENCES[1] :] = 0.7
    found = groups(SOFT).attend(
        attend,
        attend_partially,
        FRONT + TEXT,
        query,
        key,
        value,
        values if additive else mask,
        False,
    )
    assert_close(
        found, from_dense(query, key, value, dense_bias(SOFT, REFERENCES), values), 1e-5, "mask"
    )


def test_a_region_without_a_token_and_one_with_all_of_them():
    shares = torch.stack((torch.zeros(IMAGE), torch.ones(IMAGE)))
    query, key, value = heads(FRONT + TEXT + IMAGE)
    found = groups(shares).attend(
        attend, attend_partially, FRONT + TEXT, query, key, value, None, False
    )
    assert_close(found, from_dense(query, key, value, dense_bias(shares)), 1e-5, "all or nothing")


@pytest.mark.parametrize("masked", [False, True])
def test_parts_merge_to_the_whole(masked):
    """By torch's kernel on a CPU and by matrix products, which other devices take."""
    query, key, value = heads(30)
    mask = random(1, 1, 1, 30, seed=5) if masked else None
    expected = attend(query, key, value, mask)
    for function in (attend_partially, partial_attention._attend_in_chunks):
        parts = [
            function(query, key[:, :, at], value[:, :, at], None if mask is None else mask[..., at])
            for at in (slice(0, 7), slice(7, 30))
        ]
        assert_close(merge(*parts).out.transpose(1, 2).flatten(2), expected, 1e-5, "merged")


def test_products_in_chunks_equal_those_in_one(monkeypatch):
    query, key, value = heads(30)
    mask = random(1, 1, 30, 30, seed=5)
    whole = partial_attention._attend_in_chunks(query, key, value, mask)
    monkeypatch.setattr(partial_attention, "_SCORES", 1000)
    chunked = partial_attention._attend_in_chunks(query, key, value, mask)
    assert_close(chunked.out, whole.out, 1e-6, "chunks")
    assert_close(chunked.lse, whole.lse, 1e-6, "log-sum-exp")


@pytest.fixture(scope="module")
def model():

    return random_transformer(TINY)


def plan(model, shares=SOFT, **options):
    texts = [
        TextStates(random(1, length, model.config.hidden_size, seed=length)) for length in LENGTHS
    ]
    settings = [RegionSettings(STRENGTHS[0], end=0.5), RegionSettings(STRENGTHS[1])]
    return RegionPlan(texts, settings, lambda rows, columns: shares, **options)


def velocity(model, active, sigma=0.9, references=None, **attention):
    text = random(1, TEXT, model.config.hidden_size, seed=7)
    states, mask, before = text, None, ()
    if active is not None:
        (states, mask), before = active.join(text, None), active.texts
    backend = ExtendedBackend(
        TextAttention(before=before, **attention), groups=active and active.groups
    )
    latents = random(1, 16, 6, 8, seed=8)
    with torch.no_grad():
        return model(
            latents, torch.tensor([sigma]), states, mask, backend=backend, references=references
        )


def test_the_plan_gives_the_regions_of_a_step(model):
    regions = plan(model, separate=0.3)
    cpu = torch.device("cpu")
    early, late = regions.at(0.9, (3, 4), cpu), regions.at(0.4, (3, 4), cpu)
    assert [len(step.texts) for step in (early, late)] == [2, 1]
    assert regions.at(0.9, (3, 4), cpu) is early
    assert regions.tokens == FRONT
    off = RegionPlan([], [], lambda *grid: torch.zeros(0, 12), unshifted)
    assert off.at(0.9, (3, 4), cpu) is None


def test_regions_join_references_weights_and_a_negative(model):
    """All together through the blocks, against the same blocks with a dense mask."""
    active = plan(model).at(0.9, (3, 4), torch.device("cpu"))
    width = model.config.hidden_size
    negative = TextStates(random(1, 3, width, seed=9))
    picture = random(1, 16, 4, 6, seed=10)
    weights = torch.tensor([[1.0, 0.4, 1.0, 1.5]])
    settings = NegativeGuidance(scale=3.0, limit=1.2, blend=0.6)
    options = {"references": [picture], "weights": weights}
    found = velocity(model, active, **options, negative=negative, settings=settings)
    bias = dense_bias(SOFT, (6,))

    class Dense(AttentionExtensions):
        def attend(self, attention, partial, block, query, key, value, mask, query_slice=None):
            def dense(query, key, value, mask=None):
                rows = (
                    slice(None)
                    if query_slice is None
                    else slice(FRONT + TEXT, FRONT + TEXT + IMAGE)
                )
                return from_dense(query, key, value, bias[rows])

            inputs = (query, key, value, mask, query_slice)
            return self.text.attend(dense, *inputs, attention)

    text = random(1, TEXT, width, seed=7)
    states, _ = active.join(text, None)
    backend = ExtendedBackend()
    backend.extensions = Dense(TextAttention(weights, None, negative, settings, active.texts))
    with torch.no_grad():
        expected = model(random(1, 16, 6, 8, seed=8), torch.tensor([0.9]), states,
                         references=[picture], backend=backend)  # fmt: skip
    assert_close(found, expected, 1e-5, "all together")
    without = velocity(model, None, **options, negative=negative, settings=settings)
    assert not torch.allclose(found, without, rtol=1e-3)


def test_a_region_is_like_a_text_of_its_own_where_the_text_counts_for_nothing(model):
    """One region over the whole image, the text hidden: nearly the image of that prompt.

    The text still stands in the sequence, read by nobody in the image.
    """
    shares = torch.stack((torch.ones(IMAGE), torch.zeros(IMAGE)))
    regions = plan(model, shares, text_factor=0.0).at(0.9, (3, 4), torch.device("cpu"))
    alone = random(1, LENGTHS[0], model.config.hidden_size, seed=LENGTHS[0])
    with torch.no_grad():
        expected = model(random(1, 16, 6, 8, seed=8), torch.tensor([0.9]), alone)
    assert_close(velocity(model, regions), expected, 1e-5, "one region")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RegionSettings(11), "strength is 11; expected 0"),
        (lambda: RegionSettings(float("nan")), "strength is nan"),
        (lambda: RegionSettings(start=0.6, end=0.5), "start 0.6 and end 0.5"),
        (lambda: RegionPlan([], [], None, text_factor=-1), "factor in regions is -1"),
        (lambda: RegionPlan([], [], None, separate=2), "separate is 2"),
    ],
)
def test_bad_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


class _Largest(TorchDispatchMode):
    """The number of values of the largest tensor that is made within it."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.values = max(self.values, each.numel())
        return result


@pytest.mark.parametrize("by_parts", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_no_tensor_of_all_pairs_at_2048_px(separate, by_parts):
    """Attention of Krea 2's heads, without numbers: (L, L) is 269 million values."""
    side, text, heads, dim = 128, 128, 48, 128
    shapes = RegionShapes([RegionShape.of((n / 4, 0, 0.25, 1), soft=0.1) for n in range(3)])
    regions = [RegionTokens(32, share, 1.5) for share in shapes.shares(side, side)]
    made = TokenGroups(side**2, regions, text_factor=0.5, separate=separate).to("meta")
    query, key = (
        torch.empty(1, count, made.front + text + side**2, dim, device="meta", dtype=torch.bfloat16)
        for count in (heads, heads // 4)
    )

    def by_mask(query, key, value, mask=None):
        if mask is not None:
            assert mask.numel() < 2**25
        return torch.empty_like(query).transpose(1, 2).flatten(2)

    # A kernel that returns the log-sum-exp, as flash attention.
    def partial(query, key, value, mask=None):
        return Partial(torch.empty_like(query), query.new_empty(query.shape[:3]).float())

    with _Largest() as largest:
        made.attend(
            by_mask,
            partial if by_parts else None,
            made.front + text,
            *(query, key, key),
            None,
            False,
        )
    assert largest.values < 1.1 * query.numel() < 0.5 * query.shape[2] ** 2
