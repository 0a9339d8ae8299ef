"""Pretraining: a new transformer, stages in one run, `krea2 pretrain`."""

import json
import shutil

import pytest
import torch
from PIL import Image

from krea2_model import load_transformer
from krea2_model.cli.main import main
from krea2_model.nano.preview import TRANSFORMER_CONFIG
from krea2_model.transformer.references import Reference
from krea2_training.config import PretrainConfig, read_config
from krea2_training.data.cache import Batch
from krea2_training.data.examples import read_examples
from krea2_training.engine.rates import Rates
from krea2_training.flow import predict
from krea2_training.pretrain import new_transformer, pretrain, stages_of


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


def test_draws_of_noise_share_the_fusion_of_a_caption():
    torch.manual_seed(0)
    model = new_transformer(TRANSFORMER_CONFIG, seed=3)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    batch = Batch(
        torch.zeros(2, 16, 8, 8), torch.randn(2, 6, 12, 160), mask,
        references=[Reference(torch.randn(2, 16, 4, 6))],
    )  # fmt: skip
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    reference = Reference(batch.references[0].latents[rows])
    repeated = Batch(batch.latents[rows], batch.taps[rows], mask[rows], references=[reference])
    latents, times = torch.randn(6, 16, 8, 8), torch.rand(6)
    found = predict(model, latents, times, batch, train_text=True)
    expected = predict(model, latents, times, repeated, train_text=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    name = "txtfusion.projector.weight"
    gradients = [
        torch.autograd.grad(one.square().mean(), model.get_parameter(name))[0]
        for one in (found, expected)
    ]
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_masks_weigh_as_far_as_a_stage_says(pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    mask = Image.new("L", (128, 96), 255)
    mask.paste(0, (0, 0, 64, 96))
    for picture in pictures.glob("*.png"):
        mask.save(folder / f"{picture.stem}.mask.png")

    def first_loss(data, **settings):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        stage = {"stages__resolution": [64], "stages__steps": [1], "stages__batch": [3]}
        config = config_of(data, output, **stage, stages__draws=2, **settings)
        assert config.batches == [(64, 6)]
        losses = []
        pretrain(config, lambda step, record: losses.append(record["loss"]))
        return losses[0]

    plain = first_loss(pictures)
    assert first_loss(folder, stages__mask=[0.0]) == plain
    whole = first_loss(folder, stages__mask=[1.0])
    half = first_loss(folder, stages__mask=[0.5])
    assert whole != plain and half == pytest.approx((plain * 2 + whole) / 3, rel=1e-4)
    assert first_loss(folder) == whole


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
