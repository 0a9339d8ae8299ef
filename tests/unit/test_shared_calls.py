"""Guidance in one call: the same velocity as in two, and half of the calls."""

import pytest
import torch

import tiny_checkpoints as tiny
from krea2_model import Krea2Transformer
from krea2_model.sampling import denoise
from krea2_model.schedule import sigma_schedule
from krea2_model.transformer.references import Reference, ReferenceSettings
from krea2_model.transformer.shared_calls import SMALL_IMAGE, pays_to_share
from krea2_model.transformer.text_attention import TextStates
from parity import assert_close


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = Krea2Transformer(tiny.TRANSFORMER).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def calls(transformer, monkeypatch):
    """The batch and tokens of each call of the blocks."""
    found = []
    handle = transformer.blocks[0].register_forward_pre_hook(
        lambda block, arguments: found.append(tuple(arguments[0].shape[:2]))
    )
    yield found
    handle.remove()


def text(transformer, tokens, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, transformer.config.hidden_size, generator=generator)


def run(transformer, positive, negative, **options):
    noise = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(1))
    steps = denoise(
        transformer, noise, positive, negative, sigmas=sigma_schedule(2, 1.0), guidance=1.0,
        **options,
    )  # fmt: skip
    return list(steps)[-1][1]


def reference(batch, strength=1.0):
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(batch, 16, 4, 4, generator=generator)
    return Reference(latents, ReferenceSettings(strength=strength))


MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
CASES = {
    "one length": (7, None, 7, None, {}),
    "a shorter negative": (7, None, 3, None, {}),
    "a longer negative": (3, None, 9, None, {}),
    "a mask": (7, MASK, 3, None, {}),
    "two masks": (7, MASK, 7, MASK.flip(0), {}),
    "references": (7, None, 3, None, {"references": [reference(2, 0.5), reference(2)]}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_call_gives_what_two_give(transformer, calls, case):
    tokens, mask, others, other_mask, options = CASES[case]
    positive = TextStates(text(transformer, tokens), mask)
    negative = TextStates(text(transformer, others, seed=2), other_mask)
    expected = run(transformer, positive, negative, **options)
    assert [batch for batch, _ in calls] == [2] * 4
    calls.clear()
    found = run(transformer, positive, negative, share_calls=True, **options)
    assert [batch for batch, _ in calls] == [4] * 2
    assert_close(found, expected, 1e-6, f"one call with {case}")


def test_calls_of_other_attention_stay_apart(transformer, calls):
    positive, negative = text(transformer, 7), text(transformer, 7, seed=2)
    weighted = TextStates(positive, weights=torch.full((2, 7), 1.5))
    for options in ({}, {"references": [reference(1)], "cache_references": True}):
        first = weighted if not options else positive
        expected = run(transformer, first, negative, **options)
        assert torch.equal(run(transformer, first, negative, share_calls=True, **options), expected)
    assert {batch for batch, tokens in calls if tokens > 10} == {2}


def test_when_sharing_pays():
    assert pays_to_share(4096, [12, 12], streams=False)
    assert not pays_to_share(4096, [12, 11], streams=False)
    assert pays_to_share(4096, [12, 11], streams=True)
    assert pays_to_share(SMALL_IMAGE, [12, 11], streams=False)
    assert not pays_to_share(SMALL_IMAGE + 1, [12, 11], streams=False)
