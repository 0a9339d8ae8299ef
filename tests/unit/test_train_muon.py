"""Muon over matrices of a shape at once: torch's steps, in fewer operations."""

import copy

import pytest
import torch

from krea2_training.engine import muon
from krea2_training.engine.muon import Muon

SHAPES = [(24, 16), (24, 16), (16, 24), (16, 16), (24, 16)]


def parameters_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(optimiser, parameters, number, without=()):
    generator = torch.Generator().manual_seed(100 + number)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index in without else gradient
    optimiser.step()


def torchs(parameters):
    return torch.optim.Muon(
        parameters, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )  # fmt: skip


@pytest.mark.parametrize("together", [muon.TOGETHER, 2 * 24 * 16, 1])
def test_steps_are_those_of_torch(together, monkeypatch):
    monkeypatch.setattr(muon, "TOGETHER", together)
    own, other = parameters_of(1), parameters_of(1)
    ours, theirs = Muon(own, 0.02, 0.1), torchs(other)
    for number in range(3):
        step(ours, own, number, without=(1,) if number == 1 else ())
        step(theirs, other, number, without=(1,) if number == 1 else ())
    start = parameters_of(1)
    for first, second, before in zip(own, other, start, strict=True):
        moved = (second - before).norm()
        # Newton-Schulz is in bfloat16.
        assert (first - second).norm() < 0.02 * moved


def test_states_are_exchanged_with_torch():
    own, other = parameters_of(2), parameters_of(2)
    ours, theirs = Muon(own, 0.02, 0.1), torchs(other)
    step(theirs, other, 0)
    start = [parameter.detach().clone() for parameter in other]
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for parameter, value in zip(own, other, strict=True):
        parameter.data.copy_(value.data)
    step(ours, own, 1)
    step(theirs, other, 1)
    for first, second, before in zip(own, other, start, strict=True):
        assert (first - second).norm() < 0.02 * (second - before).norm()
    state = ours.state_dict()["state"]
    assert {tuple(one) for one in state.values()} == {("momentum_buffer",)}
