"""The flow: classifier-free guidance and the Euler loop.

Time runs from 1 (noise) to 0 (image) and the model predicts `noise - image`, so a step is
`x + (next - now) * v`. Guidance follows krea-ai/krea-2, sampling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .extrapolation import VelocityExtrapolation
from .features.inpainting import LatentMask, MaskedVelocity
from .features.run_features import RunFeatures, StepFeatures
from .features.style_transfer import StyleRun
from .features.tiles import Tile, fuse
from .guidance import ALWAYS, NEVER, GuidanceSchedule, SigmaAt, rescaled
from .schedule import check_guidance, check_sigmas, schedule_of
from .transformer.backend import ExtendedBackend
from .transformer.model import Krea2Transformer
from .transformer.modulation import RunModulation
from .transformer.patches import PATCH, grid_size, token_count
from .transformer.references import (
    TIME_ZERO,
    Reference,
    ReferenceCaches,
    ReferenceKVCache,
    ReferencePlan,
)
from .transformer.shared_calls import SharedTexts, share
from .transformer.style_attention import StyleRecorder
from .transformer.text_attention import NegativeGuidance, TextAttention, TextStates

FusedText = Tensor | tuple[Tensor, Tensor | None] | TextStates
# Of the step that begins at a sigma, where LoRAs on text act in some steps.
TextAt = Callable[[float], TextStates]
# Of latents at a sigma.
Velocity = Callable[[Tensor, float], Tensor]


def denoise(
    transformer: Krea2Transformer,
    noise: Tensor,
    positive: FusedText | TextAt,
    negative: FusedText | TextAt | None = None,
    *,
    sigmas: Sequence[float],
    guidance: float,
    partial: bool = False,
    evaluate_every: int = 1,
    guidance_schedule: GuidanceSchedule = ALWAYS,
    negative_guidance: NegativeGuidance | None = None,
    references: Sequence[Tensor | Reference] | None = None,
    reference_method: str = TIME_ZERO,
    cache_references: bool = False,
    share_calls: bool = False,
    inpaint: LatentMask | None = None,
    features: RunFeatures | None = None,
    blend: tuple[FusedText | TextAt, float] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Euler steps from noise to an image, one a `next()`.

    noise: (B, 16, h, w), the latents at `sigmas[0]`. They stay in float32 between steps, whatever
        the dtype of the model: rounding them to bfloat16 costs more accuracy than the steps do.
    positive, negative: text from `fuse_text`, (B, L, width), or `(text, mask)`, or `TextStates`,
        which may have weights; or a function that gives the `TextStates` of a step by its sigma.
    sigmas: final values, see `sigma_schedule`.
    guidance: 0 evaluates the positive text alone; above 0 needs a negative (the encoded empty
        prompt, unless the user gives another).
    partial: let `sigmas` end above 0. The result is then a noisy latent for another model to
        finish, see `two_stage_sigmas`.
    evaluate_every: 2 or more skips the model at later steps, which is faster and not exact, see
        `extrapolation`.
    guidance_schedule: a factor on guidance along the run. Its window and those of references and
        of negative_guidance are fractions of the schedule's time, see `guidance`.
    negative_guidance: NAG with the negative text, also at guidance 0.
    references, reference_method: reference images, see `Krea2Transformer` and `Reference`.
    cache_references: references attend only to themselves, so their keys and values are computed
        once and not at each step. Faster, and not as LoRAs were trained. Only at time zero.
    inpaint: the part of the latents to paint; the rest is put back at every step.
    features: regional prompts, control LoRAs, LoRAs that act on some steps and tokens.
    share_calls: evaluate both texts in one call with twice the batch, where they have no weights
        and neither NAG nor cached references take part.
    blend: another positive text and the share of its velocity, above 0 and below 1.

    Yields `(step, latents, predicted)` after each step, counted from 1; `predicted` is the image
    that the model predicts at that step (x0). Stop iterating to cancel.
    Raises ValueError for bad arguments at once, and at the step where NaN or infinity appears.
    """
    sigmas = check_sigmas(sigmas, partial)
    guidance = check_guidance(guidance)
    if guidance > 0 and negative is None:
        raise ValueError(
            f"guidance is {guidance} but there is no negative text. Pass the fused empty prompt "
            "as negative, or guidance=0."
        )
    if negative_guidance is not None and negative is None:
        raise ValueError(
            "There is negative_guidance but no negative text. Pass the fused negative prompt as "
            "negative."
        )
    extrapolation = VelocityExtrapolation(len(sigmas) - 1, evaluate_every)
    sigma_at = schedule_of(sigmas, getattr(transformer, "preset", None), token_count(noise))
    images = [r if isinstance(r, Reference) else Reference(r) for r in references or ()]
    caches = ReferenceCaches() if cache_references else None
    settings = [reference.settings for reference in images]
    plan = ReferencePlan.of(settings, sigma_at, reference_method, caches)
    if features is not None:
        features.check_tiles(plan)
    texts = _text_at(positive), None if negative is None else _text_at(negative)
    shared = None
    is_plain = not features and not plan.has_boosts and blend is None
    if share_calls and texts[1] is not None and is_plain:
        shared = share(texts[0](sigmas[0]), texts[1](sigmas[0]))
    velocity = _GuidedVelocity(
        transformer,
        texts,
        guidance,
        guidance_schedule,
        negative_guidance,
        sigma_at,
        plan,
        [reference.latents for reference in images],
        shared,
        features or RunFeatures(),
        sigmas,
        None if blend is None else (_text_at(blend[0]), blend[1]),
    )
    velocity_at: Velocity = velocity
    if inpaint is not None:
        velocity_at = MaskedVelocity(velocity, inpaint, sigmas[0], sigma_at)
    return _euler(transformer, velocity_at, noise.float(), sigmas, extrapolation)


