"""The backend of a forward pass: attention, norms and the loop over blocks, for a host to replace.

`Backend` is plain torch. `ExtendedBackend` adds the extensions of attention.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..nn.attention import attend
from ..nn.kernels import HeadNorm, Span, modulated_norm, norm_and_rotate
from ..nn.partial_attention import attend_partially
from .extensions import AttentionExtensions
from .modulation import StepModulation, for_blocks
from .references import KVRecorder, ReferenceKVCache
from .style_attention import StyleKeys, StyleRecorder
from .text_attention import TextAttention
from .token_groups import TokenGroups


class Backend:
    """The default backend.

    Hosts that let others patch the model (ComfyUI does), or that bring their own kernels, pass a
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
        query_slice: Span | None = None,
    ) -> Tensor:
        """Attention over projected heads (B, H, L, D), which are normed and rotated here.

        query_slice: first and end of the tokens that have a query, None for all. Keys and values
            cover all tokens.
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
        query_slice: Span,
        vector: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        split: int | None,
        modulation: StepModulation | None = None,
    ) -> Tensor:
        """Run the blocks in order, with the arguments of `SingleStreamBlock.forward`.

        modulation: of this step, or None where blocks compute it themselves.
        Returns the tokens of `query_slice`, the only ones that the last block has to compute.
        """
        by_block = for_blocks(modulation, len(blocks))
        last = len(blocks) - 1
        for index, block in enumerate(blocks):
            queries = query_slice if index == last else None
            hidden = block(hidden, vector, rope, mask, split, self, queries, by_block[index])
        return hidden


class ExtendedBackend(Backend):
    """A backend for one call with extensions of attention, see `AttentionExtensions`."""

    def __init__(
        self,
        text: TextAttention | None = None,
        references: ReferenceKVCache | KVRecorder | StyleRecorder | None = None,
        groups: TokenGroups | None = None,
        style: StyleKeys | None = None,
    ):
        self.extensions = AttentionExtensions(text, references, groups, style)
        self._block = 0

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        return self.extensions.attend(
            attend, attend_partially, self._block, query, key, value, mask, query_slice
        )

    def run_blocks(self, blocks, hidden, query_slice, vector, rope, mask, split, modulation=None):
        prepared = self.extensions.prepare(hidden, query_slice, rope, mask, split)
        hidden, query_slice, rope, mask, split = prepared
        by_block = for_blocks(modulation, len(blocks))
        last = len(blocks) - 1
        for self._block, block in enumerate(blocks):
            queries = query_slice if self._block == last else None
            hidden = block(hidden, vector, rope, mask, split, self, queries, by_block[self._block])
        return hidden


TORCH_BACKEND = Backend()
