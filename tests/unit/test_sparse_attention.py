"""Sparse attention among image tokens, against a dense mask of all pairs."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffusers_reference import TINY, random_transformer
from krea2_model import (
    Krea2Pipeline,
    Krea2Transformer,
    NegativeGuidance,
    Region,
    SparseAttention,
    StyleTransfer,
    TransformerConfig,
)
from krea2_model.features.run_features import RunFeatures
from krea2_model.memory.forecast import call_operations, pair_operations
from krea2_model.memory.plan import TRANSFORMER
from krea2_model.nn.attention import attend
from krea2_model.nn.partial_attention import Partial, attend_partially
from krea2_model.transformer.backend import Backend, ExtendedBackend
from krea2_model.transformer.token_groups import RegionTokens, TokenGroups
from parity import assert_close, relative_error
from samples import picture, random

SMALL = SparseAttention(0.5, block=2, reach=1, stride=3)
GRID = 5, 7
TEXT, IMAGE, REFERENCE = 4, 35, 6
CPU, META = torch.device("cpu"), torch.device("meta")


def sees(settings, grid=GRID):
    """By its rule, pair by pair: which image token sees which."""
    found = torch.zeros(grid[0] * grid[1], grid[0] * grid[1], dtype=torch.bool)
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    first = settings.stride // 2
    for query, (row, column) in enumerate(places):
        for key, (y, x) in enumerate(places):
            near = all(
                abs(a // settings.block - b // settings.block) <= settings.reach
                for a, b in ((row, y), (column, x))
            )
            coarse = all(a % settings.stride == first for a in (y, x))
            found[query, key] = near or coarse
    return found


def heads(total):
    return random(2, 4, total, 8, seed=1), *(random(2, 2, total, 8, seed=s) for s in (2, 3))


@pytest.mark.parametrize("by_parts", [True, False])
@pytest.mark.parametrize("case", ["plain", "regions", "separate", "boost", "padded"])
@pytest.mark.parametrize("settings", [SMALL, SparseAttention(0.5, 3, 0, 2)])
def test_blocks_equal_a_dense_mask(settings, case, by_parts):
    """To 1e-5, beside regions, factors on references and a mask of keys."""
    sparse = settings.at(GRID, 0.9, CPU)
    share = torch.zeros(IMAGE)
    share[:18] = 1
    regions = [RegionTokens(3, share, 1.5)] if case in ("regions", "separate") else []
    front = 3 if regions else 0
    plain = TokenGroups(IMAGE, regions, separate=case == "separate")
    if case == "boost":
        plain = plain.with_references([(0, REFERENCE, random(IMAGE, seed=4).abs())], CPU)
    groups = plain.with_sparse(sparse)
    query, key, value = heads(front + TEXT + IMAGE + REFERENCE)
    text, mask = front + TEXT, None
    if case == "padded":
        mask = torch.ones(2, 1, 1, key.shape[2], dtype=torch.bool)
        mask[1, ..., 1] = False
    partial = attend_partially if by_parts else None
    found = groups.attend(attend, partial, text, query, key, value, mask, False)
    # Attention of the same groups without it, and a mask of all pairs on the image.
    dense = torch.zeros(query.shape[2], query.shape[2])
    image = slice(text, text + IMAGE)
    dense[image] = plain._dense(slice(0, IMAGE), text, query.shape[2], CPU)[0, 0]
    dense[image, image][~sees(settings)] = -1e30
    bias = dense if mask is None else dense + torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    expected = attend(query, key, value, bias.expand(2, 1, -1, -1))
    assert_close(found[:, image], expected[:, image], 1e-5, case)
    others = plain.attend(attend, partial, text, query, key, value, mask, False)
    rest = [n for n in range(query.shape[2]) if not text <= n < text + IMAGE]
    assert_close(found[:, rest], others[:, rest], 1e-5, "text and references see all")
    only = groups.attend(attend, partial, text, query[:, :, image], key, value, mask, True)
    assert_close(only, found[:, image], 1e-5, "image tokens alone")


def test_negatives_see_as_sparsely():
    groups = TokenGroups(IMAGE, [RegionTokens(3, torch.ones(IMAGE))])
    assert groups.without_regions() is None
    negative = groups.with_sparse(SMALL.at(GRID, 0.9, CPU)).without_regions()
    query, key, value = heads(TEXT + IMAGE)
    inputs = (attend, attend_partially, TEXT, query, key, value, None, False)
    expected = TokenGroups(IMAGE).with_sparse(SMALL.at(GRID, 0.9, CPU)).attend(*inputs)
    assert negative is not None and torch.equal(negative.attend(*inputs), expected)


class DenseBackend(Backend):
    """Plain attention with a mask of all pairs."""

    def __init__(self, text):
        self.text = text

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        seen = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool)
        seen[self.text : self.text + IMAGE, self.text : self.text + IMAGE] = sees(SMALL)
        if query_slice is not None:
            seen = seen[slice(*query_slice)]
        return super().attend(query, key, value, norm, rope, seen[None, None], query_slice)


@torch.no_grad()
def test_the_whole_model_equals_one_with_a_dense_mask():
    model = random_transformer(TINY)
    latents, time = random(1, 16, 10, 14), torch.tensor([0.9])
    text = model.fuse_text(random(1, TEXT, 12, TINY.text_hidden_dim))
    step = RunFeatures(sparse=SMALL).at(0.9, GRID, CPU)
    found = model(latents, time, text, backend=ExtendedBackend(groups=step.groups))
    expected = model(latents, time, text, backend=DenseBackend(TEXT))
    assert_close(found, expected, 1e-5, "velocity")
    assert relative_error(found, model(latents, time, text)) > 1e-3
    assert RunFeatures(sparse=SMALL).at(0.5, GRID, CPU).groups is None, "exact at the threshold"


def test_pairs_and_small_images():
    assert SMALL.pairs(GRID) == int(sees(SMALL).sum())
    assert SparseAttention().at((32, 32), 1.0, CPU) is None, "blocks beside each other see all"
    assert SparseAttention().pairs((32, 32)) == 1024**2
    assert SparseAttention(stride=1).at((64, 64), 1.0, CPU) is None
    large = SparseAttention()
    assert large.pairs((256, 256)) < 0.11 * (256 * 256) ** 2
    for grid in ((1, 200), (37, 53)):
        groups = SparseAttention(block=8).at(grid, 1.0, CPU)
        rows = torch.cat([rows for rows, _ in groups])
        assert torch.equal(rows.sort().values, torch.arange(grid[0] * grid[1]))


def test_operations_at_full_width_are_those_counted():
    """A call of two blocks at 2048 px, on meta."""
    config = replace(TransformerConfig(), num_layers=2)
    model = Krea2Transformer(config, device="meta", dtype=torch.bfloat16)
    latents = torch.empty(1, 16, 256, 256, device="meta")
    states = torch.empty(1, 128, config.hidden_size, device="meta", dtype=torch.bfloat16)
    step = RunFeatures(sparse=SparseAttention()).at(0.9, (128, 128), META)
    backend = ExtendedBackend(groups=step.groups)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(latents, torch.empty(1, device="meta"), states, backend=backend)
    tokens = 128 * 128
    saved = tokens**2 - SparseAttention().pairs((128, 128))
    whole = call_operations(config, tokens, 128)
    expected = whole - pair_operations(config, saved)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert expected < 0.8 * whole


@pytest.mark.parametrize("by_parts", [True, False])
def test_no_tensor_holds_all_pairs(by_parts):
    """Attention of Krea 2's heads at 2048 px, without numbers."""
    side, text = 128, 128
    groups = TokenGroups(side**2).with_sparse(SparseAttention().at((side, side), 1.0, META))
    query, key = (
        torch.empty(1, heads, text + side**2, 128, device=META, dtype=torch.bfloat16)
        for heads in (48, 12)
    )

    def by_mask(query, key, value, mask=None):
        return torch.empty_like(query).transpose(1, 2).flatten(2)

    # A kernel that returns the log-sum-exp, as flash attention.
    def partial(query, key, value, mask=None):
        return Partial(torch.empty_like(query), query.new_empty(query.shape[:3]).float())

    with Largest() as largest:
        groups.attend(by_mask, partial if by_parts else None, text, query, key, key, None, False)
    assert largest.values < 1.1 * query.numel() < side**4 / 2


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.values = max(self.values, each.numel())
        return result


