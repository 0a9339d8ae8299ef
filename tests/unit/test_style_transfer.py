"""Style pictures: attention against a dense mask, inversion, calls and memory of a run."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from diffusers_reference import TINY, random_transformer
from krea2_model import StyleTransfer
from krea2_model.features.run_features import RunFeatures
from krea2_model.features.style_transfer import (
    StylePictures,
    StyleRun,
    StyleSettings,
    Trajectory,
    style_shares,
)
from krea2_model.features.styles import style_mask
from krea2_model.features.tiles import TileSettings
from krea2_model.guidance import unshifted
from krea2_model.nn.attention import attend
from krea2_model.nn.kernels import apply_rope
from krea2_model.nn.partial_attention import attend_partially
from krea2_model.sampling import denoise
from krea2_model.transformer.extensions import AttentionExtensions
from krea2_model.transformer.references import ReferenceKVCache
from krea2_model.transformer.style_attention import StyleKeys, StyleRecorder
from krea2_model.transformer.text_attention import NegativeGuidance, TextAttention, TextStates
from krea2_model.transformer.token_groups import RegionTokens, TokenGroups
from parity import assert_close
from samples import random

REGION, TEXT, IMAGE, REFERENCE, STYLES = 3, 4, 12, 5, (6, 7)
SHARE = torch.tensor([1, 1, 0.5, 0, 0, 0, 0.25, 1, 0, 0, 0, 0])
FACTORS = [0.5 * SHARE, torch.full((IMAGE,), 1.5)]
SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.0]
WINDOW = StyleSettings(end=1.0)


@pytest.fixture(scope="module")
def model():
    return random_transformer(TINY)


def heads(tokens, seed=1, batch=2):
    query, key, value = (random(batch, h, tokens, 8, seed=seed + h) for h in (4, 2, 1))
    return query, key, value.expand(-1, 2, -1, -1)


def recorded(count, seed):
    """A style picture of so many tokens, from a pass with 2 tokens of text."""
    recorder = StyleRecorder(2, count, (0, 1))
    recorder.attend(attend, 0, *heads(2 + count, seed, batch=1), None)
    return recorder.blocks


def style_keys(model, factors=FACTORS, amount=0.0, key_scale=1.1):
    styles = [recorded(count, seed) for count, seed in zip(STYLES, (10, 20), strict=True)]
    shifts = [torch.eye(2).expand(1, 1, 1, 4, 2, 2)] * 2
    values = torch.full((IMAGE,), amount)
    return StyleKeys(styles, shifts, key_scale, factors, (0.25, 0.75), values), styles


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("by_parts", [True, False])
@pytest.mark.parametrize("factors", [FACTORS, [torch.ones(IMAGE)] * 2], ids=["biased", "plain"])
def test_image_tokens_see_styles_as_with_a_dense_mask(model, has_regions, by_parts, factors):
    """And no other token sees them: text, a region's text, a cached reference's keys beside."""
    front = REGION if has_regions else 0
    keys, styles = style_keys(model, factors)
    query, key, value = heads(front + TEXT + IMAGE)
    cache = ReferenceKVCache()
    own = heads(REFERENCE, 30, batch=1)
    cache.recorder(0.6).attend(attend, 0, *own, None)
    groups = TokenGroups(IMAGE, [RegionTokens(REGION, SHARE)]) if has_regions else None
    extensions = AttentionExtensions(None, cache, groups, keys)
    first, end = front + TEXT, front + TEXT + IMAGE
    extensions.prepare(query.transpose(1, 2).flatten(2), (first, end), None, None, None)
    partial = attend_partially if by_parts else None
    found = extensions.attend(attend, partial, 0, query, key, value, None)

    total = end + REFERENCE
    bias = torch.zeros(end, total + sum(STYLES))
    bias[:, end:total] = torch.tensor(0.6).log()
    bias[:, total:] = -torch.inf
    at = total
    for count, factor in zip(STYLES, factors, strict=True):
        bias[first:end, at : at + count] = factor.log()[:, None]
        at += count
    if has_regions:
        bias[front:first, :front] = 0
        bias[:front, front:first] = -torch.inf
        bias[:front, first:end] = SHARE.log()
        bias[first:end, :front] = SHARE.log()[:, None]
    blocks = [style[0] for style in styles]
    all_keys = [key, own[1], *(1.1 * block.key for block in blocks)]
    all_values = [value, own[2], *(block.value for block in blocks)]
    batched = (
        torch.cat([part.expand(2, -1, -1, -1) for part in side], dim=2)
        for side in (all_keys, all_values)
    )
    expected = attend(query, *batched, bias[None, None].clamp(min=-1e30))
    assert_close(found, expected, 1e-5, "dense")
    image_alone = extensions.attend(
        attend, partial, 0, query[:, :, first:end], key, value, None, (first, end)
    )
    assert_close(image_alone, expected[:, first:end], 1e-5, "queries of the image")


def test_a_block_without_the_style_attends_plainly(model):
    keys, _ = style_keys(model)
    query, key, value = heads(TEXT + IMAGE)
    extensions = AttentionExtensions(style=keys)
    span = (TEXT, TEXT + IMAGE)
    extensions.prepare(query.transpose(1, 2).flatten(2), span, None, None, None)
    found = extensions.attend(attend, attend_partially, 1, query, key, value, None)
    assert torch.equal(found, attend(query, key, value))


def test_both_texts_of_nag_leave_the_style_to_the_image(model):
    """The negative's tokens come first, and neither text sees the style."""
    keys, _ = style_keys(model, [torch.zeros(IMAGE)] * 2)
    states = TextStates(torch.zeros(2, 2, 32))
    text = TextAttention(negative=states, settings=NegativeGuidance())
    query, key, value = heads(2 + TEXT + IMAGE)
    outs = []
    for style in (None, keys):
        extensions = AttentionExtensions(text, None, None, style)
        hidden, rope = torch.zeros(2, TEXT + IMAGE, 32), torch.zeros(1, 1, TEXT + IMAGE, 4, 2, 2)
        extensions.prepare(hidden, (TEXT, TEXT + IMAGE), rope, None, None)
        outs.append(extensions.attend(attend, attend_partially, 0, query, key, value, None))
    assert_close(*outs, 1e-6, "a style with factors of 0")
    extensions = AttentionExtensions(text, None, None, style_keys(model)[0])
    extensions.prepare(hidden, (TEXT, TEXT + IMAGE), rope, None, None)
    seen = extensions.attend(attend, attend_partially, 0, query, key, value, None)
    front = 2 + TEXT
    assert_close(seen[:, :front], outs[0][:, :front], 1e-6, "texts")
    assert not torch.allclose(seen[:, front:], outs[0][:, front:], atol=1e-2)


