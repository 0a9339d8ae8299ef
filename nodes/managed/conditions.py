"""Conditions of a run, as ComfyUI batches them and passes them to the model.

ComfyUI calls a model once for the positive and once for the negative conditioning unless both have
one shape, and so reads every weight twice a step. Texts that were fused before the run may share a
call: the shorter ones are padded at the front, and attention leaves the padding out, so an image is
the same as alone.
"""

from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import torch
import torch.nn.functional as F

from ...krea2_model.features.run_features import RunFeatures
from ...krea2_model.guidance import StepWindow
from ...krea2_model.transformer.references import ReferencePlan
from ...krea2_model.transformer.text_attention import NegativeGuidance
from .run_cache import RunCache

# Key of a CONDITIONING's token weights (B, L).
TOKEN_WEIGHTS = "krea2_token_weights"

# Key of (settings, states, options) of NAG's negative in a MODEL's transformer_options.
NEGATIVE_GUIDANCE = "krea2_negative_guidance"


class FusedText(comfy.conds.CONDRegular):
    """Text tokens (B, L, width); `shared` allows texts of other lengths in one call."""

    def __init__(self, cond, shared: bool):
        super().__init__(cond)
        self.shared = shared

    def _copy_with(self, cond):
        return type(self)(cond, self.shared)

    def can_concat(self, other):
        if self.cond.shape == other.cond.shape:
            return super().can_concat(other)
        return (
            self.shared
            and getattr(other, "shared", False)
            and self.cond.shape[2:] == other.cond.shape[2:]
            and self.cond.device == other.cond.device
        )

    def concat(self, others):
        texts = [self.cond, *(other.cond for other in others)]
        longest = max(text.shape[1] for text in texts)
        return torch.cat([F.pad(text, (0, 0, longest - text.shape[1], 0)) for text in texts])


class TextLengths(comfy.conds.CONDRegular):
    """Lengths of the texts of a call without padding: plain numbers, on no device."""

    def process_cond(self, batch_size, **kwargs):
        return self._copy_with(tuple(self.cond[i % len(self.cond)] for i in range(batch_size)))

    def can_concat(self, other):
        return True

    def concat(self, others):
        return sum((other.cond for other in others), self.cond)

    def size(self):
        return [len(self.cond)]


class PlanCondition(comfy.conds.CONDConstant):
    """A reference plan, whose size is the number of cached tokens."""

    def size(self):
        return [0 if self.cond.caches is None else self.cond.caches.tokens]


class FeaturesCondition(comfy.conds.CONDConstant):
    """Features of a run, whose size is the number of text tokens that they add to a call's."""

    def size(self):
        regions, own = self.cond.regions, self.cond.tile_texts
        tokens = 0 if regions is None else regions.tokens
        return [tokens + (0 if own is None else own.tokens)]


@dataclass(frozen=True)
class NegativeText:
    """The negative of NAG: text (B, L, width or features), mask and weights (B, L) or None."""

    states: torch.Tensor
    settings: NegativeGuidance
    window: StepWindow
    mask: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class RunConditions:
    """Conditions of our model beyond those of core's Krea 2.

    run_cache: None where weights or text may change during the run.
    text_lengths: of the texts of a call, where they may be padded at the front.
    token_weights: (B, L) of the call's text.
    """

    run_cache: RunCache | None = None
    text_lengths: tuple[int, ...] | None = None
    token_weights: torch.Tensor | None = None
    negative: NegativeText | None = None
    reference_plan: ReferencePlan | None = None
    features: RunFeatures = field(default_factory=RunFeatures)

    def to_conds(self) -> dict[str, Any]:
        """ComfyUI's conditions, which it batches, repeats and moves by their own rules."""
        constant, regular = comfy.conds.CONDConstant, comfy.conds.CONDRegular
        conds: dict[str, Any] = {}
        if self.run_cache is not None:
            conds["run_cache"] = constant(self.run_cache)
        if self.text_lengths is not None:
            conds["text_lengths"] = TextLengths(self.text_lengths)
        if self.token_weights is not None:
            conds["token_weights"] = regular(self.token_weights)
        if self.reference_plan is not None:
            conds["reference_plan"] = PlanCondition(self.reference_plan)
        if self.features:
            conds["run_features"] = FeaturesCondition(self.features)
        negative = self.negative
        if negative is not None:
            conds["negative_text"] = regular(negative.states)
            conds["negative_guidance"] = constant((negative.settings, negative.window))
            if negative.mask is not None:
                conds["negative_mask"] = regular(negative.mask)
            if negative.weights is not None:
                conds["negative_weights"] = regular(negative.weights)
        return conds

    @classmethod
    def from_kwargs(cls, kwargs: dict[str, Any]) -> "RunConditions":
        """The conditions of a call of the model, from its keyword arguments."""
        negative = None
        if "negative_text" in kwargs:
            settings, window = kwargs["negative_guidance"]
            negative = NegativeText(
                kwargs["negative_text"],
                settings,
                window,
                mask=kwargs.get("negative_mask"),
                weights=kwargs.get("negative_weights"),
            )
        return cls(
            run_cache=kwargs.get("run_cache"),
            text_lengths=kwargs.get("text_lengths"),
            token_weights=kwargs.get("token_weights"),
            negative=negative,
            reference_plan=kwargs.get("reference_plan"),
            features=kwargs.get("run_features") or RunFeatures(),
        )


def weights_of(extra: dict, context: torch.Tensor) -> torch.Tensor | None:
    """The token weights (B, L) of a conditioning of L tokens, or None.

    Nodes that join texts keep the options of the first: tokens joined on later get weight 1.
    """
    weights = extra.get(TOKEN_WEIGHTS)
    if weights is None:
        return None
    tokens = context.shape[1]
    return F.pad(weights, (0, max(0, tokens - weights.shape[1])), value=1.0)[:, :tokens]
