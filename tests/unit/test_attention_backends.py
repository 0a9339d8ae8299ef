"""Attention by a table: which backend on which card, whose choice it leaves alone, same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from krea2_model.nn import attention_backends as backends
from krea2_model.nn import switches
from krea2_model.nn.attention import attend, repeat_heads
from parity import assert_close

CUDNN, FLASH, MATH = (
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
)  # fmt: skip
BF16 = torch.bfloat16


class Heads:
    """Of a tensor on a GPU what the choice looks at."""

    def __init__(self, heads=48, length=4160, dtype=BF16, device="cuda:0"):
        self.shape, self.dtype = (1, heads, length, 128), dtype
        self.device = torch.device(device)


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a card of a compute capability, whose backends do everything."""

    def pretend(*capability):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(backends, "_supports", lambda *arguments: True)

    return pretend


def preferred(mask=None, key=None, **of_query):
    key = key or Heads(heads=12, **{k: v for k, v in of_query.items() if k != "heads"})
    return backends.preferred(Heads(**of_query), key, key, mask)


def test_lengths_have_a_backend_each(monkeypatch):
    """Rising lengths, the last one that is reached counts."""
    table = {((8, 0), BF16): (backends.Lengths(100, FLASH), backends.Lengths(500, CUDNN))}
    monkeypatch.setattr(backends, "TABLE", table)
    found = [backends.fastest_backend((8, 0), BF16, length) for length in (99, 100, 499, 500, 9000)]
    assert found == [None, FLASH, FLASH, CUDNN, CUDNN]
    assert backends.fastest_backend((8, 0), torch.float16, 500) is None


def test_the_table_is_in_order():
    for lengths in backends.TABLE.values():
        assert [e.least for e in lengths] == sorted(e.least for e in lengths)


def test_the_order_that_torch_gives_a_hopper_is_no_choice_of_a_user(card):
    """Torch puts cuDNN first there itself, with the first call."""
    card(9, 0)
    order = [CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, MATH]
    with switches.switched("cudnn"), sdpa_kernel(order, set_priority=True):
        assert preferred() is CUDNN


def test_cudnn_on_hopper_for_long_sequences(card):
    card(9, 0)
    with switches.switched():
        assert preferred() is None, "the switch is off"
    with switches.switched("cudnn"):
        assert preferred() is CUDNN
        assert preferred(length=1088) is CUDNN
        assert preferred(length=512) is None
        assert preferred(dtype=torch.float32) is None
        assert preferred(mask=torch.ones(1)) is None
        assert preferred(device="cpu") is None
        # The last block asks for the image alone, with all keys.
        assert preferred(length=16, key=Heads(12, 4160)) is CUDNN
        for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
            card(*other)
            assert preferred() is None


def test_a_backend_that_cannot_do_the_call_is_left_alone(card, monkeypatch):
    """Asked of torch with the heads as they are, grouped."""
    card(9, 0)
    asked = []
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *arguments: arguments)
    for answer in (True, False):

        def can(params, answer=answer):
            asked.append(params)
            return answer

        monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can)
        with switches.switched("cudnn"):
            assert preferred() is (CUDNN if answer else None)
            assert preferred(heads=12) is (CUDNN if answer else None)
    assert [params[-1] for params in asked] == [True, False] * 2


@pytest.mark.parametrize(
    "choose",
    [
        lambda: sdpa_kernel(FLASH),
        lambda: sdpa_kernel(
            [SDPBackend.EFFICIENT_ATTENTION, FLASH, CUDNN, MATH], set_priority=True
        ),
    ],
    ids=["one alone", "an order"],
)
def test_a_users_choice_stands(card, choose):
    card(9, 0)
    with switches.switched("cudnn"):
        with choose():
            assert preferred() is None
        assert preferred() is CUDNN


def test_backends_turned_off_are_a_choice(card):
    card(9, 0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with switches.switched("cudnn"):
            assert preferred() is None
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("backend", [MATH, FLASH], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_numbers_are_the_same(backend, compiled, monkeypatch):
    """By the backends that a CPU has; the one that is named is the one that runs."""
    # A CPU keeps to an order of its own, so there is nothing else to choose.
    monkeypatch.setattr(backends, "OTHERS", ())
    query, key, value = (torch.randn(1, heads, 70, 16) for heads in (8, 2, 2))
    expected = F.scaled_dot_product_attention(query, *repeat_heads(query, key, value))
    monkeypatch.setattr(backends, "preferred", lambda *arguments: backend)
    call = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
    with torch.no_grad(), switches.switched("cudnn"), torch.profiler.profile() as profile:
        result = call(query, key, value)
    assert_close(result, expected.transpose(1, 2).flatten(2), 1e-6, str(backend))
    names = {event.key for event in profile.key_averages()}
    ran = "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert ran is (backend is FLASH)
    assert backends.is_torchs_own_choice(), "what was set is set back"