def test_statistics_of_values_move_to_the_styles_by_weight(model):
    keys, styles = style_keys(model, amount=1.0)
    value = random(2, 2, TEXT + IMAGE, 8, seed=5)

    def seen(query, key, value, mask):
        return value

    moved = keys.attend(seen, 0, TEXT, *heads(TEXT + IMAGE)[:2], value, None)
    assert torch.equal(moved[:, :, :TEXT], value[:, :, :TEXT])
    image = moved[:, :, TEXT : TEXT + IMAGE]
    for found, part in ((image.mean(2), "mean"), (image.std(2, correction=0), "deviation")):
        parts = [getattr(style[0], part)[:, :, 0] for style in styles]
        assert_close(found, (0.25 * parts[0] + 0.75 * parts[1]).expand_as(found), 1e-4, part)


def test_keys_turned_on_are_those_of_other_positions(model):
    """A rotation by a distance after that of a position is that of their sum."""
    key = random(1, 1, 1, sum(TINY.axes_dims_rope), seed=1)
    device = torch.device("cpu")
    first = apply_rope(key, model.rotation((0, 3, 2), device))
    both = apply_rope(first, model.rotation((0, 1, -6), device))
    assert_close(both, apply_rope(key, model.rotation((0, 4, -4), device)), 1e-5, "rotation")


