"""Gradients: each stage of nano's training takes a step, and its loss is that of the model."""

import pytest
import torch

from krea2_model import load_text_encoder, load_transformer, load_vae, nano
from nano_training import examples as examples_module
from nano_training import train_raw as raw_module
from nano_training.examples import Examples
from nano_training.train_lora import train_lora
from nano_training.train_raw import train_raw
from nano_training.train_turbo import train_turbo
from nano_training.train_vae import train_vae


@pytest.fixture(scope="module")
def parts():
    encoder = load_text_encoder(nano.TEXT_ENCODER, dtype=torch.float32)
    return encoder, load_vae(nano.VAE, dtype=torch.float32)


@pytest.fixture
def examples(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "SHARD", 8)
    monkeypatch.setattr(raw_module, "CAPTIONS", 2)
    return lambda notebook=False: Examples(tmp_path / f"examples{notebook}", *parts, notebook)


def changed(before, after):
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_raw(examples, tmp_path):
    trained = train_raw(tmp_path, examples(), steps=2)
    before = raw_module.new_transformer().state_dict()
    # Every weight has a gradient, though blocks begin without an effect.
    names = changed(before, trained.state_dict())
    assert len(names) > 0.9 * len(before)
    assert all(torch.isfinite(weight).all() for weight in trained.state_dict().values())


def test_turbo_and_lora(examples, tmp_path):
    raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in raw.state_dict().items()}
    trained = train_turbo(tmp_path, examples(), raw, steps=1)
    assert trained.variant == "turbo"
    assert changed(before, trained.state_dict())
    tensors = train_lora(tmp_path, examples(notebook=True), raw, steps=1)
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert not changed(before, raw.state_dict()), "the teacher stays as it is"


def test_vae(tmp_path):
    vae = train_vae(tmp_path, steps=1)
    assert all(torch.isfinite(weight).all() for weight in vae.state_dict().values())
