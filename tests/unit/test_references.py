"""References: strength, place, window, and those that see themselves alone."""

import pytest
import torch

from diffusers_reference import TINY, load_from
from krea2_model.nn.attention import attend
from krea2_model.nn.kernels import norm_and_rotate
from krea2_model.sampling import denoise
from krea2_model.schedule import sigma_schedule
from krea2_model.transformer import references as references_module
from krea2_model.transformer.backend import Backend, ExtendedBackend
from krea2_model.transformer.model import Krea2Transformer
from krea2_model.transformer.references import Reference, ReferenceSettings
from krea2_model.transformer.text_attention import NegativeGuidance, TextAttention, TextStates
from parity import assert_close, relative_error


def referring(latents, *settings, **options):
    return Reference(latents, ReferenceSettings(*settings, **options))


@pytest.fixture(scope="module")
def transformer(reference_transformer):
    model = Krea2Transformer(TINY)
    load_from(model, reference_transformer)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pictures():
    """Two references of different size."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 16, *size, generator=generator) for size in ((4, 6), (8, 4))]


@pytest.fixture(scope="module")
def text(transformer):
    taps = torch.randn(1, 5, 12, 80, generator=torch.Generator().manual_seed(3))
    return transformer.fuse_text(taps)


TIME = torch.tensor([0.6])


def test_strength_1_is_a_plain_reference(transformer, latents, pictures, text):
    plain = transformer(latents, TIME, text, references=pictures)
    given = [Reference(picture) for picture in pictures]
    assert torch.equal(plain, transformer(latents, TIME, text, references=given))


def test_one_reference_is_seen_by_all_images_of_a_batch(transformer, latents, pictures, text):
    both = torch.cat((latents, latents.flip(-1)))
    together = transformer(both, TIME.repeat(2), text.repeat(2, 1, 1), references=pictures)
    for one, expected in zip(both.split(1), together.split(1), strict=True):
        assert_close(transformer(one, TIME, text, references=pictures), expected, 1e-5, "velocity")


def test_strength_0_is_no_reference(transformer, latents, pictures, text):
    none = transformer(latents, TIME, text)
    given = [referring(picture, strength=0) for picture in pictures]
    assert torch.equal(none, transformer(latents, TIME, text, references=given))
    # The second keeps its place when the first is left out.
    left = transformer(latents, TIME, text, references=[given[0], Reference(pictures[1])])
    alone = transformer(latents, TIME, text, references=[referring(pictures[1], index=2)])
    assert torch.equal(left, alone)


@pytest.mark.parametrize("method", ["index_timestep_zero", "index"])
def test_strength_counts_like_copies(transformer, latents, pictures, text, method):
    """Three times the strength is three copies at one place: what is scored is shared out."""

    def velocity(*references):
        return transformer(latents, TIME, text, references=references, reference_method=method)

    first, second = pictures
    copies = velocity(*[referring(first, 1)] * 3, referring(second, 2))
    strong = velocity(referring(first, 1, 3.0), referring(second, 2))
    assert_close(strong, copies, 1e-5, "strength 3 against three copies")
    assert relative_error(strong, velocity(*pictures)) > 1e-3


def test_strength_beside_masked_text(transformer, latents, pictures, text):
    padded = torch.cat((torch.randn(1, 2, text.shape[2]), text), dim=1)
    mask = torch.tensor([[False] * 2 + [True] * text.shape[1]])
    given = [referring(picture, strength=0.4) for picture in pictures]
    expected = transformer(latents, TIME, text, references=given)
    found = transformer(latents, TIME, padded, mask, references=given)
    assert_close(found, expected, 1e-5, "strength with a text mask")


@pytest.mark.parametrize("masked", [False, True])
def test_strength_beside_a_negative(transformer, latents, pictures, text, masked):
    """The negative's tokens stand in front, where the bias has to make room for them."""
    states = torch.randn(1, 4, text.shape[2], generator=torch.Generator().manual_seed(4))
    own = torch.tensor([[True, True, False, True]]) if masked else None

    def velocity(references):
        attention = TextAttention(None, None, TextStates(states, own), NegativeGuidance())
        backend = ExtendedBackend(attention)
        return transformer(latents, TIME, text, references=references, backend=backend)

    first, second = pictures
    copies = velocity([referring(first, 1)] * 2 + [referring(second, 2)])
    strong = velocity([referring(first, 1, 2.0), referring(second, 2)])
    assert_close(strong, copies, 1e-5, "strength beside a negative")


def test_the_index_is_a_place(transformer, latents, pictures, text):
    def velocity(index):
        return transformer(latents, TIME, text, references=[referring(pictures[0], index)])

    assert torch.equal(velocity(None), velocity(1))
    assert relative_error(velocity(7), velocity(1)) > 1e-4


class Apart(Backend):
    """References that see themselves alone, by a mask for every pair of tokens."""

    def __init__(self, before: int, counts: list[int]):
        total = before + sum(counts)
        self.mask, first = torch.ones(total, total, dtype=torch.bool), before
        for count in counts:
            own = slice(first, first + count)
            self.mask[own] = False
            self.mask[own, own] = True
            first += count

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        rows = self.mask if query_slice is None else self.mask[slice(*query_slice)]
        return attend(query, key, value, rows[None, None])


