"""Weights and negatives in attention: the formulas, what is left as it was, who is alone."""

import pytest
import torch

from diffusers_reference import random_transformer
from krea2_model import Krea2Pipeline, NegativeGuidance, sigma_schedule
from krea2_model.config import TransformerConfig
from krea2_model.sampling import denoise
from krea2_model.schedule import schedule_of
from krea2_model.transformer.backend import Backend, ExtendedBackend
from krea2_model.transformer.text_attention import TextAttention, TextStates, normalised_guidance
from parity import assert_close
from samples import random

CONFIG = TransformerConfig(
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    timestep_embed_dim=64,
    text_hidden_dim=64,
    text_num_attention_heads=8,
    text_num_key_value_heads=8,
    text_intermediate_size=128,
    axes_dims_rope=(8, 12, 12),
)
SETTINGS = NegativeGuidance(scale=3.0, limit=1.2, blend=0.6)


@pytest.fixture(scope="module")
def model():
    return random_transformer(CONFIG)


def text(tokens, seed, batch=1):
    return random(batch, tokens, CONFIG.hidden_size, seed=seed)


def velocity(model, states, *, mask=None, batch=1, references=None, **attention):
    backend = (
        {"backend": ExtendedBackend(TextAttention(mask=mask, **attention))} if attention else {}
    )
    with torch.no_grad():
        return model(random(batch, 16, 8, 6), torch.full((batch,), 0.7), states, mask,
                     references=references, **backend)  # fmt: skip


def test_a_weight_moves_the_value_of_its_token():
    """Against the formula, over heads as attention gets them; keys and other tokens stay."""
    query, key, value = random(2, 4, 9, 8), random(2, 2, 9, 8, seed=2), random(2, 2, 9, 8, seed=3)
    weights = torch.ones(2, 5)
    weights[0, 1], weights[0, 3], weights[1, 2] = 1.5, -1.0, 0.0
    seen = []
    attention = TextAttention(weights)
    attention.prepare(random(2, 9, 32), (5, 9), None, None, None)
    attention.attend(lambda *args: seen.extend(args), query, key, value, None, None)
    assert seen[0] is query and seen[1] is key and seen[3] is None, "and no mask is needed"
    for item in range(2):
        plain = [i for i in range(5) if weights[item, i] == 1]
        mean = value[item, :, plain].mean(dim=1)
        for token in range(9):
            own = value[item, :, token]
            weight = weights[item, token] if token < 5 else 1.0
            torch.testing.assert_close(seen[2][item, :, token], mean + weight * (own - mean))
            if weight == 1:
                assert torch.equal(seen[2][item, :, token], own)


def test_the_mean_is_of_real_tokens():
    value, weights = random(1, 2, 6, 8), torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True, False]])
    seen = []
    attention = TextAttention(weights, mask)
    attention.attend(lambda *args: seen.append(args[2]), None, None, value, None, None)
    torch.testing.assert_close(seen[0][:, :, 0], value[:, :, 1:3].mean(dim=2))
    everything = TextAttention(torch.zeros(1, 4))
    everything.attend(lambda *args: seen.append(args[2]), None, None, value, None, None)
    torch.testing.assert_close(seen[1][:, :, 0], value[:, :, :4].mean(dim=2))


def test_weights_change_the_image_and_1_does_not(model):
    states, ones = text(7, 3), torch.ones(1, 7)
    plain = velocity(model, states)
    assert torch.equal(velocity(model, states, weights=ones), plain)
    ones[0, 2] = 0.0
    assert not torch.allclose(velocity(model, states, weights=ones), plain, atol=1e-3)


def test_batches_with_weights_keep_texts_apart(model):
    long, short = text(7, 3), text(4, 4)
    weights = torch.ones(2, 7)
    weights[0, 5], weights[1, 1] = 1.6, -1.0
    states = torch.cat((long, torch.nn.functional.pad(short, (0, 0, 0, 3), value=9.0)))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    together = velocity(model, states, mask=mask, batch=2, weights=weights)
    latents = random(2, 16, 8, 6)
    for item, alone in enumerate((long, short)):
        backend = ExtendedBackend(TextAttention(weights[item : item + 1, : alone.shape[1]]))
        with torch.no_grad():
            single = model(latents[item : item + 1], torch.tensor([0.7]), alone, backend=backend)
        assert_close(together[item : item + 1], single, 1e-5, f"text {item} of a batch")


