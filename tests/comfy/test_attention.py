"""The attention seam on every attention function ComfyUI may choose."""

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.ops
import pytest
import torch

from parity import assert_close

FUNCTIONS = ("attention_basic", "attention_pytorch", "attention_split", "attention_sub_quad")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mask", ["none", "keys", "causal", "float"])
def test_masks_on_every_attention_function(pack, monkeypatch, function, mask):
    monkeypatch.setattr(attention, "optimized_attention", getattr(attention, function))
    backend = pack("nodes.managed.backend").ComfyBackend({})
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
    ours = backend.attention(query, key, value, masks[mask])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=masks[mask], enable_gqa=True
    )
    assert_close(ours, expected.transpose(1, 2).flatten(2), 1e-5, f"{function}, mask {mask}")


@pytest.fixture
def chosen(pack, monkeypatch):
    """Pretend that the table of backends names one; how often it attended."""
    backend, module = pack("nodes.managed.backend"), pack("krea2_model.nn.attention_backends")
    cudnn = torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    monkeypatch.setattr(backend, "preferred", lambda *arguments: cudnn)
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    calls, plainly = [], backend.attend_plainly

    def recorded(*heads):
        calls.append(len(heads))
        return plainly(*heads)

    monkeypatch.setattr(backend, "attend_plainly", recorded)
    assert module.is_torchs_own_choice()

    def attend(**options):
        query, key = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16)
        with pack("krea2_model.nn.switches").switched("cudnn"):
            out = backend.ComfyBackend(options).attention(query, key, key)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, key, enable_gqa=True
        )
        assert_close(out, expected.transpose(1, 2).flatten(2), 1e-5, "attention")
        return calls

    return attend


def test_the_table_is_followed_where_comfyui_attends_by_plain_torch(chosen):
    assert chosen() == [3]


def test_other_functions_stay(chosen, monkeypatch):
    for name in FUNCTIONS:
        if name != "attention_pytorch":
            monkeypatch.setattr(attention, "optimized_attention", getattr(attention, name))
            assert chosen() == []


def test_a_users_attention_stands(chosen, monkeypatch):
    """A node's, a flag's, and a function that another pack put in the place of ComfyUI's."""
    assert chosen(optimized_attention_override=lambda f, *args, **kw: f(*args, **kw)) == []
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management.args, "use_pytorch_cross_attention", True)
        assert chosen() == []
    with monkeypatch.context() as patch:
        replaced = torch.nn.functional.scaled_dot_product_attention
        patch.setattr(comfy.ops, "scaled_dot_product_attention", replaced)
        assert chosen() == []
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attention_pytorch", attention.attention_basic)
        assert chosen() == []
    assert chosen() == [3]
