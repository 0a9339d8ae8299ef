"""Guidance in an interval, ramps, rescaling, and runs of two checkpoints."""

from functools import partial

import pytest
import torch

from krea2_model import GuidanceSchedule, Krea2Pipeline
from krea2_model.config import RAW, TURBO
from krea2_model.guidance import rescaled, unshifted
from krea2_model.sampling import denoise
from krea2_model.schedule import schedule_of, shift_mu, shift_time, sigma_schedule, two_stage_sigmas
from parity import assert_close


@pytest.mark.parametrize("ramp, factors", [
    ("constant", (1, 1, 1)), ("rising", (0, 0.5, 1)), ("falling", (1, 0.5, 0)), ("hill", (0, 1, 0)),
])  # fmt: skip
def test_ramps(ramp, factors):
    """At the start of the window, in its middle and just before its end, whatever the shift."""
    schedule = GuidanceSchedule(0.2, 0.6, ramp)
    for sigma_at in (unshifted, partial(sigma_of, mu=1.15), partial(sigma_of, mu=-2.0)):
        found = [schedule.factor(sigma_at(part), sigma_at) for part in (0.2, 0.4, 0.5999)]
        assert found == pytest.approx(factors, abs=1e-3)
        assert schedule.factor(sigma_at(0.19), sigma_at) == 0
        assert schedule.factor(sigma_at(0.6), sigma_at) == schedule.factor(0.0, sigma_at) == 0


def sigma_of(part, mu):
    return shift_time(1 - part, mu)


def test_windows_that_meet_share_no_step():
    for steps in (1, 7, 20, 50):
        for mu in (0.0, 0.5, 2.2):
            sigma_at = schedule_of(sigma_schedule(steps, mu))
            windows = [GuidanceSchedule(n / 20, (n + 1) / 20) for n in range(20)]
            for sigma in map(float, torch.tensor(sigma_schedule(steps, mu))[:-1]):
                assert sum(window.factor(sigma, sigma_at) for window in windows) == 1


def test_a_window_of_no_length_is_nowhere():
    assert GuidanceSchedule(0.5, 0.5).factor(0.5) == 0
    assert GuidanceSchedule(0.5, 0.5, "hill").factor(0.5) == 0


@pytest.mark.parametrize("mu", [-1.0, 0.5, 0.90625, 1.15, 2.5])
@pytest.mark.parametrize(
    "steps, denoise_from", [(2, 1.0), (8, 1.0), (20, 0.6), (28, 0.05), (1000, 0.3)]
)
def test_sigmas_tell_their_schedule(mu, steps, denoise_from):
    """Of their own mu, not of the checkpoint's; in float32 too."""
    sigmas = sigma_schedule(steps, mu, denoise_from)
    for given in (sigmas, torch.tensor(sigmas).tolist()):
        sigma_at = schedule_of(given, RAW, 4096)
        assert [sigma_at(part) for part in (0, 0.25, 0.5, 1)] == pytest.approx(
            [sigma_of(part, mu) for part in (0, 0.25, 0.5, 1)], abs=1e-4
        )


@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [1.0, 0.9, 0.8, 0.1, 0.0], [0.9, 0.89, 0.0]])
def test_other_sigmas_are_the_checkpoint_s(sigmas):
    for preset, mu in ((RAW, shift_mu(64)), (TURBO, 1.15), (None, shift_mu(64))):
        assert schedule_of(sigmas, preset, 64)(0.5) == pytest.approx(sigma_of(0.5, mu))


@pytest.mark.parametrize("options, message", [
    ({"start": 0.4, "end": 0.2}, "start 0.4 and end 0.2; expected"),
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
    block = raw.transformer.blocks[0]
    handle = block.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))
    options = {"seed": 1, "steps": 8, "output_type": "latent"}
    whole = raw("a red circle", **options)
    assert sum(calls) == 16
    same = raw("a red circle", **options, guidance_schedule=GuidanceSchedule())
    assert torch.equal(same, whole)
    calls.clear()
    part = raw("a red circle", **options, guidance_schedule=GuidanceSchedule(end=0.5))
    assert sum(calls) == 8 + 4 and not torch.equal(part, whole)
    calls.clear()
    handle.remove()
    none = raw("a red circle", **options, guidance=0.0)
    outside = raw("a red circle", **options, guidance_schedule=GuidanceSchedule(0.99, 1.0))
    assert torch.equal(outside, none)


def test_two_stages_are_the_runs_they_are_made_of(raw):
    turbo = Krea2Pipeline.nano("turbo")
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = fused(raw, "a blue star"), fused(raw, "")
    turbo_text = fused(turbo, "a blue star")
    first, second = two_stage_sigmas(28, shift_mu(64), 8, 1.15, 5)
    assert first[0] == 1 and second[-1] == 0 and first[-1] == second[0]
    assert second == sigma_schedule(8, 1.15)[3:] and first[-2] > first[-1]
    *_, (last, latents, _) = denoise(
        raw.transformer, noise, *texts, sigmas=first, guidance=3.5, partial=True
    )
    *_, (_, found, _) = denoise(turbo.transformer, latents, turbo_text, sigmas=second, guidance=0.0)
    assert last == len(first) - 1
    # Raw's whole run, left where Turbo begins.
    whole = list(denoise(raw.transformer, noise, *texts, sigmas=[*first, 0.0], guidance=3.5))
    assert torch.equal(latents, whole[len(first) - 2][1])
    for now, after in zip(second, second[1:], strict=False):
        velocity = turbo.transformer(latents, torch.tensor([now]), turbo_text)
        latents = latents + (after - now) * velocity
    assert_close(found, latents, 1e-5, "two stages, and by hand")


@pytest.mark.parametrize("last", [0, 8, 9])
def test_turbo_needs_a_part_of_its_steps(last):
    with pytest.raises(ValueError, match=f"turbo_last is {last}"):
        two_stage_sigmas(28, 0.9, 8, 1.15, last)


@pytest.mark.parametrize("sigmas, partial", [([1.0, 0.5], False), ([1.0, -0.5], True)])
def test_only_a_partial_run_ends_above_0(raw, sigmas, partial):
    with pytest.raises(ValueError, match="end in 0"):
        denoise(raw.transformer, torch.zeros(1, 16, 8, 8), fused(raw, "a star"), sigmas=sigmas,
                guidance=0.0, partial=partial)  # fmt: skip
