"""The flow: time shift, schedule, guidance and the Euler loop.

Time runs from 1 (noise) to 0 (image) and the model predicts `noise - image`, so a step is
`x + (next - now) * v`. The shift, the schedule and the guidance convention are those of
krea-ai/krea-2, sampling.py. `sigmas` always means final values: shifted, ending in 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .config import Preset
from .extrapolation import VelocityExtrapolation
from .guidance import ALWAYS, GuidanceSchedule, SigmaAt, rescaled, unshifted
from .transformer.backend import ExtendedBackend
from .transformer.model import Krea2Transformer
from .transformer.modulation import RunModulation
from .transformer.references import TIME_ZERO, Reference, ReferenceKVCache
from .transformer.shared_calls import share
from .transformer.text_attention import NegativeGuidance, TextAttention, TextStates

# The exponent of the shift is linear in image tokens through these two points.
_MU_TOKENS = (256, 6400)
_MU_VALUES = (0.5, 1.15)

# Far beyond any use, and what floating point still takes.
MAX_STEPS, MAX_MU, MAX_GUIDANCE = 10_000, 100, 100.0

# What torch and ComfyUI take.
MAX_SEED = 2**64 - 1

FusedText = Tensor | tuple[Tensor, Tensor | None] | TextStates


def shift_mu(image_tokens: int) -> float:
    """Exponent of the time shift for an image of so many tokens (one covers 16 x 16 px).

    Linear and not clamped: 0.5 at 256 tokens, 0.90625 at 1024 x 1024 px, 1.15 at 6400 tokens.
    """
    if image_tokens < 1:
        raise ValueError(f"image_tokens is {image_tokens}; expected at least 1.")
    slope = (_MU_VALUES[1] - _MU_VALUES[0]) / (_MU_TOKENS[1] - _MU_TOKENS[0])
    return _MU_VALUES[0] + slope * (image_tokens - _MU_TOKENS[0])


def shift_time(time: float, mu: float) -> float:
    """`e^mu / (e^mu + 1/t - 1)`: the exponential time shift of a time in [0, 1]."""
    return math.exp(mu) / (math.exp(mu) + (1 / time - 1)) if time > 0 else 0.0


def unshift_time(sigma: float, mu: float) -> float:
    """The time whose shift is `sigma`, from 0 (image) to 1 (noise): what denoise counts in."""
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma is {sigma!r}; expected a number from 0 (image) to 1 (noise).")
    return 1 / (1 + math.exp(mu) * (1 / sigma - 1)) if sigma > 0 else 0.0


def schedule_of(
    sigmas: Sequence[float], preset: Preset | None = None, image_tokens: int = 4096
) -> SigmaAt:
    """The sigma at each part of the time of the schedule that a run's sigmas belong to.

    What `sigma_schedule` made tells its mu. Of other sigmas, and where there are too few to tell,
    the mu is the checkpoint's: that of its preset, or by size.
    """
    mu = _mu_of(sigmas)
    if mu is None:
        mu = preset.mu if preset is not None and preset.mu is not None else shift_mu(image_tokens)
    return lambda part: shift_time(1.0 - part, mu)


def _mu_of(sigmas: Sequence[float]) -> float | None:
    """The exponent of what `sigma_schedule(steps, mu, denoise)` made, None for other sigmas."""
    steps = len(sigmas) - 1
    if steps < 2:
        return None
    # A time t has 1/t = 1 + e^mu (1/sigma - 1), and the first and the last step's are as steps : 1.
    first, last = 1 / min(1.0, sigmas[0]) - 1, 1 / sigmas[-2] - 1
    grown = last - steps * first
    if grown <= 0:
        return None
    mu = math.log((steps - 1) / grown)
    denoise = 1 / (1 + math.exp(mu) * first)
    made = (shift_time(denoise * (1 - i / steps), mu) for i in range(steps + 1))
    same = all(abs(a - b) < 1e-5 for a, b in zip(made, sigmas, strict=True))
    return mu if same else None


def sigma_schedule(steps: int, mu: float, denoise: float = 1.0) -> list[float]:
    """Final sigmas of a run: steps + 1 values down to 0, evenly spaced before the shift.

    denoise: the time to start from; below 1 the run begins at an image with noise added instead
        of at pure noise, and still takes `steps` steps.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps!r}; expected a whole number from 1 to {MAX_STEPS}.")
    if not abs(mu) <= MAX_MU:
        raise ValueError(
            f"mu is {mu!r}; expected a number from -{MAX_MU} to {MAX_MU} (Turbo uses 1.15)."
        )
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise!r}; expected more than 0 and at most 1.")
    return [shift_time(denoise * (1 - i / steps), mu) for i in range(steps + 1)]


def check_sigmas(sigmas: Sequence[float]) -> list[float]:
    """Custom sigmas as floats. Raises ValueError unless they fall from at most 1 to exactly 0."""
    values = [float(sigma) for sigma in sigmas]
    if len(values) < 2 or values[-1] != 0 or not all(map(math.isfinite, values)):
        raise ValueError(
            f"sigmas is {values}; expected at least two final (shifted) values that end in 0, "
            "as sigma_schedule() returns them."
        )
    if values[0] > 1 + 1e-6 or any(a <= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"sigmas is {values}; expected values that fall from at most 1 to 0.")
    return values


