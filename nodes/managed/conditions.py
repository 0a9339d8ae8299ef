"""What of text travels to the model: fused tokens, their weights, a negative to lead away from.

ComfyUI calls a model once for the positive and once for the negative conditioning unless both have
one shape, and so reads every weight twice a step. Texts that were fused before the run may share a
call: the shorter ones are padded in front, and attention leaves the padding out, so an image is
what it would be alone.
"""

from typing import NamedTuple

import comfy.conds
import torch
import torch.nn.functional as F

from ...krea2_model.transformer.shared_calls import SMALL_IMAGE as SMALL_IMAGE
from ...krea2_model.transformer.text_attention import NegativeGuidance

# Where CONDITIONING holds the weights (B, L) of its tokens.
TOKEN_WEIGHTS = "krea2_token_weights"

# Where a MODEL's transformer_options hold (settings, conditioning, what comes with it).
NEGATIVE_GUIDANCE = "krea2_negative_guidance"


class FusedText(comfy.conds.CONDRegular):
    """Text tokens (B, L, width); `shared` says whether other lengths may join in a call."""

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
    """How many tokens of each text of a call are its own: plain numbers, on no device."""

    def process_cond(self, batch_size, **kwargs):
        return self._copy_with(tuple(self.cond[i % len(self.cond)] for i in range(batch_size)))

    def can_concat(self, other):
        return True

    def concat(self, others):
        return sum((other.cond for other in others), self.cond)

    def size(self):
        return [len(self.cond)]


class NegativeWindow(NamedTuple):
    """Settings of a negative, and the sigmas at the ends of the steps in which it works."""

    settings: NegativeGuidance
    first: float
    last: float

    def holds(self, sigma: float) -> bool:
        return self.settings.works_at(sigma, self.first, self.last)


def weights_of(extra: dict, context: torch.Tensor) -> torch.Tensor | None:
    """The weights that come with a conditioning, (B, L) as it has tokens, or None.

    Nodes that join texts keep what came with the first: tokens behind it have no weight.
    """
    weights = extra.get(TOKEN_WEIGHTS)
    if weights is None:
        return None
    tokens = context.shape[1]
    return F.pad(weights, (0, max(0, tokens - weights.shape[1])), value=1.0)[:, :tokens]
