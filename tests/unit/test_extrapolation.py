"""Steps without the model: which, how exact, and what they may not touch."""

import pytest
import torch

from krea2_model import Krea2Pipeline
from krea2_model.extrapolation import VelocityExtrapolation
from krea2_model.sampling import denoise
from krea2_model.schedule import sigma_schedule
from parity import assert_close


def asked(steps, every):
    """The steps at which a run asks the model."""
    extrapolation, found = VelocityExtrapolation(steps, every), []
    for step in range(steps):
        if not extrapolation.should_skip(step):
            found.append(step)
            extrapolation.record(1 - step / steps, torch.zeros(1))
    return found


def test_which_steps_ask_the_model():
    assert asked(10, 1) == list(range(10))
    assert asked(10, 2) == [0, 1, 3, 5, 7, 9]
    assert asked(12, 3) == [0, 1, 2, 5, 8, 11]
    # The first fifth, and the last step, always do.
    assert asked(28, 2)[:7] == [0, 1, 2, 3, 4, 5, 7] and asked(28, 2)[-1] == 27
    assert asked(2, 4) == [0, 1] and asked(1, 2) == [0]


def test_a_velocity_that_is_linear_in_time_is_met_exactly():
    extrapolation = VelocityExtrapolation(10, 2)
    slope = torch.randn(2, 3)
    for time in (0.9, 0.6):
        extrapolation.record(time, 1.0 + slope * time)
    assert_close(extrapolation.velocity(0.45), 1.0 + slope * 0.45, 1e-6, "on the line")


def test_a_time_asked_twice_counts_once():
    """Samplers of higher order ask again where they are."""
    extrapolation = VelocityExtrapolation(10, 2)
    for time, value in ((0.9, 5.0), (0.8, 1.0), (0.8, 2.0)):
        extrapolation.record(time, torch.tensor(value))
    assert extrapolation.velocity(0.7).item() == pytest.approx(-1.0)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_bad_values_are_named(every):
    with pytest.raises(ValueError, match="evaluate_every is .*expected a whole number"):
        VelocityExtrapolation(8, every)


@pytest.fixture(scope="module")
def nano():
    return Krea2Pipeline.nano("raw")


@pytest.fixture(scope="module")
def exact(nano):
    return [nano(prompt, seed=i, output_type="pt") for i, prompt in enumerate(PROMPTS)]


PROMPTS = ("a red circle on white", "a small green star above a purple ring on white")


@pytest.mark.parametrize("every, limit", [(1, 0.0), (2, 0.3), (3, 1.0)])
def test_pictures_stay_close(nano, exact, every, limit):
    """Mean differences in 255ths; the same calls saved by fewer steps cost 0.2 to 0.5."""
    calls, block = [], nano.transformer.blocks[0]
    handle = block.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))
    for index, prompt in enumerate(PROMPTS):
        found = nano(prompt, seed=index, output_type="pt", evaluate_every=every)
        error = (found - exact[index]).abs().mean().item() * 255
        assert error <= limit, f"{error:.2f} of 255 at every {every}"
    handle.remove()
    assert sum(calls) == {1: 28, 2: 17, 3: 14}[every] * 2 * len(PROMPTS)


def test_the_model_is_not_asked_in_between(nano):
    """Steps are still yielded one by one, each with its picture."""
    text = nano.transformer.fuse_text(nano.text_encoder.encode(["a red circle"])[0])
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = list(
        denoise(nano.transformer, noise, text, sigmas=sigma_schedule(10, 1.0), guidance=0,
                evaluate_every=2)
    )  # fmt: skip
    assert [step for step, _, _ in steps] == list(range(1, 11))
    assert all(predicted.shape == noise.shape for _, _, predicted in steps)
