"""Schedule and guidance against diffusers' scheduler and closed formulas."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from krea2_model.sampling import denoise
from krea2_model.schedule import check_sigmas, shift_mu, shift_time, sigma_schedule, unshift_time

SIZES = [(256, 256), (512, 512), (768, 1344), (1024, 1024), (1280, 1280), (2048, 2048)]
STEPS = [1, 4, 8, 13, 28, 52]


def diffusers_sigmas(steps: int, mu: float) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=6400,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("steps", STEPS)
def test_schedule_equals_diffusers(height, width, steps):
    mu = shift_mu(height // 16 * width // 16)
    ours = torch.tensor(sigma_schedule(steps, mu), dtype=torch.float64)
    assert ours.shape == (steps + 1,) and ours[0] == 1 and ours[-1] == 0
    assert (ours - diffusers_sigmas(steps, mu)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "tokens, mu", [(256, 0.5), (4096, 0.90625), (6400, 1.15), (16384, 2.20625)]
)
def test_mu_is_linear_and_not_clamped(tokens, mu):
    assert shift_mu(tokens) == pytest.approx(mu, abs=1e-12)


def test_turbo_schedule():
    published = [1, 0.956724, 0.904531, 0.840349, 0.759511, 0.654567, 0.512844, 0.310901, 0]
    assert sigma_schedule(8, 1.15) == pytest.approx(published, abs=1e-6)


class Recorder:
    """Stands in for a transformer: a velocity that depends on text, mask and time."""

    compute_dtype = torch.float32

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timestep, text, mask=None):
        self.calls.append((timestep.tolist(), mask))
        return latents * 0.1 + text.mean(dim=(1, 2))[:, None, None, None] * timestep[0]


@pytest.mark.parametrize("mu", [-3.0, 0.0, 0.90625, 1.15, 9.0])
def test_the_shift_can_be_undone(mu):
    for time in (0.0, 1e-6, 0.3, 0.5, 0.999, 1.0):
        assert unshift_time(shift_time(time, mu), mu) == pytest.approx(time, rel=1e-9)
    sigmas = sigma_schedule(8, mu, unshift_time(0.5, mu))
    assert sigmas[0] == pytest.approx(0.5, rel=1e-12) and len(sigmas) == 9


@pytest.mark.parametrize("sigma", [-0.1, 1.1, float("nan")])
def test_sigmas_without_a_time(sigma):
    with pytest.raises(ValueError, match="sigma is .*expected a number from 0"):
        unshift_time(sigma, 1.15)


def test_euler_and_guidance_follow_the_formula():
    transformer, noise = Recorder(), torch.randn(2, 16, 4, 4)
    positive, negative = torch.full((2, 3, 5), 2.0), torch.full((2, 1, 5), -1.0)
    sigmas = [1.0, 0.6, 0.0]
    steps = list(denoise(transformer, noise, positive, negative, sigmas=sigmas, guidance=3.5))
    expected = noise
    for (_, latents, predicted), now, following in zip(steps, sigmas, sigmas[1:], strict=False):
        conditional, unconditional = expected * 0.1 + 2 * now, expected * 0.1 - now
        velocity = conditional + 3.5 * (conditional - unconditional)
        torch.testing.assert_close(predicted, expected - now * velocity)
        expected = expected + (following - now) * velocity
        torch.testing.assert_close(latents, expected)
    assert [step for step, _, _ in steps] == [1, 2]
    assert len(transformer.calls) == 4


def test_no_guidance_runs_the_positive_alone_and_masks_travel():
    transformer, mask = Recorder(), torch.ones(1, 3, dtype=torch.bool)
    text = torch.zeros(1, 3, 5)
    run = denoise(transformer, torch.zeros(1, 16, 2, 2), (text, mask), sigmas=[1, 0], guidance=0)
    next(run)
    assert transformer.calls == [([1.0], mask)]


def test_latents_stay_in_float32():
    class Half(Recorder):
        def __call__(self, *args):
            return super().__call__(*args).half()

    noise = torch.randn(1, 16, 2, 2).half()
    _, latents, _ = next(denoise(Half(), noise, torch.zeros(1, 1, 1), sigmas=[1, 0], guidance=0))
    assert latents.dtype == torch.float32


def test_nan_stops_the_run_at_its_step():
    class Broken(Recorder):
        def __call__(self, latents, *args):
            return latents * (float("nan") if len(self.calls) else 1) + super().__call__(
                latents, *args
            )

    run = denoise(
        Broken(), torch.ones(1, 16, 2, 2), torch.zeros(1, 1, 1), sigmas=[1, 0.5, 0], guidance=0
    )
    next(run)
    with pytest.raises(ValueError, match=r"step 2 .*float32.*bfloat16"):
        next(run)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="steps is"):
        sigma_schedule(steps, 1.15)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -0.5])
def test_bad_guidance(guidance):
    with pytest.raises(ValueError, match="guidance is .*Krea's convention"):
        denoise(None, torch.zeros(1), torch.zeros(1), sigmas=[1, 0], guidance=guidance)


def test_guidance_without_negative():
    with pytest.raises(ValueError, match="no negative text"):
        denoise(None, torch.zeros(1), torch.zeros(1), sigmas=[1, 0], guidance=2)


@pytest.mark.parametrize(
    "sigmas", [[], [0], [1, 0.5], [0.5, 0.7, 0], [1.2, 0], [1, 1, 0], [1, float("nan"), 0]]
)
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match="sigmas is"):
        check_sigmas(sigmas)
