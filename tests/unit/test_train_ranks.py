"""Runs of two processes, started by torchrun: the same as those of one, and what ends them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from krea2_model import Krea2Transformer, extract_lora, nano, save_transformer
from krea2_model.nano.preview import TRANSFORMER_CONFIG
from krea2_training.commands import run_command
from krea2_training.config import KINDS, read_config
from krea2_training.engine.sharded_states import newest_state
from krea2_training.engine.watch import read_log
from krea2_training.forecast import training_memory

ROOT = Path(__file__).parents[2]

TRAINING = {
    "model.transformer": "nano", "memory.device": "cpu", "samples.every": 0, "adapter.rank": 4,
    "training.accumulate": 2, "training.warmup": 0, "training.learning_rate": 1e-3,
    "training.steps": 3,
}  # fmt: skip
REWARD = """
def bright(pictures, rows):
    return pictures.mean(axis=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, pairs, prompts, a reward, and a checkpoint whose heads two processes can share."""
    folder = tmp_path_factory.mktemp("ranks")
    colours = {"red": "#d72828", "blue": "#284bcd", "white": "#f5f5f5", "green": "#32a050"}
    (folder / "pictures").mkdir()
    (folder / "pairs").mkdir()
    for name, colour in colours.items():
        Image.new("RGB", (80, 64), colour).save(folder / "pictures" / f"{name}.png")
        (folder / "pictures" / f"{name}.txt").write_text(f"{name} background")
    for better, worse in (("red", "blue"), ("green", "white")):
        for name, kind in ((better, "better"), (worse, "worse")):
            Image.new("RGB", (64, 64), colours[name]).save(
                folder / "pairs" / f"{better}.{kind}.png"
            )
        (folder / "pairs" / f"{better}.txt").write_text("a background")
    (folder / "prompts.txt").write_text("a red circle\na blue star\na white star\na green square\n")
    box = {"prompt": "a red circle", "box": [0, 0, 0.5, 1]}
    other = {"prompt": "a star", "box": [0.5, 0, 0.5, 1]}
    rows = [{"prompt": "a"}, {"prompt": "b", "regions": [box]}, {"prompt": "c", "regions": [box]},
            {"prompt": "", "regions": [box, other]}]  # fmt: skip
    (folder / "regions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "score.py").write_text(REWARD)
    from dataclasses import replace

    config = replace(
        TRANSFORMER_CONFIG, attention_head_dim=64, num_attention_heads=4, num_key_value_heads=2,
        axes_dims_rope=(16, 24, 24), num_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Krea2Transformer(config, variant="raw")
    for parameter in model.parameters():
        std = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.1
        torch.nn.init.normal_(parameter, std=std)
    save_transformer(model, folder / "wide.safetensors")
    extract_lora(nano.TRANSFORMERS["turbo"], nano.TRANSFORMERS["raw"],
                 folder / "start.safetensors", rank=3, targets="blocks+text")  # fmt: skip
    return folder


def runs_of(folder):
    """The settings of each run by its name, without its output."""
    pictures = {"data.path": str(folder / "pictures"), "data.resolution": [64]}
    prompts = {"prompts.path": str(folder / "prompts.txt"), "prompts.size": 64}
    wide = {
        "model.transformer": str(folder / "wide.safetensors"),
        "model.text_encoder": str(nano.text_encoder_file()), "model.vae": str(nano.VAE),
    }  # fmt: skip
    full = {**pictures, "adapter.method": "full", "training.average": 0.9}
    return {
        "killed": ("train", {**full, "output.save_every": 1, "output.keep": 0}),
        "lora": (
            "train",
            {
                **pictures, "memory.base": "4bit", "adapter.targets": "blocks+text",
                "validation.share": 0.25, "validation.every": 9,
                "adapter.start": str(folder / "start.safetensors"),
            },
        ),
        "dora": ("train", {**pictures, "adapter.method": "dora", "ranks.shard": False}),
        "stopped": ("train", {**pictures, "memory.base": "fp8"}),
        "parted": ("train", {**full, **wide, "ranks.tensor": 2}),
        "pretrain": (
            "pretrain",
            {
                "data.path": str(folder / "pictures"), "stages.resolution": [64, 80],
                "stages.steps": [2, 1], "training.optimiser": "muon", "ranks.copies": 2,
                "samples.prompts": ["red background"], "samples.every": 3, "samples.steps": 2,
                "samples.size": 64,
            },
        ),
        "prefer": ("prefer", {"pairs.path": str(folder / "pairs"), "pairs.resolution": 64}),
        "distil": ("distil", {**prompts, "distil.steps": [1, 2, 3, 4], "distil.fake_updates": 2}),
        "regions": (
            "distil",
            {
                **prompts, "prompts.path": str(folder / "regions.jsonl"), "distil.steps": [2],
                "distil.fake_updates": 1,
            },
        ),
        "slider": (
            "slider",
            {**prompts, "slider.positive": "red", "slider.negative": "blue", "slider.steps": 4},
        ),
        "reward": (
            "reward",
            {
                **prompts, "reward.rewards": [f"{folder / 'score.py'}:bright"],
                "reward.groups": 4, "reward.group_size": 2, "reward.rollout_steps": 3,
                "reward.random_steps": 1, "reward.updates": 2, "training.accumulate": 1,
            },
        ),
        "odd": ("train", {**pictures, "training.accumulate": 3}),
        "one head": ("train", {**full, "ranks.tensor": 2}),
        "copies": ("train", {**full, **wide, "ranks.tensor": 2, "ranks.copies": 2}),
    }  # fmt: skip


REFUSED = {
    "odd": "training.accumulate is 3; expected a multiple of 2",
    "one head": "ranks.tensor is 2; expected a divisor of 1: the blocks have 1 heads",
    "copies": "ranks.copies is 2; expected a divisor of 1: torchrun has started 2 processes, and",
}


@pytest.fixture(scope="module")
def both(folder):
    """Folders of all runs in two processes, and in one."""
    runs, folders = runs_of(folder), {}
    for name, ends in (
        ("two", {"killed": {"dies_at": 2}, "stopped": {"stops_at": 2}}),
        ("one", {}),
    ):
        folders[name] = folder / name
        folders[name].mkdir()
        jobs = [
            {
                "command": command, **ends.get(run, {}),
                "settings": {
                    **TRAINING, **settings, "output.path": f"{folders[name] / run}.safetensors",
                },
            }
            for run, (command, settings) in runs.items()
        ]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(jobs))
    words = [
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "--monitor-interval",
        "0.1",
    ]
    worker = ROOT / "tests" / "support" / "rank_worker.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A store of its own for each start: gloo would find addresses of processes that are gone.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, worker, folder / "two.json"],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for job in json.loads((folder / "one.json").read_text()):
        name = Path(job["settings"]["output.path"]).stem
        if name not in REFUSED:
            settings = {key: value for key, value in job["settings"].items() if "ranks" not in key}
            if name == "stopped":
                settings["training.steps"], settings["training.decay"] = 2, 0.0
            run_command(
                read_config(None, settings, KINDS[job["command"]]), lambda step, record: None
            )
    return folders


def losses(folder, name):
    return [record["loss"] for record in read_log(folder / name)]


@pytest.mark.parametrize(
    "name",
    [
        "killed",
        "lora",
        "dora",
        "parted",
        "pretrain",
        "prefer",
        "distil",
        "regions",
        "slider",
        "reward",
    ],
)
def test_two_processes_are_one(both, name):
    two, one = (losses(both[side], name) for side in ("two", "one"))
    assert len(one) == 3
    assert two == pytest.approx(one, abs=1e-5, rel=1e-5)
    # A gradient's size says nothing to Adam, so losses do not show it.
    two, one = ([r["gradient"] for r in read_log(both[side] / name)] for side in ("two", "one"))
    assert two == pytest.approx(one, abs=3e-6, rel=1e-4)
    tensors, expected = (load_file(both[side] / f"{name}.safetensors") for side in ("two", "one"))
    assert tensors.keys() == expected.keys()
    tensors, expected = (torch.cat([t[key].flatten().float() for key in sorted(expected)])
                         for t in (tensors, expected))  # fmt: skip
    # Where a gradient is nothing but rounding, Adam's first steps have its sign.
    assert (tensors - expected).norm() < 1e-3 * expected.norm()


def test_norms_of_heads_learn_from_the_heads_of_all_processes(both, folder):
    """A process computes half of the heads, and their norms belong to all."""
    before = load_file(folder / "wide.safetensors")
    two, one = (load_file(both[side] / "parted.safetensors") for side in ("two", "one"))
    names = [name for name in one if "qknorm" in name and name.startswith("blocks.")]
    assert len(names) == 4
    for name in names:
        change = one[name] - before[name]
        assert (two[name] - one[name]).norm() < 0.02 * change.norm(), name


def test_other_numbers_of_the_log_are_those_of_all_processes(both):
    for name, number in (
        ("reward", "reward"), ("distil", "fake loss"), ("prefer", "drift"),
        ("lora", "validation loss"),
    ):  # fmt: skip
        two, one = (
            [record[number] for record in read_log(both[side] / name) if number in record]
            for side in ("two", "one")
        )
        assert two == pytest.approx(one, abs=1e-5), name


def test_one_process_ends_the_run_of_all(both):
    """What it learned is written, once all have come to the same step."""
    assert losses(both["two"], "stopped") == pytest.approx(losses(both["one"], "stopped"), abs=1e-5)
    assert len(losses(both["two"], "stopped")) == 2
    assert (both["two"] / "stopped.safetensors").is_file()


def test_a_state_of_two_processes_goes_on_in_one(both, folder):
    """Of weights, averages and optimisers; and only the last complete state is kept."""
    run = both["two"] / "killed"
    state = newest_state(run)
    assert state is not None and [state] == sorted(run.glob("state_step*"))
    assert len(list(state.glob("*.safetensors"))) == 2
    command, settings = runs_of(folder)["killed"]
    settings = TRAINING | settings | {"training.steps": 4, "training.decay": 0.0}

    def go_on(side):
        path = both[side] / "killed.safetensors"
        config = read_config(None, {**settings, "output.path": str(path)}, KINDS[command])
        run_command(config, lambda step, record: None)
        return losses(both[side], "killed")

    two, one = go_on("two"), go_on("one")
    assert len(one) == 4 and two == pytest.approx(one, abs=1e-5)
    (state / "state.json").write_text("no JSON")
    with pytest.raises(ValueError, match="cannot be read as the state of a run"):
        go_on("two")


@pytest.mark.parametrize("name", ["killed", "lora", "dora", "pretrain"])
def test_what_a_process_sends_is_forecast(both, folder, name):
    """All of it, and no more than the part of the model that is gathered in one pass only."""
    command, settings = runs_of(folder)[name]
    settings = TRAINING | settings | {"output.path": str(folder / "x.safetensors")}
    config = read_config(None, settings, KINDS[command])
    expected = training_memory(
        TRANSFORMER_CONFIG, adapter=config.adapter, memory=config.memory, ranks=config.ranks,
        training=config.training, side=64, processes=2, itemsize=4,
    )  # fmt: skip
    sent = int((both["two"] / f"{name}.bytes").read_text())
    assert 0.7 * expected.traffic < sent < 1.01 * expected.traffic


def test_samples_are_painted_by_sharded_weights(both):
    """With averages in their place, and one file of each."""
    two, one = (Image.open(both[side] / "pretrain" / "samples" / "step000003_01.png")
                for side in ("two", "one"))  # fmt: skip
    difference = torch.tensor(list(two.tobytes())) - torch.tensor(list(one.tobytes()))
    assert two.size == (64, 64) and difference.abs().max() <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_two_processes_cannot_share_is_refused_by_both(both, name):
    for rank in (0, 1):
        assert REFUSED[name] in (both["two"] / f"{name}.{rank}.txt").read_text()
    assert not (both["two"] / f"{name}.safetensors").exists()
