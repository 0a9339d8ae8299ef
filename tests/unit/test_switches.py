"""The switches of kernels that a GPU has judged."""

import importlib.util

import pytest

from krea2_model.nn import switches
from krea2_model.tools.self_check import versions


def test_others_are_on_for_a_while_only():
    with switches.switched("gguf", "gate"):
        assert switches.active == {"gate", "gguf"}
        with switches.switched():
            assert not switches.active
        assert switches.active == {"gate", "gguf"}
    assert switches.active == switches.DEFAULT


def test_what_is_on_without_a_word_has_the_bits_of_torch_or_another_order_alone():
    """No kernel that rounds another way is on by itself."""
    assert {"gguf", "quantise_once", "cudnn"} == switches.DEFAULT


def test_the_variable_names_them():
    assert switches.parse(" gguf, swiglu ") == {"gguf", "swiglu"}
    assert switches.parse("none") == switches.parse("") == frozenset()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'swigly'.*quantise_once"):
        switches.parse("gguf,swigly")
    with pytest.raises(ValueError, match="'all'"), switches.switched("all"):
        pass
    assert switches.active == switches.DEFAULT


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv(switches.VARIABLE, "gate,gguf")
    assert anew().active == {"gate", "gguf"}
    monkeypatch.setenv(switches.VARIABLE, "")
    assert anew().active == switches.DEFAULT, "as where it is not set"
    monkeypatch.setenv(switches.VARIABLE, "none")
    assert not anew().active
    monkeypatch.setenv(switches.VARIABLE, "cuDNN")
    with pytest.raises(ValueError, match="'cuDNN'"):
        anew()


def test_the_self_check_names_what_is_on():
    with switches.switched():
        assert not any("KREA2_KERNELS" in line for line in versions())
    with switches.switched("swiglu", "gguf"):
        assert versions()[-2:] == ["KREA2_KERNELS: gguf", "KREA2_KERNELS: swiglu"]


def anew():
    """The module as a fresh process imports it."""
    spec = importlib.util.spec_from_file_location("fresh_switches", switches.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