def straight(latents, sigma, recorder):
    """A flow on straight lines to one image: the velocity is the same along each."""
    return latents - 1.0


def test_inversion_undoes_euler_steps():
    """One call a step and two at the first; between its sigmas it lies on a line."""
    calls = []

    def velocity(latents, sigma, recorder):
        calls.append(sigma)
        return 0.3 * latents + sigma

    start = random(1, 4, 4, 4, seed=1)
    trajectory = Trajectory(start, SIGMAS)
    noise = trajectory.at(1.0, velocity)
    assert calls == [0.2, 0.2, 0.5, 0.8, 1.0]
    latents = noise
    for now, then in zip(SIGMAS, SIGMAS[1:], strict=False):
        assert_close(latents, trajectory.at(now, velocity), 0.03, f"sigma {now}")
        latents = latents + (then - now) * velocity(latents, now, None)
    assert_close(latents, start, 0.03, "the picture")
    plain = start + (0.3 * start + 0.0) * 1.0  # one long step from the picture
    assert (latents - start).abs().mean() < 0.1 * (noise - plain).abs().mean()
    middle = (trajectory.at(0.5, velocity) + trajectory.at(0.8, velocity)) / 2
    assert_close(trajectory.at(0.65, velocity), middle, 1e-6, "between")
    count = len(calls)
    trajectory.at(0.5, velocity)
    assert len(calls) == count, "known latents need no call"


def test_inversion_for_a_run_that_ends_above_zero_begins_at_the_picture():
    calls = []

    def velocity(latents, sigma, recorder):
        calls.append(round(sigma, 3))
        return straight(latents, sigma, recorder)

    Trajectory(torch.zeros(1, 4, 4, 4), [1.0, 0.8, 0.6]).at(0.6, velocity)
    assert calls == [0.2, 0.2, 0.4, 0.6]


def test_inversion_of_nan_is_refused():
    trajectory = Trajectory(torch.zeros(1, 4, 4, 4), SIGMAS)
    with pytest.raises(ValueError, match="inversion of the style picture gave NaN"):
        trajectory.at(1.0, lambda latents, sigma, recorder: latents * float("nan"))


