"""Element-wise work: against float64, with gradients and without, in place where that is said."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from krea2_model.config import TransformerConfig
from krea2_model.nn import attention, kernels
from krea2_model.nn.attention import attend, repeat_heads, rope_table, takes_grouped_heads
from krea2_model.nn.layers import TorchLayers
from krea2_model.transformer.model import (
    Backend,
    Krea2Transformer,
    SingleStreamBlock,
    grid_positions,
)
from parity import assert_close, relative_error
from samples import random

EPS = 1e-5


def both_ways(function, *tensors):
    """The result with gradients on, and the result with them off on copies."""
    with_gradients = function(*(tensor.clone() for tensor in tensors))
    with torch.no_grad():
        without = function(*(tensor.clone() for tensor in tensors))
    return with_gradients, without


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_modulated_norm(dtype, limit):
    hidden, scale, shift = random(2, 5, 64) * 3, random(2, 1, 64), random(2, 1, 64, seed=1)
    hidden = hidden.to(dtype)
    exact = F.rms_norm(hidden.double(), (64,), None, EPS) * (1 + scale.double()) + shift.double()
    before = hidden.clone()
    for result in both_ways(lambda h: kernels.modulated_norm(h, scale, shift, EPS), hidden):
        assert result.dtype == dtype
        assert_close(result, exact, limit, "modulated norm")
    with torch.no_grad():
        kernels.modulated_norm(hidden, scale, shift, EPS)
    assert torch.equal(hidden, before), "its input stays"


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("query_slice", [None, (2, 5)])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("numbers", ["complex", "real"])
def test_norm_and_rotate(dtype, limit, query_slice, rotated, numbers, monkeypatch):
    """With complex numbers and, as on devices without them, with real ones."""
    monkeypatch.setattr(kernels, "_has_complex_numbers", lambda device: numbers == "complex")
    heads, tokens, dim = 6, 12, 16
    table = rope_table(grid_positions([(0, 3, 4)])[None], (4, 6, 6), 1000.0) if rotated else None
    asked = tokens if query_slice is None else 3
    query = random(1, asked, heads * dim).to(dtype).unflatten(-1, (heads, dim)).transpose(1, 2)
    key = random(1, tokens, 2 * dim).to(dtype).unflatten(-1, (2, dim)).transpose(1, 2)
    norm = kernels.HeadNorm(random(dim) + 1, random(dim, seed=1) + 1, EPS)

    def exact(values, multiplier, rope):
        normed = F.rms_norm(values.double(), (dim,), multiplier.double(), EPS)
        if rope is None:
            return normed
        pairs = normed.unflatten(-1, (-1, 2))
        return torch.einsum("blpij,bhlpj->bhlpi", rope[:, 0].double(), pairs).flatten(-2)

    own = (
        None
        if table is None
        else table
        if query_slice is None
        else table[:, :, slice(*query_slice)]
    )
    expected = exact(query, norm.query, own), exact(key, norm.key, table)
    for results in both_ways(lambda q, k: kernels.norm_and_rotate(q, k, norm, table, query_slice),
                             query, key):  # fmt: skip
        for result, reference in zip(results, expected, strict=True):
            assert result.dtype == dtype
            assert_close(result, reference, limit, "norm and rotation")
    if rotated and query_slice is None:
        plain, _ = kernels.norm_and_rotate(query.clone(), key.clone(), norm)
        assert_close(kernels.apply_rope(plain, table), expected[0], 2 * limit, "rotation alone")


def test_gates_and_residual():
    hidden, gate, update = random(1, 5, 8), random(1, 1, 8, seed=1), random(1, 5, 8, seed=2)
    for result in both_ways(lambda h: kernels.gated_residual(h, gate, update), hidden):
        assert_close(result, hidden + gate * update, 1e-6, "residual")
    wide = random(1, 5, 8, seed=3)
    for result in both_ways(kernels.sigmoid_gated, hidden, wide):
        assert_close(result, hidden * torch.sigmoid(wide), 1e-6, "sigmoid gate")
    for result in both_ways(kernels.silu_gated, wide, hidden):
        assert_close(result, F.silu(wide) * hidden, 1e-6, "SwiGLU")
    with torch.no_grad():
        assert kernels.gated_residual(hidden, gate, update) is hidden, "in place"


def test_grouped_heads_are_not_repeated(monkeypatch):
    query, key, value = random(1, 8, 30, 16), random(1, 2, 30, 16), random(1, 2, 30, 16, seed=1)
    assert takes_grouped_heads(query)
    repeated = repeat_heads(query, key, value)
    expected = F.scaled_dot_product_attention(query, *repeated).transpose(1, 2).flatten(2)
    monkeypatch.setattr(attention, "repeat_heads", None)
    assert_close(attend(query, key, value), expected, 1e-6, "grouped heads")


TINY = TransformerConfig(
    num_layers=2, attention_head_dim=32, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=256, text_hidden_dim=64, text_num_attention_heads=2,
    text_num_key_value_heads=2, text_intermediate_size=96, axes_dims_rope=(8, 12, 12),
)  # fmt: skip


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = SingleStreamBlock(TINY, TorchLayers)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return block


@pytest.mark.parametrize("split", [None, 20])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_in_place_and_of_some_tokens(block, split, batch, monkeypatch):
    """What the last block computes are the rows of the whole; gradients on or off, the same."""
    dim = TINY.hidden_size
    hidden = random(batch, 26, dim)
    vector = random(batch, 1 if split is None else 2, 6 * dim, seed=1) * 0.3
    rope = rope_table(grid_positions([(0, 13, 2)])[None], TINY.axes_dims_rope, 1000.0)
    expected = block(hidden, vector, rope, None, split)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        whole = block(hidden.clone(), vector, rope, None, split)
        part = block(hidden.clone(), vector, rope, None, split, None, (6, 20))
    # What a compiler traces, which works in place nowhere.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        traced = block(hidden.clone(), vector, rope, None, split)
    assert_close(traced, expected, 1e-5, "as a compiler sees it")
    assert_close(whole, expected, 1e-5, "without gradients")
    assert_close(part, expected[:, 6:20], 1e-5, "tokens 6 to 19")


def test_the_peak_of_a_block():
    """Activations beside the hidden state: two MLP widths and two hidden widths a token."""

    config = TransformerConfig(num_layers=1)
    tokens, made, most = 4096, [], 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal most
            result = function(*arguments, **(options or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    made.append(weakref.ref(tensor))
            alive = [tensor.untyped_storage() for ref in made if (tensor := ref()) is not None]
            sizes = {storage._cdata: storage.nbytes() for storage in alive}
            most = max(most, sum(n for place, n in sizes.items() if place not in weights))
            return result

    class FusedAttention(Backend):
        """As on devices with a fused kernel; on meta torch would write the scores down."""

        def attend(self, query, key, value, norm, rope, mask, query_slice=None):
            query, _ = kernels.norm_and_rotate(query, key, norm, rope, query_slice)
            return torch.empty_like(query).transpose(1, 2).flatten(2)

    with torch.device("meta"):
        block = SingleStreamBlock(config, TorchLayers, dtype=torch.bfloat16)
        hidden = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16)
        vector = torch.empty(1, 1, 6 * config.hidden_size)
        rope = torch.empty(1, 1, tokens, config.attention_head_dim // 2, 2, 2)
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    with torch.no_grad(), Watch():
        block(hidden, vector, rope, None, None, FusedAttention())
    allowed = (2 * config.intermediate_size + 2 * config.hidden_size) * tokens * 2
    assert allowed / 2 < most < 1.1 * allowed, (most, allowed)


def test_gradients_are_those_of_the_plain_formulas():
    """Against numbers, in float64, through a whole small model."""
    torch.manual_seed(0)
    model = Krea2Transformer(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    taps, latents = random(1, 3, 12, 64), random(1, 16, 4, 4)

    def loss():
        text = model.fuse_text(taps)
        return model(latents, torch.tensor([0.4]), text).square().mean()

    loss().backward()
    weight = model.blocks[0].prenorm.scale.weight
    step = 1e-2
    with torch.no_grad():
        for index in (0, 7):
            weight[index] += step
            above = loss()
            weight[index] -= 2 * step
            below = loss()
            weight[index] += step
            numeric = (above - below) / (2 * step)
            assert relative_error(weight.grad[index], numeric) < 2e-2
