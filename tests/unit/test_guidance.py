"""Guidance in an interval, ramps, rescaling, and runs of two checkpoints."""

import pytest
import torch

from krea2_model import GuidanceSchedule, Krea2Pipeline
from krea2_model.guidance import rescaled
from krea2_model.sampling import (
    denoise,
    denoise_two_stage,
    shift_mu,
    sigma_schedule,
    two_stage_sigmas,
)
from parity import assert_close


@pytest.mark.parametrize("ramp, factors", [
    ("constant", (1, 1, 1)), ("rising", (0, 0.5, 1)), ("falling", (1, 0.5, 0)), ("hill", (0, 1, 0)),
])  # fmt: skip
def test_ramps(ramp, factors):
    schedule = GuidanceSchedule(0.8, 0.4, ramp)
    found = [schedule.factor(sigma) for sigma in (0.8, 0.6, 0.4)]
    assert found == pytest.approx(factors, abs=1e-9)
    assert schedule.factor(0.81) == schedule.factor(0.39) == 0


def test_an_interval_of_one_sigma():
    assert GuidanceSchedule(0.5, 0.5).factor(0.5) == 1
    assert GuidanceSchedule(0.5, 0.5, "hill").factor(0.5) == 1


@pytest.mark.parametrize("options, message", [
    ({"start": 0.2, "end": 0.4}, "start 0.2, end 0.4; expected sigmas"),
    ({"start": 1.5}, "start 1.5"),
    ({"end": float("nan")}, "end nan"),
    ({"ramp": "square"}, "ramp is 'square'; expected one of constant"),
    ({"rescale": 2.0}, "rescale is 2.0; expected 0"),
])  # fmt: skip
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GuidanceSchedule(**options)


def test_rescaled_velocities_have_the_conditional_deviation():
    """At 1, each image its own, and equal to diffusers' formula."""
    generator = torch.Generator().manual_seed(0)
    conditional = torch.randn(2, 16, 4, 4, generator=generator)
    guided = conditional * torch.tensor([3.0, 5.0])[:, None, None, None]
    assert_close(rescaled(guided, conditional, 1.0), conditional, 1e-6, "all of it")
    assert rescaled(guided, conditional, 0.0) is guided
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    for amount in (0.3, 0.7):
        expected = rescale_noise_cfg(guided, conditional, amount)
        assert_close(rescaled(guided, conditional, amount), expected, 1e-6, f"rescale {amount}")


@pytest.fixture(scope="module")
def raw():
    return Krea2Pipeline.nano("raw")


def fused(pipeline, text):
    return pipeline.transformer.fuse_text(pipeline.text_encoder.encode([text])[0])


def test_an_interval_saves_the_negative_s_pass(raw):
    calls = []
    handle = raw.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    options = {"seed": 1, "steps": 8, "output_type": "latent"}
    sigmas = sigma_schedule(8, shift_mu(64))
    whole = raw("a red circle", **options)
    assert len(calls) == 16
    same = raw("a red circle", **options, guidance_schedule=GuidanceSchedule())
    assert torch.equal(same, whole)
    calls.clear()
    part = raw("a red circle", **options, guidance_schedule=GuidanceSchedule(1.0, sigmas[3]))
    assert len(calls) == 8 + 4 and not torch.equal(part, whole)
    calls.clear()
    handle.remove()
    none = raw("a red circle", **options, guidance=0.0)
    outside = raw("a red circle", **options, guidance_schedule=GuidanceSchedule(0.001, 0.0))
    assert torch.equal(outside, none)


def test_two_stages_are_the_runs_they_are_made_of(raw):
    turbo = Krea2Pipeline.nano("turbo")
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = fused(raw, "a blue star"), fused(raw, "")
    turbo_text = fused(turbo, "a blue star")
    first, second = two_stage_sigmas(28, shift_mu(64), 8, 1.15, 5)
    assert first[0] == 1 and second[-1] == 0 and first[-1] == second[0]
    assert second == sigma_schedule(8, 1.15)[3:] and first[-2] > first[-1]
    steps = list(denoise_two_stage(raw.transformer, turbo.transformer, noise, texts, turbo_text,
                                   sigmas=(first, second), guidance=3.5))  # fmt: skip
    assert [step for step, _, _ in steps] == list(range(1, len(first) + len(second) - 1))
    # The same by denoise: Raw's run left where Turbo begins.
    begun = list(denoise(raw.transformer, noise, *texts, sigmas=[*first, 0.0], guidance=3.5))
    latents = begun[len(first) - 2][1]
    for now, after in zip(second, second[1:], strict=False):
        velocity = turbo.transformer(latents, torch.tensor([now]), turbo_text)
        latents = latents + (after - now) * velocity
    assert_close(steps[-1][1], latents, 1e-5, "two stages, and by hand")


@pytest.mark.parametrize("last", [0, 8, 9])
def test_turbo_needs_a_part_of_its_steps(last):
    with pytest.raises(ValueError, match=f"turbo_last is {last}; expected 1 to 7"):
        two_stage_sigmas(28, 0.9, 8, 1.15, last)


def test_stages_have_to_meet(raw):
    text = fused(raw, "a star")
    with pytest.raises(ValueError, match="Raw ends at sigma 0.5 and Turbo begins at 0.4"):
        denoise_two_stage(raw.transformer, raw.transformer, torch.zeros(1, 16, 8, 8), (text, text),
                          text, sigmas=([1.0, 0.5], [0.4, 0.0]), guidance=1.0)  # fmt: skip
    with pytest.raises(ValueError, match="raw_texts has no negative"):
        denoise_two_stage(raw.transformer, raw.transformer, torch.zeros(1, 16, 8, 8), (text, None),
                          text, sigmas=([1.0, 0.5], [0.5, 0.0]), guidance=1.0)  # fmt: skip