class Counting:
    """The transformer, counting calls by their number of image rows."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, latents, timestep, *args, **options):
        self.calls.append((latents.shape[-2], round(timestep[0].item(), 3)))
        return self.model(latents, timestep, *args, **options)


def paint(model, settings, text=None, noise=None, share_at=None, features=None, **options):
    """Latents 8 x 8 after all steps, with a style picture of 4 x 8."""
    run = StyleRun(
        settings,
        StylePictures([random(1, 16, 4, 8, seed=3)], [1.0], share_at),
        TextStates(random(1, 2, TINY.hidden_size, seed=4)) if text is None else text,
        unshifted,
    )
    features = replace(features or RunFeatures(), style=run)
    noise = random(2, 16, 8, 8, seed=1) if noise is None else noise
    prompt = random(2, 3, TINY.hidden_size, seed=2)
    options = {"guidance": 0.0, "sigmas": SIGMAS, **options}
    *_, (_, latents, _) = denoise(model, noise, prompt, features=features, **options)
    return latents, run


def test_calls_of_a_run(model):
    """The style passes once a step of its window, and the negative has none."""
    counting = Counting(model)
    negative = random(2, 3, TINY.hidden_size, seed=9)
    paint(counting, StyleSettings(start=0.3, end=0.7), negative=negative, guidance=2.0)
    style = [sigma for rows, sigma in counting.calls if rows == 4]
    assert style == [0.2, 0.2, 0.5, 0.5], "inversion up to the window, then one pass a step"
    assert [rows for rows, _ in counting.calls].count(8) == 2 * 4


def test_keys_and_values_are_freed_with_their_step(model):
    alive, most = [], []
    original = StyleRun.prepare

    def prepare(self, *args):
        original(self, *args)
        if self._step is not None:
            alive.append([weakref.ref(block.key) for block in self._step[1][0].values()])
        most.append(sum(ref() is not None for refs in alive for ref in refs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StyleRun, "prepare", prepare)
        paint(model, StyleSettings(end=0.7))
    assert most == [TINY.num_layers] * 3 + [0]


def test_a_mask_and_strength_0_change_nothing_outside(model):
    noise, prompt = random(2, 16, 8, 8, seed=1), random(2, 3, TINY.hidden_size, seed=2)
    *_, (_, plain, _) = denoise(model, noise, prompt, sigmas=SIGMAS, guidance=0.0)
    assert torch.equal(paint(model, StyleSettings(strength=0))[0], plain)
    nowhere, _ = paint(model, WINDOW, share_at=lambda rows, columns: torch.zeros(rows * columns))
    assert torch.equal(nowhere, plain)
    styled, _ = paint(model, WINDOW)
    assert (styled - plain).abs().mean() > 0.01
    weak, _ = paint(model, replace(WINDOW, strength=1e-4))
    assert (weak - plain).abs().max() < 1e-2, "strength is continuous at 0"


def test_tiles_share_one_pass_of_the_style(model):
    counting = Counting(model)
    noise = random(1, 16, 8, 20, seed=1)
    prompt = {"noise": noise.expand(2, -1, -1, -1)}
    tiles = RunFeatures(tiles=TileSettings(64, 0.25))
    paint(counting, WINDOW, features=tiles, **prompt)
    style = [sigma for rows, sigma in counting.calls if rows == 4]
    assert len(style) == 5 + 4 and len(counting.calls) > 9 + 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"strength": -0.1}, "strength is -0.1; expected a number from 0 to 10"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"start": 0.6, "end": 0.4}, "start 0.6 and end 0.4; expected fractions of the schedule"),
        ({"value_statistics": 1.5}, "value_statistics is 1.5"),
        ({"key_scale": 0.1}, "key_scale is 0.1; expected a number from 0.5 to 2"),
        ({"first_block": 0.9, "last_block": 0.2}, "of the model's depth"),
        ({"max_megapixels": 0}, "max_megapixels is 0"),
        ({"prompt": None}, "prompt is"),
    ],
)
def test_bad_numbers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        StyleTransfer(torch.zeros(3, 32, 32), **change)


PICTURE = torch.rand(3, 32, 32)


@pytest.mark.parametrize(
    "images, change, words",
    [
        ([], {}, "There are 0 style pictures"),
        ([PICTURE] * 9, {}, "There are 9 style pictures; expected 1 to 8"),
        (None, {}, "images is None"),
        (torch.zeros(3, 1, 1), {}, "1 x 1 px; expected at least 16 px a side"),
        ([PICTURE, PICTURE], {"weights": [1]}, "2 style pictures and 1 weight "),
        (PICTURE, {"weights": [0]}, "one of them above 0"),
        (PICTURE, {"mask": torch.zeros(32, 32)}, "mask is empty"),
        (PICTURE, {"mask": torch.ones(32, 64)}, "mask is 64 x 32 px, for an image of 64 x 64 px"),
    ],
)
def test_bad_pictures_weights_and_masks_are_refused(images, change, words):
    with pytest.raises(ValueError, match=words):
        StyleTransfer(images, **change).prepared(64, 64)


def test_shares_and_masks():
    assert style_shares(None, 2) == [0.5, 0.5] and style_shares([3, 1], 2) == [0.75, 0.25]
    mask = torch.zeros(64, 96)
    mask[:32, :48] = 1
    shares = style_mask(mask)(2, 3).unflatten(0, (2, 3))
    assert torch.equal(shares, torch.tensor([[1, 0.5, 0], [0, 0, 0]]))
    # Of a size that is rounded to whole tokens.
    assert style_mask(torch.ones(100, 70))(7, 5).mean() == 1
    mask[40, 40], mask[63, 90] = torch.nan, 2 / 255  # nobody painted there
    assert torch.equal(style_mask(mask)(2, 3).unflatten(0, (2, 3)), shares)
    with pytest.raises(ValueError, match="mask is empty"):
        style_mask(torch.full((32, 48), 1 / 255))
