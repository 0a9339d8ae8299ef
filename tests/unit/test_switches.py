"""The switches of kernels that are off until a GPU has judged them."""

import importlib.util

import pytest

from krea2_model.nn import switches
from krea2_model.tools.self_check import versions


def test_all_are_off_and_only_for_a_while_on():
    assert not switches.active
    with switches.switched("gguf", "gate"):
        assert switches.active == {"gate", "gguf"}
        with switches.switched():
            assert not switches.active
        assert switches.active == {"gate", "gguf"}
    assert not switches.active


def test_the_variable_names_them():
    assert switches.parse(" gguf, swiglu ") == {"gguf", "swiglu"}
    assert switches.parse("none") == switches.parse("") == frozenset()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'swigly'.*quantise_once"):
        switches.parse("gguf,swigly")
    with pytest.raises(ValueError, match="'all'"), switches.switched("all"):
        pass
    assert not switches.active


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv(switches.VARIABLE, "gate,gguf")
    assert anew().active == {"gate", "gguf"}
    monkeypatch.setenv(switches.VARIABLE, "")
    assert not anew().active
    monkeypatch.setenv(switches.VARIABLE, "cuDNN")
    with pytest.raises(ValueError, match="'cuDNN'"):
        anew()


def test_the_self_check_names_what_is_on():
    assert not any("KREA2_KERNELS" in line for line in versions())
    with switches.switched("swiglu", "gguf"):
        assert versions()[-2:] == ["KREA2_KERNELS: gguf", "KREA2_KERNELS: swiglu"]


def anew():
    """The module as a fresh process imports it."""
    spec = importlib.util.spec_from_file_location("fresh_switches", switches.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
