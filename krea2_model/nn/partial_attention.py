"""Attention to a part of the keys, and the exact merge of several parts.

Softmax over all keys equals the weighted mean of softmaxes over parts of them, the weights being
the sums of exponentials (log-sum-exp, as flash attention merges its tiles). So tokens that see
different keys need no mask of all pairs: each group of queries attends to its own keys, and the
parts are merged. A bias on a whole part of the keys is added to its log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import repeat_heads

# Scores in memory at once, where no kernel of torch's returns the log-sum-exp.
_SCORES = 2**25

_ATEN = torch.ops.aten


class Partial(NamedTuple):
    """Output (B, H, Q, D) of attention to a part of the keys; log-sum-exp (B, H, Q), float32."""

    out: Tensor
    lse: Tensor

    def biased(self, bias: Tensor | float) -> Partial:
        """With a bias on all of its keys: a number, or one for each query (Q,)."""
        return Partial(self.out, self.lse + bias)


# (query, key, value, mask) -> Partial; see `attend_partially`.
AttendPartially = Callable[[Tensor, Tensor, Tensor, Tensor | None], Partial]


def attend_partially(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Partial:
    """Attention of queries (B, H, Q, D) to keys and values (B, KV, L, D), with its log-sum-exp.

    mask: None, or values to add to the scores, (B or 1, 1, 1 or Q, L). Uses the kernel of torch
    that returns the log-sum-exp: flash attention, or memory-efficient attention with a mask.
    """
    if query.shape[2] == 0:
        lse = query.new_zeros(query.shape[:3], dtype=torch.float32)
        return Partial(torch.zeros_like(query), lse)
    if mask is not None:
        mask = mask.to(query.dtype)
    if query.device.type == "cpu":
        key, value = repeat_heads(query, key, value)
        flash = _ATEN._scaled_dot_product_flash_attention_for_cpu
        return Partial(*flash(query, key, value, attn_mask=mask))
    if query.device.type == "cuda" and torch.version.cuda:
        result = _attend_on_nvidia(query, key, value, mask)
        if result is not None:
            return result
    return _attend_in_chunks(query, key, value, mask)


def merge(first: Partial, second: Partial) -> Partial:
    """Attention to both parts of the keys."""
    lse = torch.logaddexp(first.lse, second.lse)
    share = (second.lse - lse).exp().unsqueeze(-1)
    out = torch.lerp(first.out.float(), second.out.float(), share)
    return Partial(out.to(first.out.dtype), lse)


def merge_rows(whole: Partial, part: Partial, rows: Tensor) -> None:
    """Merge a part that only some queries see, `rows` (R,), into the whole, in place."""
    merged = merge(Partial(whole.out[:, :, rows], whole.lse[:, :, rows]), part)
    whole.out.index_copy_(2, rows, merged.out)
    whole.lse.index_copy_(2, rows, merged.lse)


def _attend_on_nvidia(query, key, value, mask) -> Partial | None:
    """By torch's own kernels for NVIDIA GPUs; None where neither supports the call."""
    cuda = torch.backends.cuda
    if mask is None:
        params = cuda.SDPAParams(
            query, key, value, None, 0.0, False, query.shape[1] != key.shape[1]
        )
        if cuda.can_use_flash_attention(params):
            out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(query, key, value)
            return Partial(out, lse)
    key, value = repeat_heads(query, key, value)
    bias = None
    if mask is not None:
        # The kernel reads rows of the bias that are aligned to 16 values.
        length = mask.shape[-1]
        bias = torch.nn.functional.pad(mask, (0, -length % 16))[..., :length]
        bias = bias.expand(*query.shape[:3], length)
    params = cuda.SDPAParams(query, key, value, bias, 0.0, False, False)
    if not cuda.can_use_efficient_attention(params):
        return None
    efficient = _ATEN._scaled_dot_product_efficient_attention
    out, lse, *_ = efficient(query, key, value, bias, True)
    return Partial(out, lse[:, :, : query.shape[2]])  # the kernel pads it


def _attend_in_chunks(query, key, value, mask) -> Partial:
    """By matrix products, for a number of queries at a time."""
    key, value = repeat_heads(query, key, value)
    batch, heads, tokens, dim = query.shape
    rows = max(1, _SCORES // (batch * heads * max(1, key.shape[2])))
    outs, sums = [], []
    for first in range(0, tokens, rows):
        scores = (query[:, :, first : first + rows] @ key.mT).float() / math.sqrt(dim)
        if mask is not None:
            scores += mask if mask.shape[2] == 1 else mask[:, :, first : first + rows]
        lse = scores.logsumexp(dim=-1)
        outs.append((scores - lse.unsqueeze(-1)).exp_().to(value.dtype) @ value)
        sums.append(lse)
    return Partial(torch.cat(outs, dim=2), torch.cat(sums, dim=2))