class Recorder(Backend):
    """Keeps what attention gives, or puts something else in its place."""

    def __init__(self, instead=None):
        self.out, self.instead = None, instead

    def attend(self, *args):
        self.out = super().attend(*args)
        return self.out.clone() if self.instead is None else self.instead


class TwoStreams(Backend):
    """The method spelled out: each text with an image of its own, and after each attention the
    image tokens of both set to the guided ones."""

    def __init__(self, negative, settings):
        self.negative, self.settings = negative, settings

    def run_blocks(self, blocks, hidden, query_slice, vector, rope, mask, split, modulation=None):
        own = self.negative.shape[1]
        at_text = rope[:, :, :1].expand(-1, -1, own, -1, -1, -1)
        streams = [hidden, torch.cat((self.negative, hidden[:, query_slice[0] :]), dim=1)]
        tables = [rope, torch.cat((at_text, rope[:, :, query_slice[0] :]), dim=2)]
        firsts = [query_slice[0], own]
        for block in blocks:
            seen = []
            for stream, table in zip(streams, tables, strict=True):
                recorder = Recorder()
                block(stream.clone(), vector, table, backend=recorder)
                seen.append(recorder.out)
            images = [out[:, first:] for out, first in zip(seen, firsts, strict=True)]
            guided = normalised_guidance(*images, self.settings)
            for index, first in enumerate(firsts):
                out = torch.cat((seen[index][:, :first], guided), dim=1)
                streams[index] = block(streams[index], vector, tables[index], backend=Recorder(out))
        return streams[0][:, slice(*query_slice)]


def test_negative_guidance_equals_two_whole_streams(model):
    positive, negative = text(7, 3), text(4, 4)
    found = velocity(model, positive, negative=TextStates(negative), settings=SETTINGS)
    with torch.no_grad():
        expected = model(random(1, 16, 8, 6), torch.full((1,), 0.7), positive,
                         backend=TwoStreams(negative, SETTINGS))  # fmt: skip
    assert_close(found, expected, 1e-5, "one sequence with both texts against two")
    assert not torch.allclose(found, velocity(model, positive), atol=1e-3)


def test_tokens_of_the_negative_may_have_weights(model):
    states, negative, weights = text(7, 3), text(4, 4), torch.ones(1, 4)
    plain, weighted = (
        velocity(model, states, negative=TextStates(negative, None, own), settings=SETTINGS)
        for own in (weights, torch.tensor([[1.0, 0.0, 2.0, 1.0]]))
    )
    without = velocity(model, states, negative=TextStates(negative), settings=SETTINGS)
    assert torch.equal(plain, without) and not torch.allclose(weighted, without, atol=1e-3)


def test_normalised_guidance_follows_its_formula():
    z, against = random(2, 5, 8), random(2, 5, 8, seed=2)
    for settings in (SETTINGS, NegativeGuidance(), NegativeGuidance(limit=1e6, blend=1.0)):
        led = z + settings.scale * (z - against)
        ratio = led.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
        led = led * ratio.clamp(max=settings.limit) / ratio
        expected = settings.blend * led + (1 - settings.blend) * z
        torch.testing.assert_close(normalised_guidance(z, against, settings), expected)
    assert not normalised_guidance(torch.zeros(1, 1, 8), z[:1, :1], SETTINGS).isnan().any()


def test_a_negative_equal_to_the_positive_changes_nothing(model):
    states = text(7, 3)
    found = velocity(model, states, negative=TextStates(states), settings=SETTINGS)
    assert_close(found, velocity(model, states), 1e-5, "led away from itself")


def test_batches_with_negatives_keep_texts_apart(model):
    """Masks on both sides, weights on both sides, reference images."""
    positives, negatives = (text(7, 3), text(4, 4)), (text(3, 5), text(5, 6))
    pad = torch.nn.functional.pad
    states = torch.cat([pad(t, (0, 0, 0, 7 - t.shape[1]), value=9.0) for t in positives])
    against = torch.cat([pad(t, (0, 0, 0, 5 - t.shape[1]), value=9.0) for t in negatives])
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    own = torch.arange(5) < torch.tensor([[3], [5]])
    weights, own_weights = torch.ones(2, 7), torch.ones(2, 5)
    weights[1, 0], own_weights[0, 1] = 0.0, 2.0
    references = [random(2, 16, 4, 4, seed=8)]
    together = velocity(
        model, states, mask=mask, batch=2, weights=weights, references=references,
        negative=TextStates(against, own, own_weights), settings=SETTINGS,
    )  # fmt: skip
    for item in range(2):
        one = slice(item, item + 1)
        long, short = positives[item].shape[1], negatives[item].shape[1]
        negative = TextStates(negatives[item], None, own_weights[one, :short])
        backend = ExtendedBackend(TextAttention(weights[one, :long], None, negative, SETTINGS))
        with torch.no_grad():
            single = model(random(2, 16, 8, 6)[one], torch.tensor([0.7]), positives[item],
                           references=[references[0][one]], backend=backend)  # fmt: skip
        assert_close(together[one], single, 1e-5, f"text {item} of a batch")


