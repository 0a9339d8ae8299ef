"""The attention seam on every attention function ComfyUI may choose."""

import comfy.ldm.modules.attention as attention
import pytest
import torch

from parity import assert_close

FUNCTIONS = ("attention_basic", "attention_pytorch", "attention_split", "attention_sub_quad")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mask", ["none", "keys", "causal", "float"])
def test_masks_on_every_attention_function(pack, monkeypatch, function, mask):
    monkeypatch.setattr(attention, "optimized_attention", getattr(attention, function))
    hooks = pack("nodes.managed.hooks").PatchHooks({})
    query, key, value = (
        torch.randn(2, 4, 40, 16),
        torch.randn(2, 2, 40, 16),
        torch.randn(2, 2, 40, 16),
    )
    keys = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    keys[0, ..., 30:] = False
    masks = {
        "none": None,
        "keys": keys,
        "causal": torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(),
        "float": torch.randn(2, 1, 1, 40),
    }
    ours = hooks.attention(query, key, value, masks[mask])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=masks[mask], enable_gqa=True
    )
    assert_close(ours, expected.transpose(1, 2).flatten(2), 1e-5, f"{function}, mask {mask}")