@pytest.fixture(scope="module")
def nano():
    return Krea2Pipeline.nano()


NANO = SparseAttention(0.6, block=2, reach=1, stride=4)
RUN = {"width": 192, "height": 128, "steps": 4, "output_type": "latent"}


def test_runs_are_sparse_above_a_sigma_and_exact_below(nano):
    plain = nano("a red circle", **RUN)
    found = nano("a red circle", sparse=NANO, **RUN)
    assert relative_error(found, plain) > 0.01
    assert torch.equal(nano("a red circle", sparse=SparseAttention(1.0, 2), **RUN), plain)
    small = RUN | {"width": 64, "height": 64}
    assert torch.equal(nano("a circle", sparse=NANO, **small), nano("a circle", **small))
    seen = []
    sigmas = nano.schedule(random(1, 16, 16, 24), 4)
    nano("a red circle", sparse=NANO, callback=lambda step, *_: seen.append(step), **RUN)
    assert seen == [1, 2, 3, 4] and sigmas[2] > 0.6 > sigmas[3]


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 2.0, "negative_prompt": "blue"},
        {"negative_guidance": NegativeGuidance(), "negative_prompt": "blue"},
        {"regions": [Region("a blue star", (0, 0, 0.5, 1))]},
        {"style": StyleTransfer(picture(48, 48))},
        {"references": [picture(48, 48)]},
    ],
    ids=["guidance", "nag", "regions", "style", "references"],
)
def test_it_goes_with_other_features(nano, options):
    """A stride of 1 sees all of the image, so a larger block of it has to give the same."""
    run = RUN | {"steps": 2}
    plain, found = (
        nano("a red circle", sparse=sparse, **run, **options) for sparse in (None, NANO)
    )
    assert torch.isfinite(found).all() and relative_error(found, plain) > 1e-3
    almost = SparseAttention(0.0, block=2, reach=5, stride=64)  # all but the outermost columns
    close = nano("a red circle", sparse=almost, **run, **options)
    assert relative_error(close, plain) < relative_error(found, plain) / 3


def test_the_forecast_counts_fewer_operations(nano):
    size = {"text_tokens": 40, "steps": 8}
    plain = nano.forecast(512, 512, **size)
    found = nano.forecast(512, 512, sparse=NANO, **size)
    assert plain.operations > found.operations > 8 * found.step_operations
    assert found.activations[TRANSFORMER] >= plain.activations[TRANSFORMER]
    exact = nano.forecast(512, 512, sparse=SparseAttention(1.0), **size)
    assert exact.operations == plain.operations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"above": 1.2}, "above of sparse attention is 1.2"),
        ({"above": float("nan")}, "above of sparse attention is nan"),
        ({"block": 1}, "block of sparse attention is 1; expected a whole number from 2 to 64"),
        ({"reach": -1}, "reach of sparse attention"),
        ({"stride": 0}, "stride of sparse attention"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SparseAttention(**options)


def test_another_kind_of_argument_is_refused(nano):
    with pytest.raises(ValueError, match="sparse is"):
        nano("a red circle", sparse=0.5, **RUN)
