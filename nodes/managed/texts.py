"""Text of different length in one call of the model.

ComfyUI calls a model once for the positive and once for the negative conditioning unless both have
one shape, and so reads every weight twice a step. Texts that were fused before the run may share a
call: the shorter ones are padded in front, and attention leaves the padding out, so an image is
what it would be alone.
"""

import comfy.conds
import torch
import torch.nn.functional as F

# Up to so many image tokens a call is faster shared (benchmarks/sharing.py): reading weights and
# starting kernels weigh more than what the second text adds.
SMALL_IMAGE = 1024


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