def test_apart_is_a_mask_and_read_once(transformer, latents, pictures, text):
    """At every time: what is cached does not depend on it."""
    recorded = transformer.cache_references(pictures, text.dtype)
    counts = [picture.shape[-2] * picture.shape[-1] // 4 for picture in pictures]
    image_tokens = latents.shape[-2] * latents.shape[-1] // 4
    for time in (0.9, 0.2):
        time = torch.tensor([time])
        backend = Apart(text.shape[1] + image_tokens, counts)
        expected = transformer(latents, time, text, references=pictures, backend=backend)
        found = transformer(latents, time, text, backend=ExtendedBackend(None, recorded))
        assert_close(found, expected, 1e-5, f"references apart at {time.item():.1f}")
        exact = transformer(latents, time, text, references=pictures)
        assert relative_error(found, exact) > 1e-3, "it is not exact"


def test_strength_of_what_is_kept(transformer, latents, pictures, text):
    def velocity(*references):
        recorded = transformer.cache_references(references, text.dtype)
        return transformer(latents, TIME, text, backend=ExtendedBackend(None, recorded))

    strong = velocity(referring(pictures[0], 1, 2.0))
    assert_close(
        strong,
        velocity(*[referring(pictures[0], 1)] * 2),
        1e-5,
        "strength apart",
    )


def test_the_bias_of_what_is_kept_is_made_once_a_call(
    transformer, latents, pictures, text, monkeypatch
):
    made, add_strength_bias = [], references_module.add_strength_bias
    monkeypatch.setattr(
        references_module,
        "add_strength_bias",
        lambda *given: made.append(given) or add_strength_bias(*given),
    )
    recorded = transformer.cache_references([referring(pictures[0], strength=2.0)], text.dtype)
    mask = torch.ones(1, text.shape[1], dtype=torch.bool)
    for own, calls in ((None, 1), (mask, 2), (mask, 3)):
        transformer(latents, TIME, text, own, backend=ExtendedBackend(None, recorded))
        assert len(transformer.blocks) > 1 and len(made) == calls


def test_what_is_kept_beside_masked_text(transformer, latents, pictures, text):
    padded = torch.cat((torch.randn(1, 2, text.shape[2]), text), dim=1)
    mask = torch.tensor([[False] * 2 + [True] * text.shape[1]])
    for strength in (1.0, 0.4):
        recorded = transformer.cache_references(
            [referring(pictures[0], strength=strength)], text.dtype
        )
        expected = transformer(latents, TIME, text, backend=ExtendedBackend(None, recorded))
        found = transformer(latents, TIME, padded, mask, backend=ExtendedBackend(None, recorded))
        assert_close(found, expected, 1e-5, f"apart with a text mask, strength {strength}")


def test_denoise_looks_at_references_in_their_window(transformer, latents, pictures, text):
    """Step by step against the model itself."""
    sigmas = sigma_schedule(4, 0.5)
    first = referring(pictures[0], end=0.5)
    second = referring(pictures[1], strength=2.0, start=0.25)
    options = {"sigmas": sigmas, "guidance": 0.0, "reference_method": "index"}
    run = denoise(transformer, latents, text, references=[first, second], **options)
    expected = latents
    there = [[0], [0, 1], [1], [1]]
    placed = [
        referring(pictures[0], 1),
        referring(pictures[1], 2, 2.0),
    ]
    for (_, found, _), seen, now, then in zip(run, there, sigmas, sigmas[1:], strict=False):
        velocity = transformer(
            expected,
            torch.tensor([now]),
            text,
            references=[placed[at] for at in seen],
            reference_method="index",
        )
        expected = expected + (then - now) * velocity
        assert_close(found, expected, 1e-5, f"a step that sees {seen}")


def test_denoise_with_references_apart(transformer, latents, pictures, text):
    """With guidance: positive and negative read the same, and it is read twice in all."""
    calls, blocks = [], transformer.blocks[0].forward
    transformer.blocks[0].forward = lambda *a, **k: calls.append(len(a[0][0])) or blocks(*a, **k)
    options = {"sigmas": sigma_schedule(3, 0.5), "guidance": 2.0, "cache_references": True}
    references = [referring(pictures[0], end=0.5), Reference(pictures[1])]
    list(denoise(transformer, latents, text, text, references=references, **options))
    del transformer.blocks[0].forward
    image = text.shape[1] + 12
    # Both for the first two of three steps, the second alone for the last one.
    assert calls == [6, 8, image, image, image, image, 8, image, image]


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -1},
        {"strength": float("nan")},
        {"index": 0},
        {"index": 300},
        {"start": 0.6, "end": 0.5},
        {"end": 1.5},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        Reference(torch.zeros(1, 16, 4, 4), ReferenceSettings(**settings))


def test_apart_needs_time_zero(transformer, latents, pictures, text):
    options = {"sigmas": [1.0, 0.0], "guidance": 0.0, "reference_method": "index"}
    with pytest.raises(ValueError, match="index_timestep_zero"):
        denoise(transformer, latents, text, references=pictures, cache_references=True, **options)


def test_references_of_other_channels_are_refused(transformer, latents, text):
    with pytest.raises(ValueError, match="16"):
        transformer(latents, TIME, text, references=[torch.zeros(1, 4, 4, 4)])
