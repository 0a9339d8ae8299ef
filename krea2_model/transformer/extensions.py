"""Attention of a call with everything that a feature adds to it, in one order.

Values of weighted tokens are moved first; normalised attention guidance attends with each of its
two texts; then come cached keys and values of references, and those of style pictures; innermost,
tokens in groups see different keys. A host has one place to call, `attend`, whatever a call has.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ..nn.attention import Attend
from ..nn.kernels import Span
from ..nn.partial_attention import AttendPartially
from .references import KVRecorder, ReferenceKVCache
from .style_attention import StyleKeys, StyleRecorder
from .text_attention import TextAttention
from .token_groups import TokenGroups


class AttentionExtensions:
    """The extensions of one call.

    text: token weights and NAG. references: cached keys and values of references, or a recorder of
    them. groups: regions, and biases of image tokens on references. style: keys and values of style
    pictures at this step.

    `prepare` is called once, before the blocks, and `attend` in each of them.
    """

    def __init__(
        self,
        text: TextAttention | None = None,
        references: ReferenceKVCache | KVRecorder | StyleRecorder | None = None,
        groups: TokenGroups | None = None,
        style: StyleKeys | None = None,
    ):
        self.text = text or TextAttention()
        self.references = references
        self.groups = groups
        self.style = style
        self._text_tokens = 0

    @property
    def front(self) -> int:
        """Tokens that `prepare` prepends."""
        return self.text.front

    def prepare(self, hidden: Tensor, query_slice: Span, rope: Tensor, mask: Tensor | None, split):
        """The blocks' arguments, see `TextAttention.prepare`."""
        self._text_tokens = query_slice[0]
        return self.text.prepare(hidden, query_slice, rope, mask, split)

    def attend(
        self,
        attention: Attend,
        partial: AttendPartially | None,
        block: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query_slice: Span | None = None,
    ) -> Tensor:
        """Attention over normed and rotated heads; (B, Q, H * D).

        attention: that of the host. partial: its attention to parts of the keys, None without.
        block: index of the block. query_slice: as in `Backend.attend`.
        """

        style = self.style
        if style is not None and not style.acts_in(block):
            style = None

        def attend_to(text: int, groups: TokenGroups | None) -> Attend:
            """Attention of a sequence with so many tokens of text."""
            if style is not None:
                groups = style.groups(groups)

            def grouped(query, key, value, mask=None):
                assert groups is not None
                only_image = query_slice is not None
                return groups.attend(attention, partial, text, query, key, value, mask, only_image)

            attend = attention if groups is None else grouped
            if style is not None:
                attend = functools.partial(style.attend, attend, block, text)
            if self.references is None:
                return attend
            return functools.partial(self.references.attend, attend, block)

        positive = attend_to(self._text_tokens, self.groups)
        others = None if self.groups is None else self.groups.without_regions()
        negative = attend_to(self.front, others)
        return self.text.attend(positive, query, key, value, mask, query_slice, negative)
