"""Causal attention in blocks: the same numbers, and never a mask of the whole prompt."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from krea2_model.config import TextEncoderConfig
from krea2_model.nn.attention import attend, repeat_heads
from krea2_model.text import decoder
from krea2_model.text.decoder import CausalMask, causal_attention, mask_rows, mask_size
from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.text.language_model import KeyValueCache, LanguageModel, LanguageTail

SMALL = TextEncoderConfig(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, tap_layers=(1, 2),
)  # fmt: skip


def test_a_query_sees_real_keys_up_to_itself_and_itself():
    real = torch.tensor([[True, False, True, False, True], [False, True, True, True, False]])
    for first, last in ((0, 5), (2, 4), (4, 5)):
        rows = CausalMask(5, real.device, real=real).rows(first, last)
        assert rows.shape == (2, 1, last - first, last)
        for item in range(2):
            for query in range(first, last):
                expected = [(k <= query and bool(real[item, k])) or k == query for k in range(last)]
                assert rows[item, 0, query - first].tolist() == expected
    assert CausalMask(3, real.device).rows(1, 3).tolist() == [[[[1, 1, 0], [1, 1, 1]]]]


def attend_all(query, key, value, seen):
    """Softmax as it is written, over scores of all keys, in float64."""
    key, value = repeat_heads(query, key, value)
    scores = (query.double() @ key.double().mT) / query.shape[-1] ** 0.5
    out = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value.double()
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length, start", [(300, 0), (300, 100), (300, 299), (64, 0), (65, 0)])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_give_what_the_whole_gives(monkeypatch, length, start, padded):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length - start, 16, generator=generator)
    key, value = (torch.randn(2, 2, length, 16, generator=generator) for _ in "kv")
    real = torch.rand(2, length, generator=generator) > 0.3 if padded else None
    mask = CausalMask(length, query.device, start=start, real=real)
    seen = mask.rows(start, length)
    sizes = []

    def recorded(query, key, value, mask):
        sizes.append((query.shape[2], key.shape[2]))
        return attend(query, key, value, mask)

    whole = causal_attention(recorded, query, key, value, mask)
    assert torch.equal(whole, attend(query, key, value, seen))
    assert sizes == [(length - start, length)]
    sizes.clear()
    monkeypatch.setattr(decoder, "MASK_ELEMENTS", 0)
    blocks = causal_attention(recorded, query, key, value, mask)
    assert max(rows for rows, _ in sizes) <= 64 and sum(rows for rows, _ in sizes) == length - start
    assert [keys for _, keys in sizes] == [*range(start + 64, length, 64), length]
    expected = attend_all(query, key, value, seen)
    for found in (whole, blocks):
        assert torch.linalg.vector_norm(found - expected) < 1e-6 * torch.linalg.vector_norm(
            expected
        )


def test_masks_stay_below_a_size():
    assert mask_size(507) == 507**2 and mask_rows(2048) == 2048
    assert mask_size(24_001) <= decoder.MASK_ELEMENTS
    assert mask_size(1_000_000) == 64_000_000
    assert mask_size(0) == 0


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("padded", [False, True])
def test_a_long_prompt_makes_no_mask_of_its_whole(padded):
    length = 6000
    encoder = Qwen3VLTextEncoder(SMALL).eval()
    tokens = torch.arange(length)[None] % 100
    real = torch.arange(length)[None] >= 10 if padded else None
    with torch.no_grad(), Largest() as largest:
        taps = encoder(tokens, real)
    assert torch.isfinite(taps).all()
    assert largest.elements <= decoder.MASK_ELEMENTS < length**2 / 4


def test_a_text_is_written_on_from_blocks(monkeypatch):
    torch.manual_seed(0)
    encoder, tail = Qwen3VLTextEncoder(SMALL).eval(), LanguageTail(SMALL, range(2, 3)).eval()
    for parameter in (*encoder.parameters(), *tail.parameters()):
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    model, tokens = LanguageModel(encoder, tail), [i * i % 100 for i in range(300)]
    whole = model(tokens, KeyValueCache())
    monkeypatch.setattr(decoder, "MASK_ELEMENTS", 0)
    cache = KeyValueCache()
    model(tokens[:130], cache)
    assert torch.allclose(model(tokens[130:], cache), whole, rtol=1e-4, atol=1e-5)
