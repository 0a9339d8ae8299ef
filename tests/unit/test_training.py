"""Gradients: each stage of nano's training takes a step, and its loss is that of the model."""

from dataclasses import replace
from random import Random

import pytest
import torch

from krea2_model import (
    Control,
    Krea2Pipeline,
    load_text_encoder,
    load_transformer,
    load_vae,
    nano,
)
from nano_training import examples as examples_module
from nano_training import train_control as control_module
from nano_training import train_lora as lora_module
from nano_training import train_raw as raw_module
from nano_training import train_reference as reference_module
from nano_training import train_turbo as turbo_module
from nano_training.examples import Examples
from nano_training.files import write_lora
from nano_training.train_control import OutlineExamples, train_control
from nano_training.train_lora import train_lora
from nano_training.train_raw import train_raw
from nano_training.train_reference import ReferenceExamples, train_reference
from nano_training.train_turbo import train_turbo
from nano_training.train_vae import train_vae


@pytest.fixture(scope="module")
def parts():
    encoder = load_text_encoder(nano.text_encoder_file(), dtype=torch.float32)
    return encoder, load_vae(nano.VAE, dtype=torch.float32)


@pytest.fixture
def examples(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "SHARD", 8)
    monkeypatch.setattr(raw_module, "CAPTIONS", 2)
    return lambda notebook=False: Examples(tmp_path / f"examples{notebook}", *parts, notebook)


@pytest.fixture(scope="module")
def reference_examples(parts, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "TEXTS", 24)
        return ReferenceExamples(tmp_path_factory.mktemp("references"), *parts)


def changed(before, after):
    """Names of weights that differ; a LoRA puts the layer it is on one level down."""
    after = {name.replace(".layer.", "."): tensor for name, tensor in after.items()}
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_raw(examples, tmp_path):
    trained = train_raw(tmp_path, examples(), steps=3)
    torch.manual_seed(1)
    untrained = raw_module.new_transformer(raw_module.CONFIG, seed=1)
    names = changed(untrained.state_dict(), trained.state_dict())
    for layer in ("first", "blocks.0.attn.wq", "blocks.5.mlp.gate", "blocks.3.mod.lin",
                  "blocks.2.prenorm.scale", "blocks.2.attn.qknorm.knorm.scale", "last.linear",
                  "txtfusion.refiner_blocks.1.mlp.down", "tmlp.0"):  # fmt: skip
        assert f"{layer}.weight" in names, layer
    assert all(torch.isfinite(weight).all() for weight in trained.state_dict().values())


def test_turbo_and_lora(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(turbo_module, "CAPTIONS", 2)
    monkeypatch.setattr(turbo_module, "DRAWS", 1)
    monkeypatch.setattr(turbo_module, "PRESET", replace(turbo_module.PRESET, steps=3))
    monkeypatch.setattr(lora_module, "CAPTIONS", 2)
    raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in raw.state_dict().items()}
    trained = train_turbo(tmp_path, examples(), raw, steps=1)
    assert trained.variant == "turbo"
    assert changed(before, trained.state_dict())
    tensors = train_lora(tmp_path, examples(notebook=True), raw, steps=1)
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert not changed(before, raw.state_dict()), "the teacher stays as it is"


def test_reference_lora(reference_examples, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_module, "CAPTIONS", 3)
    raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in raw.state_dict().items()}
    shown = []
    forward = raw.forward
    monkeypatch.setattr(
        raw, "forward",
        lambda *arguments, references: shown.append(references)
        or forward(*arguments, references=references),
    )  # fmt: skip
    tensors = train_reference(tmp_path, reference_examples, raw, steps=3)
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert not changed(before, raw.state_dict()), "only the LoRA learns"
    assert any(shown), "the transformer is shown references"


def test_control_lora(parts, tmp_path, monkeypatch):
    """Outlines reach the model through an input layer of its own, and a file applies as it is."""
    monkeypatch.setattr(control_module, "PAIRS", 12)
    monkeypatch.setattr(control_module, "CAPTIONS", 2)
    monkeypatch.setattr(control_module, "NO_CONTROL", 0.0)
    pairs = OutlineExamples(tmp_path, *parts)
    batch, outlines = pairs.batch(3, Random(0))
    assert outlines.shape == batch.latents.shape and not torch.equal(outlines, batch.latents)
    assert len(OutlineExamples(tmp_path, *parts).groups) == len(pairs.groups), "encoded once"
    raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
    image = raw.first.weight.clone()
    tensors = train_control(tmp_path, pairs, raw, steps=2)
    own, control = tensors["first.weight"].chunk(2, dim=1)
    assert torch.equal(own, image) and control.abs().sum() > 0
    assert any(t.abs().sum() > 0 for name, t in tensors.items() if name.endswith(".B"))
    file = tmp_path / "control.safetensors"
    write_lora(tensors, file)
    pipeline = Krea2Pipeline.nano("raw")
    outline = torch.zeros(3, 64, 64)
    outline[:, 24:40, 24:40] = 1
    options = {"width": 64, "height": 64, "steps": 2, "output_type": "pt", "seed": 0}
    plain = pipeline("a square", **options)
    led = pipeline("a square", control=Control(file, outline), **options)
    assert not torch.allclose(plain, led, atol=1e-4)


def test_batches_have_up_to_two_references(reference_examples, monkeypatch):
    monkeypatch.setattr(reference_module, "TWO", 0.5)
    counts = set()
    for seed in range(12):
        batch, references = reference_examples.batch(2, Random(seed))
        counts.add(len(references))
        assert len(batch.latents) == len(batch.taps) == len(batch.mask) == 2
        assert all(reference.shape[:2] == batch.latents.shape[:2] for reference in references)
    assert counts == {0, 1, 2}


def test_vae(tmp_path):
    vae = train_vae(tmp_path, steps=1)
    assert all(torch.isfinite(weight).all() for weight in vae.state_dict().values())
