"""Pretraining: a new transformer, stages in one run, `krea2 pretrain`."""

import json

import pytest
import torch
from PIL import Image

from krea2_model import load_transformer
from krea2_model.cli.main import main
from krea2_model.nano.preview import TRANSFORMER_CONFIG
from krea2_training.config import PretrainConfig, read_config
from krea2_training.data import read_examples
from krea2_training.pretrain import new_transformer, pretrain, stages_of
from krea2_training.rates import Rates


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", "#d72828"), ("blue", "#284bcd"), ("white", "#f5f5f5")):
        Image.new("RGB", (128, 96), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} background")
    return folder


def config_of(pictures, output, **settings):
    defaults = {
        "data.path": pictures, "model.transformer": "nano", "output.path": output,
        "stages.resolution": [64, 96], "stages.steps": [3, 2], "stages.batch": [3, 2],
        "training.learning_rate": 3e-3, "training.optimiser": "muon", "training.warmup": 0,
        "training.decay": 0.2, "samples.every": 0, "memory.device": "cpu",
    }  # fmt: skip
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    return read_config(None, defaults | settings, PretrainConfig)


def test_a_new_transformer_predicts_nothing_and_can_learn():
    model = new_transformer(TRANSFORMER_CONFIG, seed=3)
    again = new_transformer(TRANSFORMER_CONFIG, seed=3)
    same = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in same)
    latents = torch.randn(1, 16, 8, 8)
    text = torch.randn(1, 3, TRANSFORMER_CONFIG.hidden_size)
    velocity = model(latents, torch.tensor([0.5]), text)
    assert velocity.count_nonzero() == 0
    (velocity - latents).square().mean().backward()
    output = model.get_parameter("last.linear.weight")
    assert output.grad.norm() > 0
    torch.nn.init.normal_(output)
    model(latents, torch.tensor([0.5]), text).square().mean().backward()
    for name in ("blocks.0.attn.wo.weight", "blocks.5.mlp.down.weight"):
        assert model.get_parameter(name).grad.norm() > 0, f"{name}: the gates are open"


def test_stages_have_their_sizes_batches_and_rates(pictures, tmp_path):
    config = config_of(pictures, tmp_path / "raw.safetensors", stages__shift=[0.5, 1.0])
    assert config.training.steps == 5 and config.adapter.method == "full"
    edits = config_of(pictures, tmp_path / "raw.safetensors", data__references="identity")
    assert edits.references == "identity"
    first, second = stages_of(config, read_examples(config.data))
    assert (first.begin, first.end, second.begin, second.end) == (0, 3, 3, 5)
    assert (first.shift, second.shift) == (0.5, 1.0)
    sizes = [{(p.width, p.height) for p in stage.order.pictures} for stage in (first, second)]
    assert sizes == [{(80, 64)}, {(112, 80)}]
    assert [len(stage.order.batch(0)) for stage in (first, second)] == [3, 2]
    rates = Rates(5, warmup=0, decay=0.2, stages=((3, 1.0), (5, 0.5)))
    assert [rates.factor(step) for step in range(5)] == [1, 1, 1, 0.5, 0.5]


def test_a_run_through_all_stages_is_a_raw_checkpoint(pictures, tmp_path):
    whole = pretrain(config_of(pictures, tmp_path / "whole.safetensors"))

    def stop(step, record):
        if step == 4:  # in the second stage
            raise KeyboardInterrupt

    config = config_of(pictures, tmp_path / "parts.safetensors")
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, stop)
    parts = load_transformer(pretrain(config), dtype=torch.float32)
    expected = load_transformer(whole, dtype=torch.float32)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parts.get_parameter(name), parameter), name
    assert expected.variant == "raw" and expected.preset.size == 96
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 5 and losses[2] < losses[0]


def test_the_command_refuses_and_forecasts(pictures, tmp_path, capsys):
    output = str(tmp_path / "raw.safetensors")
    words = ["pretrain", str(pictures), "--model", "nano", "--output", output]
    stages = ["--resolution", "64", "128", "--stage-steps", "2", "1"]
    assert main([*words, *stages, "--dry-run", "--device", "cpu"]) == 0
    assert "at 128 px" in capsys.readouterr().out
    for extra, expected in (
        (["--stage-steps", "2"], "--stage-steps is [2]; expected 3 numbers, one for each stage"),
        ([*stages, "--stage-batch", "4"], "--stage-batch is [4]; expected 2 numbers"),
        ([], "--stage-steps is []; expected 3 numbers"),
        (
            ["--resolution", "100", "--stage-steps", "1"],
            "--resolution is [100]; expected multiples",
        ),
    ):
        assert main([*words, *extra]) == 2
        assert expected in capsys.readouterr().err