def check_guidance(guidance: float) -> float:
    """Guidance as a float. Raises ValueError where it is not a number from 0 to `MAX_GUIDANCE`."""
    if not 0 <= guidance <= MAX_GUIDANCE:  # NaN too
        raise ValueError(
            f"guidance is {guidance!r}; expected 0 (off) or more, up to {MAX_GUIDANCE:g}, in "
            "Krea's convention: v = cond + guidance * (cond - uncond), which is ComfyUI's cfg - 1."
        )
    return float(guidance)


def check_seed(seed: int) -> int:
    """A seed as an int. Raises ValueError where it is not a whole number from 0 to `MAX_SEED`."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to {MAX_SEED}.")
    return int(seed)


def denoise(
    transformer: Krea2Transformer,
    noise: Tensor,
    positive: FusedText,
    negative: FusedText | None = None,
    *,
    sigmas: Sequence[float],
    guidance: float,
    evaluate_every: int = 1,
    guidance_schedule: GuidanceSchedule = ALWAYS,
    negative_guidance: NegativeGuidance | None = None,
    references: Sequence[Tensor | Reference] | None = None,
    reference_method: str = TIME_ZERO,
    cache_references: bool = False,
    share_calls: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Euler steps from noise to an image, one a `next()`.

    noise: (B, 16, h, w), the latents at `sigmas[0]`. They stay in float32 between steps, whatever
        the dtype of the model: rounding them to bfloat16 costs more accuracy than the steps do.
    positive, negative: text from `fuse_text`, (B, L, width), or `(text, mask)`, or `TextStates`,
        which may have weights.
    sigmas: final values, see `sigma_schedule`.
    guidance: 0 runs the positive text alone; above 0 needs a negative (the encoded empty prompt,
        unless the user asks for another).
    evaluate_every: 2 or more leaves the model out of later steps, which is faster and not exact,
        see `forecast`.
    guidance_schedule: in which part of the schedule guidance counts, and how much; all of it
        everywhere. This and the windows of references and of negative_guidance are parts of the
        schedule's time, see `guidance` and `schedule_of`.
    negative_guidance: leads away from the negative inside attention, also at guidance 0.
    references, reference_method: images to look at, see `Krea2Transformer` and `Reference`.
    cache_references: they see themselves alone, so they are gone through once and not at each
        step. Faster, and not what LoRAs were trained with. Only at time 0.
    share_calls: guide in one call of the model a step, with twice the batch, where texts have no
        weights and attention does nothing else.

    Yields `(step, latents, predicted)` after each step, counted from 1; `predicted` is the image
    the model sees at that step (x0). Stop iterating to cancel.
    Raises ValueError for bad arguments at once, and at the step where NaN or infinity appears.
    """
    sigmas = check_sigmas(sigmas)
    guidance = check_guidance(guidance)
    if guidance > 0 and negative is None:
        raise ValueError(
            f"guidance is {guidance} but there is no negative text. Pass the fused empty prompt "
            "as negative, or guidance=0."
        )
    if negative_guidance is not None and negative is None:
        raise ValueError(
            "There is negative_guidance but no negative text. Pass the fused text that is to be "
            "led away from as negative."
        )
    if cache_references and reference_method != TIME_ZERO:
        raise ValueError(
            f"References are kept apart by reference_method {reference_method!r}; expected "
            f"{TIME_ZERO!r}, since otherwise they change with every step."
        )
    extrapolation = VelocityExtrapolation(len(sigmas) - 1, evaluate_every)
    rows, columns = (-(-side // 2) for side in noise.shape[-2:])
    sigma_at = schedule_of(sigmas, getattr(transformer, "preset", None), rows * columns)
    texts = _text_states(positive), _text_states(negative)
    beside = _References(references or (), reference_method, cache_references)
    return _euler(
        transformer,
        noise.float(),
        texts,
        sigmas,
        guidance,
        extrapolation,
        guidance_schedule,
        negative_guidance,
        beside,
        sigma_at,
        share(*texts) if share_calls else None,
    )


def denoise_two_stage(
    raw: Krea2Transformer,
    turbo: Krea2Transformer,
    noise: Tensor,
    raw_texts: tuple[FusedText, FusedText | None],
    turbo_text: FusedText,
    *,
    sigmas: tuple[Sequence[float], Sequence[float]],
    guidance: float,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Euler steps of Raw with guidance, then of Turbo without; else as `denoise`.

    raw_texts: positive and negative, fused by `raw`; turbo_text: the positive, fused by `turbo`.
    sigmas: of both, see `two_stage_sigmas`; the second begins where the first ends.
    """
    first, second = sigmas
    guidance = check_guidance(guidance)
    if first[-1] != second[0]:
        raise ValueError(f"Raw ends at sigma {first[-1]} and Turbo begins at {second[0]}.")
    check_sigmas([*first, *second[1:]])
    if guidance > 0 and raw_texts[1] is None:
        raise ValueError(f"guidance is {guidance} but raw_texts has no negative.")

    def stages() -> Iterator[tuple[int, Tensor, Tensor]]:
        latents = noise.float()
        every_step = VelocityExtrapolation(len(first), 1)
        texts = tuple(map(_text_states, raw_texts))
        for step, current, predicted in _euler(raw, latents, texts, first, guidance, every_step):
            latents = current
            yield step, current, predicted
        texts = (_text_states(turbo_text), None)
        for step, current, predicted in _euler(turbo, latents, texts, second, 0.0, every_step):
            yield len(first) - 1 + step, current, predicted

    return stages()


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


def _euler(
    transformer,
    latents,
    texts,
    sigmas,
    guidance,
    extrapolation,
    schedule=ALWAYS,
    negative_guidance=None,
    references=None,
    sigma_at=unshifted,
    shared=None,
):
    blocks, of_run = getattr(transformer, "blocks", None), {}
    if blocks is not None:  # what stands in for a transformer may have none
        with torch.no_grad():
            of_run = {"modulation": RunModulation(blocks, latents.device)}
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False), start=1):
        with torch.no_grad():
            if extrapolation.should_skip(step - 1):
                velocity = extrapolation.velocity(sigma)
            else:
                inside = negative_guidance
                if inside is not None and not inside.works_at(
                    sigma, sigma_at(inside.start), sigma_at(inside.end)
                ):
                    inside = None
                beside = dict(of_run)
                if references is not None:
                    dtype = texts[0].states.dtype
                    beside |= references.at(sigma, sigma_at, transformer, dtype)
                factor, rescale = schedule.factor(sigma, sigma_at), schedule.rescale
                velocity = _velocity(
                    transformer, latents, sigma, texts, guidance * factor, rescale, inside,
                    shared, **beside,
                )  # fmt: skip
                extrapolation.record(sigma, velocity)
            if not torch.isfinite(velocity).all():
                raise ValueError(
                    f"The model returned NaN or infinite values at step {step} (sigma {sigma:.4f}, "
                    f"{transformer.compute_dtype}). Try bfloat16 or float32, or another file."
                )
            predicted = latents - sigma * velocity
            latents = latents + (sigma_next - sigma) * velocity
        yield step, latents, predicted


class _References:
    """Those of a run, and what is kept of them where they are gone through once."""

    def __init__(self, references, method: str, apart: bool):
        given = [r if isinstance(r, Reference) else Reference(r) for r in references]
        # Each keeps its place while others come and go.
        self._references = [replace(r, index=r.index or n) for n, r in enumerate(given, 1)]
        self._method, self._apart = method, apart
        self._recorded: dict[tuple[int, ...], ReferenceKVCache] = {}

    def at(
        self, sigma: float, sigma_at: SigmaAt, transformer: Krea2Transformer, dtype: torch.dtype
    ) -> dict:
        """What a step that begins at a sigma of a schedule is called with."""
        there = [
            at
            for at, reference in enumerate(self._references)
            if reference.is_there(sigma, sigma_at(reference.start), sigma_at(reference.end))
        ]
        references = [self._references[at] for at in there]
        if not references:
            return {}
        if not self._apart:
            return {"references": references, "reference_method": self._method}
        if tuple(there) not in self._recorded:
            self._recorded[tuple(there)] = transformer.record(references, dtype)
        return {"recorded": self._recorded[tuple(there)]}


def _velocity(
    transformer,
    latents,
    sigma,
    texts,
    guidance,
    rescale,
    inside,
    shared=None,
    recorded=None,
    **beside,
) -> Tensor:
    """`cond + guidance * (cond - uncond)` in float32, rescaled.

    `inside` guides the attention of cond; `shared` are both texts for one call; `beside` are the
    references and the modulation of the call.
    """
    timestep = torch.full((latents.shape[0],), sigma, device=latents.device)

    def velocity(text: TextStates, against: TextStates | None = None) -> Tensor:
        options = dict(beside)
        if text.weights is not None or against is not None or recorded is not None:
            settings = None if against is None else inside
            attention = TextAttention(text.weights, text.mask, against, settings)
            options["backend"] = ExtendedBackend(attention, recorded)
        return transformer(latents, timestep, text.states, text.mask, **options).float()

    positive, negative = texts
    if shared is not None and guidance != 0 and inside is None and recorded is None:
        conditional, other = shared.velocities(transformer, latents, timestep, **beside)
    else:
        conditional = velocity(positive, None if inside is None else negative)
        if guidance == 0:
            return conditional
        other = velocity(negative)
    guided = conditional + guidance * (conditional - other)
    return rescaled(guided, conditional, rescale)


def _text_states(text: FusedText | None) -> TextStates | None:
    if text is None or isinstance(text, TextStates):
        return text
    return TextStates(*text) if isinstance(text, tuple) else TextStates(text)
