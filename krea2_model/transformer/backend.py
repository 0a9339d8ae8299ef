"""What a host may do inside a forward pass of the transformer, and what attention may do more."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from ..nn.attention import attend
from ..nn.kernels import HeadNorm, modulated_norm, norm_and_rotate
from .modulation import StepModulation, for_blocks
from .references import KVRecorder, ReferenceKVCache
from .text_attention import TextAttention


class Backend:
    """What a host may do inside a forward pass; this one, the default, does the plain thing.

    Hosts that let others patch the model (ComfyUI does), or that have kernels of their own, hand a
    subclass to `Krea2Transformer`.
    """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        norm: HeadNorm,
        rope: Tensor | None,
        mask: Tensor | None,
        query_slice: slice | None = None,
    ) -> Tensor:
        """Attention over heads as projected, (B, H, L, D), to be normed and rotated here.

        query_slice: the tokens that the queries are of, None for all.
        Returns (B, L, H * D), which the caller may overwrite.
        """
        return attend(*norm_and_rotate(query, key, norm, rope, query_slice), value, mask)

    def modulated_norm(self, hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        """`rms_norm(hidden) * (1 + scale) + shift`, a new tensor."""
        return modulated_norm(hidden, scale, shift, eps)

    def embed_time(
        self, embed: Callable[[Tensor], tuple[Tensor, Tensor]], timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The time embedding (B, 1, D) and the blocks' vector (B, 1, 6 D) of times (B,)."""
        return embed(timestep)

    def prepare_tokens(
        self, text: Tensor, image: Tensor, text_positions: Tensor, image_positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Called once with the embedded tokens (B, L, D) and their positions (1, L, 3)."""
        return text, image, text_positions, image_positions

    def run_blocks(
        self,
        blocks: nn.ModuleList,
        hidden: Tensor,
        query_slice: slice,
        vector: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        split: int | None,
        modulation: StepModulation | None = None,
    ) -> Tensor:
        """Run the blocks in order, with the block's own arguments.

        modulation: of this step, or None where the blocks make it themselves.
        Returns the `kept` tokens, the only ones that the last block has to compute.
        """
        own = for_blocks(modulation, len(blocks))
        for index, block in enumerate(blocks):
            wanted = query_slice if index == len(blocks) - 1 else None
            hidden = block(hidden, vector, rope, mask, split, self, wanted, own[index])
        return hidden


class ExtendedBackend(Backend):
    """One call in which attention does more: text weights, NAG, cached references."""

    def __init__(
        self,
        text: TextAttention | None = None,
        references: ReferenceKVCache | KVRecorder | None = None,
    ):
        self.text = text or TextAttention()
        self.references = references
        self._block = 0

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        attention = attend
        if self.references is not None:
            attention = functools.partial(self.references.attend, attend, self._block)
        return self.text.attend(attention, query, key, value, mask, query_slice)

    def run_blocks(self, blocks, hidden, query_slice, vector, rope, mask, split, modulation=None):
        hidden, query_slice, rope, mask, split = self.text.prepare(
            hidden, query_slice, rope, mask, split
        )
        own = for_blocks(modulation, len(blocks))
        for self._block, block in enumerate(blocks):
            wanted = query_slice if self._block == len(blocks) - 1 else None
            hidden = block(hidden, vector, rope, mask, split, self, wanted, own[self._block])
        return hidden


TORCH_BACKEND = Backend()