class _GuidedVelocity:
    """The velocity `cond + guidance * (cond - uncond)` of one run, in float32, rescaled."""

    def __init__(
        self,
        transformer: Krea2Transformer,
        texts: tuple[TextAt, TextAt | None],
        guidance: float,
        schedule: GuidanceSchedule,
        nag: NegativeGuidance | None,
        sigma_at: SigmaAt,
        plan: ReferencePlan,
        reference_latents: Sequence[Tensor],
        shared: SharedTexts | None,
        features: RunFeatures,
        sigmas: Sequence[float],
        blend: tuple[TextAt, float] | None,
    ):
        self.transformer, self._features, self._sigmas = transformer, features, sigmas
        self._positive, self._negative = texts
        self._guidance, self._schedule, self._sigma_at = guidance, schedule, sigma_at
        self._nag, self._nag_window = nag, NEVER if nag is None else nag.window(sigma_at)
        self._plan, self._reference_latents = plan, reference_latents
        self._shared, self._blend = shared, blend
        self._modulation: RunModulation | None = None

    def __call__(self, latents: Tensor, sigma: float) -> Tensor:
        grid = grid_size(latents, PATCH)
        if self._features.style is not None:
            self._prepare_style(self._features.style, sigma, latents.device)
        tiles = self._features.tiles_at(sigma, grid)
        if tiles is None:
            return self._velocity(latents, sigma, grid)

        def velocity_of(group: list[Tile], parts: Tensor) -> Tensor:
            return self._velocity(parts, sigma, grid, group)

        return fuse(latents, tiles, velocity_of, self._features.tiles_at_once(self._plan))

    def _velocity(
        self,
        latents: Tensor,
        sigma: float,
        image: tuple[int, int],
        tiles: Sequence[Tile] = (),
    ) -> Tensor:
        """The velocity of an image (B, C, h, w), or of tiles of it (N * B, C, h, w).

        image: rows and columns of its tokens. tiles: several have the same features.
        """
        tile, times = (tiles[0], len(tiles)) if tiles else (None, 1)
        guidance = self._guidance * self._schedule.factor(sigma, self._sigma_at)
        nag = self._nag if self._nag_window.contains(sigma) else None
        references = self._plan.active(sigma, self._reference_latents)
        references = self._features.references_of(references, tile, image)
        references = [r.repeated(times) for r in references]
        options, cache = self._options(references, sigma, latents.device)
        timestep = torch.full((latents.shape[0],), sigma, device=latents.device)
        if self._shared is not None and guidance != 0 and nag is None and cache is None:
            conditional, unconditional = self._shared.velocities(
                self.transformer, latents, timestep, **options
            )
        else:
            step = self._features.at(sigma, image, latents.device, tiles)
            step = step.with_references(references)
            inputs = (latents, timestep, options, cache)
            own, text = self._features.tile_texts, self._positive
            positive = (text if own is None else own.of(tile))(sigma).repeated(times)
            negative = None
            if self._negative is not None and (guidance != 0 or nag is not None):
                negative = self._negative(sigma).repeated(times)
            other = negative if nag is not None else None
            conditional = self._evaluate(*inputs, positive, step, other, nag)
            if self._blend is not None:
                blended_text = self._blend[0](sigma).repeated(times)
                blended = self._evaluate(*inputs, blended_text, step, other, nag)
                conditional = torch.lerp(conditional, blended, self._blend[1])
            if guidance == 0:
                return conditional
            assert negative is not None  # checked by denoise
            unconditional = self._evaluate(*inputs, negative, step.for_negative())
        guided = conditional + guidance * (conditional - unconditional)
        return rescaled(guided, conditional, self._schedule.rescale)

    def _evaluate(
        self,
        latents: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
        cache: ReferenceKVCache | None,
        text: TextStates,
        step: StepFeatures,
        negative: TextStates | None = None,
        nag: NegativeGuidance | None = None,
    ) -> Tensor:
        """The velocity for one text, in float32. options, cache: of `_options`."""
        states, mask = step.join(text.states, text.mask)
        attention, backend = None, {}
        if text.weights is not None or negative is not None or step.texts:
            attention = TextAttention(text.weights, text.mask, negative, nag, step.texts)
        groups, style = step.groups, step.style_keys(self.transformer)
        if any(part is not None for part in (attention, cache, groups, style)):
            backend["backend"] = ExtendedBackend(attention, cache, groups, style)
        front = 0 if attention is None else attention.front
        references = sum(token_count(r.latents) for r in options.get("references", ()))
        with step.live(self.transformer, states.shape[1], references, front):
            options = {**options, **step.places, **backend}
            velocity = self.transformer(latents, timestep, states, mask, **options)
        return velocity.float()

    def _prepare_style(self, style: StyleRun, sigma: float, device: torch.device) -> None:
        """Compute the keys and values of style pictures for a step."""
        options, _ = self._options([], sigma, device)

        def evaluate(latents: Tensor, at: float, recorder: StyleRecorder | None) -> Tensor:
            batch, text = len(latents), style.text
            timestep = torch.full((batch,), at, device=device)
            states = text.states.expand(batch, -1, -1)
            call = dict(options)
            if recorder is not None:
                call["backend"] = ExtendedBackend(None, recorder)
            velocity = self.transformer(latents.to(device), timestep, states, None, **call)
            return velocity.float()

        style.prepare(sigma, self._sigmas, len(self.transformer.blocks), evaluate)

    def _options(
        self, references: list[Reference], sigma: float, device: torch.device
    ) -> tuple[dict[str, Any], ReferenceKVCache | None]:
        """Arguments of the model at a step, and the KV cache of its references or None."""
        options: dict[str, Any] = {}
        # A stand-in for a transformer may have no blocks.
        blocks = getattr(self.transformer, "blocks", None)
        if blocks is not None:
            if self._modulation is None:
                self._modulation = RunModulation(blocks, device)
            options["modulation"] = self._modulation
        if not references:
            return options, None
        if self._plan.caches is None:
            options |= {"references": references, "reference_method": self._plan.method}
            return options, None
        dtype = self._positive(sigma).states.dtype
        cache = self._plan.caches.get(
            references, lambda: self.transformer.cache_references(references, dtype)
        )
        return options, cache


def _euler(
    transformer: Krea2Transformer,
    velocity_at: Velocity,
    latents: Tensor,
    sigmas: list[float],
    extrapolation: VelocityExtrapolation,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False), start=1):
        with torch.no_grad():
            if extrapolation.should_skip(step - 1):
                velocity = extrapolation.velocity(sigma)
            else:
                velocity = velocity_at(latents, sigma)
                extrapolation.record(sigma, velocity)
            if not torch.isfinite(velocity).all():
                dtype = transformer.compute_dtype
                raise ValueError(
                    f"The model returned NaN or infinite values at step {step} (sigma {sigma:.4f}, "
                    f"{dtype}). Try bfloat16 or float32, or another file."
                )
            predicted = latents - sigma * velocity
            latents = latents + (sigma_next - sigma) * velocity
        yield step, latents, predicted


def _text_at(text: FusedText | TextAt) -> TextAt:
    if isinstance(text, TextStates):
        states = text
    elif isinstance(text, Tensor):
        states = TextStates(text)
    elif isinstance(text, tuple):
        states = TextStates(*text)
    else:
        return text
    return lambda sigma: states
