"""nano's Raw by `krea2 pretrain`: its data, its cache and its settings."""

import argparse
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain_nano
from krea2_training.config import PretrainConfig, read_config
from krea2_training.data.cache import Cache
from krea2_training.data.encoders import Encoders
from krea2_training.data.examples import read_examples
from krea2_training.pretrain import stages_of
from krea2_training.weights.base import machine_of
from nano_training.fill_cache import fill_cache
from nano_training.scenes import PICTURE_SIZES
from nano_training.write_folder import write_folder


def options_of(**given):
    return argparse.Namespace(**{"scale": 1.0, "batch": None} | given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pictures"
    write_folder(folder, 3, masks=True)
    return folder


def test_pictures_have_captions_and_do_not_depend_on_their_number(folder, tmp_path):
    write_folder(tmp_path, 2, workers=0)
    for name in ("000000.png", "000001.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    data = read_config(None, SETTINGS | {"data.path": folder}, PretrainConfig).data
    examples = read_examples(data)
    assert [len(one.captions) for one in examples] == [2, 2, 2]
    sizes = set()
    for one in examples:
        with Image.open(one.image) as image, Image.open(one.mask) as mask:
            assert image.size == mask.size and len(image.getcolors(2**14)) > 1
            sizes.add(image.size)
            pixels, weights = np.asarray(image), np.asarray(mask)
        assert set(np.unique(weights)) == {64, 255}
        background = np.abs(pixels.astype(int) - pixels[0, 0]).max(axis=2) == 0
        assert background[weights == 64].mean() > 0.9
        assert background[weights == 255].mean() < 0.9
    assert sizes <= set(PICTURE_SIZES)


SETTINGS = {
    "model.transformer": "nano", "output.path": "raw.safetensors", "stages.steps": [1],
    "stages.resolution": [64],
}  # fmt: skip


def test_the_cache_is_what_a_run_makes_itself(folder):
    table = pretrain_nano.settings(options_of(scale=0.001, batch=2))
    table["memory"] |= {"device": "cpu", "dtype": "fp32"}
    file = folder.parent / "run.toml"
    file.write_text(pretrain_nano.as_toml(table))
    made = fill_cache(file)
    config = read_config(file, kind=PretrainConfig)
    stages = stages_of(config, read_examples(config.data))
    pictures = [one for stage in stages for one in stage.order.pictures]
    own = Cache(config.cache, Encoders(config.model, *machine_of(config)))
    assert own.fill(pictures) == 0 < made
    alone = Cache(folder.parent / "alone", Encoders(config.model, *machine_of(config)))
    assert alone.fill(pictures) == made
    for number in range(4):
        stage = stages[number % 2]
        draws = stage.order.batch(number)
        first = own.batch(draws, stage.order, torch.device("cpu"))
        second = alone.batch(draws, stage.order, torch.device("cpu"))
        torch.testing.assert_close(first.latents, second.latents, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(first.taps, second.taps, rtol=0.02, atol=0.02)


def test_settings_are_the_files_at_a_scale():
    table = pretrain_nano.settings(options_of(scale=0.1, batch=16))
    assert tomllib.loads(pretrain_nano.as_toml(table)) == table
    whole = pretrain_nano.settings(options_of())
    for few, many in zip(table["stages"]["steps"], whole["stages"]["steps"], strict=True):
        assert few == round(0.1 * many)
    assert set(table["stages"]["batch"]) == {16}
    assert table["training"]["warmup"] < whole["training"]["warmup"]
    read_config(pretrain_nano.CONFIG, kind=PretrainConfig)


def test_the_summary_parts_the_log_by_stages():
    records = [{"step": n, "seconds": float(n), "loss": 1.0 / n} for n in range(1, 6)]
    first, second = pretrain_nano.log_summary(records, [3, 4])
    assert (first["steps"], first["seconds a step"], first["seconds"]) == (3, 2.0, 6.0)
    assert (second["steps"], second["loss"]) == (2, round((1 / 4 + 1 / 5) / 2, 4))