def test_steps_of_the_window():
    half = NegativeGuidance(start=0.25, end=0.75)
    times = sigma_schedule(8, 0.0)[:-1]
    expected = [False] * 2 + [True] * 4 + [False] * 2
    assert [half.window().contains(t) for t in times] == expected
    shifted = sigma_schedule(8, 1.15)
    window = half.window(schedule_of(shifted))
    assert [window.contains(t) for t in shifted[:-1]] == expected
    assert all(NegativeGuidance(end=1.0).window().contains(t) for t in times)
    assert not any(NegativeGuidance(scale=0.0).window().contains(t) for t in times)


@pytest.mark.parametrize("off", [{"scale": 0.0}, {"blend": 0.0}, {"start": 0.5, "end": 0.5}])
def test_off_is_exactly_as_before(model, off):
    run = {"sigmas": [1.0, 0.6, 0.0], "guidance": 0}
    noise, positive, negative = random(1, 16, 8, 6), text(7, 3), text(4, 4)
    plain = [latents for _, latents, _ in denoise(model, noise, positive, **run)]
    settings = NegativeGuidance(**off)
    assert settings.is_off
    found = denoise(model, noise, positive, negative, negative_guidance=settings, **run)
    assert all(torch.equal(a, b) for a, (_, b, _) in zip(plain, found, strict=True))


def test_only_steps_of_the_window_are_guided(model):
    run = {"sigmas": sigma_schedule(4, 1.15), "guidance": 0}
    noise, positive, negative = random(1, 16, 8, 6), text(7, 3), text(4, 4)
    plain = [latents for _, latents, _ in denoise(model, noise, positive, **run)]
    late = NegativeGuidance(start=0.5, end=1.0)
    found = [x for _, x, _ in denoise(model, noise, positive, negative, negative_guidance=late,
                                      **run)]  # fmt: skip
    assert [torch.equal(a, b) for a, b in zip(plain, found, strict=True)] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("name, value, expected", [
    ("scale", -1.0, "0 or more"), ("limit", 0.5, "1 or more"), ("blend", 1.5, "0 to 1"),
    ("start", float("nan"), "0 to 1"), ("end", -0.1, "0 to 1"), ("scale", float("inf"), "0 or"),
])  # fmt: skip
def test_bad_settings_are_named(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} is .*; expected {expected}"):
        NegativeGuidance(**{name: value})


def test_negative_guidance_needs_a_negative(model):
    with pytest.raises(ValueError, match="negative_guidance but no negative"):
        denoise(model, random(1, 16, 8, 6), text(3, 1), sigmas=[1, 0], guidance=0,
                negative_guidance=NegativeGuidance())  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tokenizer_folder):
    return Krea2Pipeline.nano()


def test_pipeline_reads_weights_where_asked(pipeline):
    """Prompts without marks, and weights of 1, give the same picture to the bit."""

    def paint(prompt, **options):
        return pipeline(prompt, steps=2, output_type="latent", **options)

    plain = paint("a red circle")
    assert torch.equal(paint("a red circle", prompt_weights=True), plain)
    assert torch.equal(paint("a (red:1) circle", prompt_weights=True), plain)
    assert not torch.equal(paint("a (red:1.5) circle", prompt_weights=True), plain)
    marks = paint("a (red:1) circle")
    assert not torch.equal(marks, plain), "off, the marks are part of the text"
    both = paint(["a (red:0) circle", "a small (blue:1.5) star on white"], prompt_weights=True,
                 seed=[0, 5])  # fmt: skip
    single = paint("a small (blue:1.5) star on white", prompt_weights=True, seed=5)
    assert_close(both[1:], single, 1e-4, "in a batch and alone")


def test_attention_of_the_package_is_the_plain_one(model):
    """With nothing to do, a backend of text attention is the default's, to the bit."""
    states = text(7, 3)
    backend = ExtendedBackend(TextAttention())
    with torch.no_grad():
        found = model(random(1, 16, 8, 6), torch.full((1,), 0.7), states, backend=backend)
    assert torch.equal(found, velocity(model, states))
