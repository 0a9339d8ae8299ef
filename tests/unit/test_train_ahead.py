"""Batches ahead in a thread, and what was read in memory."""

import threading
from contextlib import contextmanager

import pytest
import torch

from krea2_training.engine.ahead import Ahead, Kept


def test_the_next_number_is_made_while_the_last_is_used():
    made, begun = [], threading.Event()

    def make(number):
        made.append((number, threading.current_thread() is threading.main_thread()))
        if number == 4:
            begun.set()
        return 10 * number

    ahead = Ahead(make, end=7, stride=2)
    assert ahead(2) == 20
    assert begun.wait(30), "4 is made before it is asked for"
    assert ahead(4) == 40
    assert ahead(3) == 30  # another place, as of a run that goes on, where 6 was expected
    assert ahead(5) == 50  # 7 is not made: no step has it
    assert made == [(number, False) for number in (2, 4, 6, 3, 5)]


def test_an_error_is_raised_where_its_number_is_asked_for():
    def make(number):
        if number == 1:
            raise ValueError("the file is gone")
        return number

    ahead = Ahead(make, end=10)
    assert ahead(0) == 0
    with pytest.raises(ValueError, match="the file is gone"):
        ahead(1)
    assert ahead(2) == 2


def test_files_are_read_once_up_to_a_limit():
    read = []

    def load(key):
        read.append(key)
        return {"latents": torch.zeros(10), "weights": torch.zeros(2)}

    kept = Kept(100)  # bytes: two of 48
    for key in ("a", "b", "a", "c", "b", "c", "a"):
        assert kept.get(key, load)["latents"].shape == (10,)
    assert kept.size == 96
    # Both that fit stay, the third is read each time.
    assert read == ["a", "b", "c", "c"]
    assert Kept(0).get("a", load) and read[-1] == "a"


def test_on_a_gpu_batches_are_made_in_a_stream_of_their_own(monkeypatch):
    log = []

    class Stream:
        def __init__(self, device):
            log.append(f"stream on {device}")

        def synchronize(self):
            log.append("wait")

    @contextmanager
    def stream(which):
        log.append("in")
        yield
        log.append("out")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    ahead = Ahead(lambda number: log.append(number) or number, 1, device=torch.device("cuda", 1))
    assert ahead(0) == 0
    assert log == ["stream on cuda:1", "in", 0, "out", "wait"]
