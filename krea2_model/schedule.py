"""The schedule: exponential time shift, sigmas, and checks of steps, guidance and seeds.

Time runs from 1 (noise) to 0 (image). The exponent mu decides the shift: the preset of a run fixes
it (Turbo 1.15) or leaves it to the image's size (Raw), see `resolve_mu`. The preset is that of a
few-step LoRA or else the checkpoint's (`Krea2Pipeline.preset`), in ComfyUI the node's choice
(nodes/sampler_run.py). A user's own mu is `shift: fixed` of the nodes, `--mu`, and in Python the
sigmas of `sigma_schedule`. Shift and schedule are those of krea-ai/krea-2, sampling.py. `sigmas`
always means final values: shifted, ending in 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .checks import is_number, is_whole, numbers
from .config import Preset
from .guidance import SigmaAt

# The exponent of the shift is linear in image tokens through these two points.
_MU_TOKENS = (256, 6400)
_MU_VALUES = (0.5, 1.15)

# Far beyond any use, and within what floating point can hold.
MAX_STEPS, MAX_MU, MAX_GUIDANCE = 10_000, 100, 100.0

# The largest seed of torch and ComfyUI.
MAX_SEED = 2**64 - 1


def shift_mu(image_tokens: int) -> float:
    """Exponent of the time shift for an image of so many tokens (one covers 16 x 16 px).

    Linear and not clamped: 0.5 at 256 tokens, 0.90625 at 1024 x 1024 px, 1.15 at 6400 tokens.
    """
    if not is_number(image_tokens) or image_tokens < 1:
        raise ValueError(f"image_tokens is {image_tokens!r}; expected at least 1.")
    slope = (_MU_VALUES[1] - _MU_VALUES[0]) / (_MU_TOKENS[1] - _MU_TOKENS[0])
    return _MU_VALUES[0] + slope * (image_tokens - _MU_TOKENS[0])


def resolve_mu(preset: Preset | None, image_tokens: int) -> float:
    """The mu of a run: that of the preset (Turbo 1.15), or by size where it has none (Raw)."""
    if preset is not None and preset.mu is not None:
        return preset.mu
    return shift_mu(image_tokens)


def shift_time(time: float, mu: float) -> float:
    """`e^mu / (e^mu + 1/t - 1)`: the exponential time shift of a time in [0, 1]."""
    return math.exp(mu) / (math.exp(mu) + (1 / time - 1)) if time > 0 else 0.0


def unshift_time(sigma: float, mu: float) -> float:
    """The time whose shift is `sigma`, from 0 (image) to 1 (noise): the unit of denoise."""
    if not (is_number(sigma) and 0 <= sigma <= 1):
        raise ValueError(f"sigma is {sigma!r}; expected a number from 0 (image) to 1 (noise).")
    return 1 / (1 + math.exp(mu) * (1 / sigma - 1)) if sigma > 0 else 0.0


def schedule_of(
    sigmas: Sequence[float], preset: Preset | None = None, image_tokens: int = 4096
) -> SigmaAt:
    """The sigma at each fraction of the time of the schedule that a run's sigmas belong to.

    The mu of sigmas that `sigma_schedule` made can be computed. For other sigmas, and too few of
    them, it is the checkpoint's: that of its preset, or by size.
    """
    mu = _mu_of(sigmas)
    if mu is None:
        mu = resolve_mu(preset, image_tokens)
    return lambda fraction: shift_time(1.0 - fraction, mu)


def _mu_of(sigmas: Sequence[float]) -> float | None:
    """The mu of sigmas made by `sigma_schedule(steps, mu, denoise)`, None for other sigmas."""
    steps = len(sigmas) - 1
    if steps < 2:
        return None
    # For a time t, 1/t = 1 + e^mu (1/sigma - 1); times of the first and last step are as steps : 1.
    first, last = 1 / min(1.0, sigmas[0]) - 1, 1 / sigmas[-2] - 1
    difference = last - steps * first
    if difference <= 0:
        return None
    mu = math.log((steps - 1) / difference)
    denoise = 1 / (1 + math.exp(mu) * first)
    schedule = (shift_time(denoise * (1 - i / steps), mu) for i in range(steps + 1))
    is_same = all(abs(a - b) < 1e-5 for a, b in zip(schedule, sigmas, strict=True))
    return mu if is_same else None


def sigma_schedule(steps: int, mu: float, denoise: float = 1.0) -> list[float]:
    """Final sigmas of a run: steps + 1 values down to 0, evenly spaced before the shift.

    denoise: the time to start from; below 1 the run begins at an image with noise added instead
        of at pure noise, and still takes `steps` steps.
    """
    if not (is_whole(steps) and 1 <= steps <= MAX_STEPS):
        raise ValueError(f"steps is {steps!r}; expected a whole number from 1 to {MAX_STEPS}.")
    if not (is_number(mu) and abs(mu) <= MAX_MU):
        raise ValueError(
            f"mu is {mu!r}; expected a number from -{MAX_MU} to {MAX_MU} (Turbo uses 1.15)."
        )
    if not (is_number(denoise) and 0 < denoise <= 1):
        raise ValueError(f"denoise is {denoise!r}; expected more than 0 and at most 1.")
    return [shift_time(denoise * (1 - i / steps), mu) for i in range(steps + 1)]


def check_sigmas(sigmas: Sequence[float], partial: bool = False) -> list[float]:
    """Custom sigmas as floats. Raises ValueError unless they fall from at most 1 to exactly 0.

    partial: let them end above 0.
    """
    expected = "at least two final (shifted) values that end in 0, as sigma_schedule() returns them"
    values = numbers("sigmas", sigmas, expected)
    if (
        len(values) < 2
        or not all(map(math.isfinite, values))
        or (values[-1] < 0 if partial else values[-1] != 0)
    ):
        raise ValueError(f"sigmas is {values}; expected {expected}.")
    if values[0] > 1 + 1e-6 or any(a <= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"sigmas is {values}; expected values that fall from at most 1 to 0.")
    return values


def check_guidance(guidance: float) -> float:
    """Guidance as a float. Raises ValueError where it is not a number from 0 to `MAX_GUIDANCE`."""
    if not (is_number(guidance) and 0 <= guidance <= MAX_GUIDANCE):  # NaN too
        raise ValueError(
            f"guidance is {guidance!r}; expected 0 (off) or more, up to {MAX_GUIDANCE:g}, in "
            "Krea's convention: v = cond + guidance * (cond - uncond), which is ComfyUI's cfg - 1."
        )
    return float(guidance)


def check_seed(seed: int) -> int:
    """A seed as an int. Raises ValueError where it is not a whole number from 0 to `MAX_SEED`."""
    if not (is_whole(seed) and 0 <= seed <= MAX_SEED):
        raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to {MAX_SEED}.")
    return int(seed)


def two_stage_sigmas(
    raw_steps: int, raw_mu: float, turbo_steps: int, turbo_mu: float, turbo_last: int
) -> tuple[list[float], list[float]]:
    """Sigmas of Raw down to a sigma of Turbo's grid, and of Turbo's last steps from there to 0.

    raw_steps, raw_mu: of a whole run of Raw, which is left where Turbo takes over.
    turbo_last: how many of `turbo_steps` are Turbo's.
    """
    if not 1 <= turbo_last < turbo_steps:
        raise ValueError(
            f"turbo_last is {turbo_last}; expected 1 to {turbo_steps - 1}, fewer than Turbo's "
            f"{turbo_steps} steps."
        )
    second = sigma_schedule(turbo_steps, turbo_mu)[-turbo_last - 1 :]
    first = [sigma for sigma in sigma_schedule(raw_steps, raw_mu) if sigma > second[0]]
    return [*first, second[0]], second
