"""Sliders: the two directions of a LoRA, wordings, `krea2 slider`."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_reference import TINY
from krea2_model import Krea2Pipeline, Krea2Transformer
from krea2_model.cli.main import main
from krea2_training.config import SliderConfig, read_config
from krea2_training.data.cache import Texts
from krea2_training.settings.sections import Adapter
from krea2_training.slider import Slide, slider, worded
from krea2_training.weights.adapters import add_adapters, set_strength


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Krea2Transformer(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.requires_grad_(False)
    add_adapters(model, Adapter(rank=2))
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_strengths_learn_their_own_direction(model, checkpointing):
    """Against the formula, written with the model at fixed strengths."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    texts = [
        Texts(torch.randn(2, 5, 12, TINY.text_hidden_dim, generator=generator)) for _ in range(3)
    ]

    def velocity(text, strength):
        set_strength(model, strength)
        times = torch.full((2,), 0.6)
        return model(latents, times, text.fuse(model))

    with torch.no_grad():
        middle, up, down = (velocity(text, 0.0) for text in texts)
    step = 1.5 * (up - down)
    expected = torch.zeros(())
    for strength in (1.0, -1.0):
        error = velocity(texts[0], strength) - (middle + strength * step)
        (0.5 * error.square().mean()).backward()
        expected = expected + 0.5 * error.detach().square().mean()
    by_formula = gradients(model)
    set_strength(model, 1.0)
    measured = Slide(model, 1.5, checkpointing=checkpointing).loss(latents, 0.6, *texts)
    measured.loss.backward()
    torch.testing.assert_close(measured.loss.detach(), expected)
    found = gradients(model)
    assert found.keys() == by_formula.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, by_formula[name], atol=1e-6, rtol=1e-4)
    contrast = float(step.square().mean().sqrt() / middle.square().mean().sqrt())
    assert measured.numbers["contrast"] == pytest.approx(contrast, rel=1e-4)


def test_wordings():
    assert worded("{}", "a star") == "a star"
    assert worded("very old", "a man") == "a man, very old"
    assert worded("an old photo of {}", "a man") == "an old photo of a man"


def config_of(tmp_path, name, **settings):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na square\n")
    defaults = {
        "prompts.path": prompts, "prompts.size": 64, "slider.positive": "{} in red",
        "slider.negative": "{} in blue", "slider.steps": 4, "model.transformer": "nano",
        "adapter.rank": 4, "training.steps": 12, "training.batch": 4, "training.warmup": 0,
        "training.learning_rate": 5e-3, "samples.every": 0, "memory.device": "cpu",
        "output.path": tmp_path / f"{name}.safetensors",
    }  # fmt: skip
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return read_config(None, defaults | settings, SliderConfig)


def test_strength_moves_pictures_from_one_wording_to_the_other(tmp_path):
    file = slider(config_of(tmp_path, "colour", training__steps=30))
    redness = []
    for scale in (-1.5, 0.0, 1.5):
        pipeline = Krea2Pipeline.nano("raw")
        if scale:
            pipeline.load_lora(file, scale)
        options = {"steps": 6, "guidance": 0, "width": 64, "height": 64, "output_type": "np"}
        pictures = pipeline(["a star", "a ring"] * 4, seed=list(range(8)), **options)
        redness.append(float(np.mean(pictures[..., 0] - pictures[..., 2])))
    assert redness[0] + 0.02 < redness[1] < redness[2] - 0.02, redness


def test_pictures_of_several_shapes(tmp_path, monkeypatch):
    """Of one area; each batch has one of those that are named."""
    shapes = []
    loss = Slide.loss
    monkeypatch.setattr(
        Slide, "loss", lambda self, x, *rest: (shapes.append(x.shape[2:]), loss(self, x, *rest))[1]
    )
    slider(config_of(tmp_path, "wide", prompts__aspects=["1:1", "4:1"], training__steps=8))
    assert set(shapes) == {(8, 8), (4, 16)}


def test_a_resumed_slider_equals_one_that_never_stopped(tmp_path):
    whole = load_file(slider(config_of(tmp_path, "whole", training__steps=3)))

    def stop(step, record):
        if step == 2:
            raise KeyboardInterrupt

    config = config_of(tmp_path, "parts", training__steps=3)
    with pytest.raises(KeyboardInterrupt):
        slider(config, stop)
    parts = load_file(slider(config))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").open()]
    assert len(lines) == 3 and all(line["contrast"] > 0 for line in lines)


def test_the_command(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a star\n")
    words = ["slider", str(tmp_path / "prompts.txt"), "--model", "nano", "--size", "64",
             "--positive", "large", "--output", str(tmp_path / "x.safetensors")]  # fmt: skip
    assert main([*words, "--negative", "small", "--dry-run"]) == 0
    assert "together" in capsys.readouterr().out
    for extra, expected in (
        ([], "--negative is ''; expected words"),
        (["--negative", "large"], "--negative is 'large'; expected other words than"),
        (["--negative", "small", "--method", "full"], "--method is full; expected lora"),
    ):
        assert main([*words, *extra]) == 2
        assert expected in capsys.readouterr().err
