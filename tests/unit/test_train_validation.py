"""Validation on pictures that are not trained on, and pictures that keep what a model knows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_reference import TINY
from krea2_model import Krea2Transformer
from krea2_model.cli.main import main
from krea2_training import validation
from krea2_training.config import TrainConfig, read_config
from krea2_training.data.cache import Batch
from krea2_training.data.examples import Example, Sized, read_examples
from krea2_training.encoded import prior_pictures
from krea2_training.flow import flow_loss, generator_of
from krea2_training.train import train
from krea2_training.validation import Validator, hold_out

LOSS = "validation loss"


def write_pictures(folder: Path, count: int, word: str) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(len(word))
    for index in range(count):
        pixels = generator.integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {word} {index}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    return {name: write_pictures(base / name, 4, name) for name in ("own", "seen", "known")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def config_of(folders, cache, output, **settings) -> TrainConfig:
    defaults = {
        "data.path": folders["own"], "data.cache": cache, "data.resolution": [64],
        "model.transformer": "nano", "output.path": output, "adapter.rank": 2,
        "training.steps": 4, "training.batch": 2, "training.warmup": 0,
        "training.learning_rate": 1e-3, "samples.every": 0, "memory.device": "cpu",
    }  # fmt: skip
    return read_config(None, defaults | {k.replace("__", "."): v for k, v in settings.items()})


def log_of(config) -> list[dict]:
    return [json.loads(line) for line in (config.output.run_folder / "log.jsonl").open()]


def test_a_share_is_held_out_and_never_trained(folders, cache, tmp_path):
    examples = [Example(f"{number}.png", b"", ("a",)) for number in range(40)]
    config = config_of(folders, cache, tmp_path / "x.safetensors", validation__share=0.25)
    trained, seen = hold_out(examples, config)
    assert len(seen) == 10 and len(trained) == 30
    assert {one.name for one in (*trained, *seen)} == {one.name for one in examples}
    assert hold_out(examples, config)[1] == seen
    with pytest.raises(ValueError, match=r"validation.share is 0.25; expected .*one of 1 picture,"):
        hold_out(examples[:1], config)


def test_the_loss_is_of_the_same_noise_and_changes_nothing(folders, cache, tmp_path):
    """Measured at the first step, every so many, and the last, with what is shipped."""
    plain = config_of(folders, cache, tmp_path / "plain.safetensors")
    expected = load_file(train(plain))
    watched = {"validation__path": folders["seen"], "validation__every": 2}
    config = config_of(folders, cache, tmp_path / "watched.safetensors", **watched)
    found = load_file(train(config))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = {line["step"]: line[LOSS] for line in log_of(config) if LOSS in line}
    assert list(losses) == [1, 2, 4] and losses[4] != losses[1]
    assert [line["loss"] for line in log_of(config)] == [line["loss"] for line in log_of(plain)]
    # A rate of next to nothing leaves the loss where it is.
    still = {"training__learning_rate": 1e-9, "training__steps": 2}
    config = config_of(folders, cache, tmp_path / "still.safetensors", **watched, **still)
    train(config)
    first, second = (line[LOSS] for line in log_of(config))
    assert first == pytest.approx(second, abs=1e-5)


def test_what_is_measured(folders, cache, tmp_path):
    """The pictures of the folder, with first captions, under the weights that are shipped."""
    settings = {"validation__path": folders["seen"], "validation__draws": 2}
    config = config_of(folders, cache, tmp_path / "x.safetensors", **settings)
    examples = hold_out(read_examples(config.data), config)[1]
    assert {caption for one in examples for caption in one.captions} == {
        f"a seen {index}" for index in range(4)
    }
    examples = [replace(one, captions=(*one.captions, "another")) for one in examples]
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 8, 8), (2, 5, 12, TINY.text_hidden_dim))
    batches = {
        one.captions[0]: Batch(*(torch.randn(s, generator=generator) for s in shapes), None)
        for one in examples
    }
    asked = []

    class Kept:
        def batch(self, draws, order, device):
            assert len(draws) == 2 and draws[0] == draws[1]
            asked.append(draws[0].caption)
            return batches[draws[0].caption]

    model = Krea2Transformer(TINY).requires_grad_(False)
    values = {}
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        values[name] = torch.randn(parameter.shape, generator=generator) * 0.1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pictures = [Sized(one, 64, 64) for one in examples]
    found = Validator(config, Kept(), torch.device("cpu"), pictures).measure(model, values)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(values, strict=False)
    losses = [
        flow_loss(model, batches[caption], generator_of(0, index, validation._VALIDATION))
        for index, caption in enumerate(asked)
    ]
    assert sorted(asked) == sorted(batches)
    assert found == {LOSS: pytest.approx(float(sum(losses) / len(losses)), rel=1e-5)}


def test_a_run_may_be_watched_otherwise_when_it_goes_on(folders, cache, tmp_path):
    output = tmp_path / "x.safetensors"
    train(config_of(folders, cache, output, training__steps=1, validation__path=folders["seen"]))
    config = config_of(
        folders, cache, output, training__steps=2, validation__path=folders["known"],
        validation__every=1,
    )  # fmt: skip
    train(config)
    assert [line["step"] for line in log_of(config) if LOSS in line] == [1, 2]


def test_prior_pictures_add_their_weighted_loss(folders, cache, tmp_path):
    """With a gradient a + w b, the square of its norm is quadratic in w, also over two batches."""
    squares, losses = [], set()
    for weight in (1, 2, 3, 4):
        config = config_of(
            folders, cache, tmp_path / f"{weight}.safetensors", training__steps=1,
            training__accumulate=2, training__batch=1, prior__path=folders["known"],
            prior__weight=weight,
        )  # fmt: skip
        train(config)
        (line,) = log_of(config)
        squares.append(line["gradient"] ** 2)
        losses.add((line["loss"], line["prior loss"]))
    assert len(losses) == 1, "each loss is logged as it is"
    second = [squares[i] - 2 * squares[i + 1] + squares[i + 2] for i in (0, 1)]
    assert second[0] > 0 and second[0] == pytest.approx(second[1], rel=1e-2)
    with pytest.raises(ValueError, match="other settings: prior"):
        train(
            config_of(
                folders,
                cache,
                config.output.path,
                training__accumulate=2,
                training__batch=1,
                prior__path=folders["known"],
            )  # fmt: skip
        )


def test_prior_pictures_have_captions_of_their_own(folders, cache, tmp_path):
    config = config_of(
        folders, cache, tmp_path / "x.safetensors", data__trigger="sks", data__caption="mine",
        prior__path=folders["known"],
    )  # fmt: skip
    assert read_examples(config.data)[0].captions == ("sks, a own 0",)
    assert prior_pictures(config)[0].example.captions == ("a known 0",)
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("RGB", (64, 64)).save(bare / "a.png")
    settings = {"data__caption": "mine", "prior__path": bare}
    config = config_of(folders, cache, tmp_path / "x.safetensors", **settings)
    with pytest.raises(ValueError, match="1 of 1 picture without a caption.*prior.caption for all"):
        prior_pictures(config)
    config = config_of(
        folders, cache, tmp_path / "x.safetensors", **settings, prior__caption="a thing"
    )
    assert prior_pictures(config)[0].example.captions == ("a thing",)


def test_the_options(folders, tmp_path, capsys):
    words = ["train", str(folders["own"]), "--model", "nano", "--resolution", "64", "--output",
             str(tmp_path / "x.safetensors"), "--dry-run"]  # fmt: skip
    prior = ["--prior", str(folders["known"]), "--prior-weight", "0.5"]
    assert main([*words, "--validation-share", "0.25", "--validation-every", "5", *prior]) == 0
    share = ["--validation-share", "0.25", "--validation", str(folders["seen"])]
    assert main([*words, *share]) == 2
    assert "--validation-share is 0.25; expected 0 beside --validation" in capsys.readouterr().err
