"""The loop and `krea2 train`: losses, gradients, resuming to the bit, results, what goes wrong."""

import errno
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import krea2_training.data.encoders as encoders_module
import krea2_training.pretrain as pretrain_module
import krea2_training.session as session_module
import krea2_training.train as train_module
from diffusers_reference import TINY, load_from, run_reference
from formats import gguf_file
from krea2_model import (
    Krea2Pipeline,
    Krea2Transformer,
    load_transformer,
    nano,
    save_transformer,
)
from krea2_model.checkpoints.transformer_keys import diffusers_to_official, official_to_module
from krea2_model.cli.main import main
from krea2_model.cli.parser import command_parser
from krea2_model.cli.train_options import TRAINING
from krea2_training.config import read_config
from krea2_training.data.cache import Batch, Cache
from krea2_training.engine import states
from krea2_training.engine.loop import Run, TrainingStopped
from krea2_training.engine.rates import Rates
from krea2_training.flow import draw_times, flow_loss, generator_of, noised
from krea2_training.forecast import forecast
from krea2_training.session import Session
from krea2_training.train import train
from nano_training.scenes import Scene, Thing, draw


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures on ruled paper, with captions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for index, (shape, colour) in enumerate(
        (("circle", "red"), ("square", "blue"), ("star", "green"), ("triangle", "yellow"))
    ):
        scene = Scene((Thing(shape, colour, "centre"),), "white")
        array = draw(scene, 128, 128, notebook=True)
        Image.fromarray((array * 255).astype("uint8")).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} {shape}")
    return folder


@pytest.fixture(scope="module")
def cache(pictures, tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def config_of(pictures, cache, output, **settings):
    defaults = {
        "data.path": pictures, "data.cache": cache, "data.resolution": [64],
        "model.transformer": "nano", "output.path": output, "adapter.rank": 4,
        "training.steps": 4, "training.batch": 2, "training.warmup": 1,
        "training.learning_rate": 1e-3, "samples.every": 0, "memory.device": "cpu",
    }  # fmt: skip
    return read_config(None, defaults | {k.replace("__", "."): v for k, v in settings.items()})


def test_gradients_are_diffusers_s(reference_transformer):
    """Of the flow loss, with the same weights, noise and times."""
    ours = Krea2Transformer(TINY).requires_grad_(True)
    load_from(ours, reference_transformer)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    taps = torch.randn(2, 6, 12, TINY.text_hidden_dim, generator=generator)
    loss = flow_loss(ours, Batch(latents, taps, None), generator_of(0, 0), train_text=True)
    loss.backward()
    noise = noised(latents, generator_of(0, 0), None, 1.0)
    reference_transformer.requires_grad_(True)
    try:
        velocity = run_reference(reference_transformer, noise.latents, noise.times, taps)
        expected = (velocity - noise.velocity).square().mean()
        names, parameters = zip(*reference_transformer.named_parameters(), strict=True)
        gradients = torch.autograd.grad(expected, parameters)
    finally:
        reference_transformer.requires_grad_(False)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert len(names) == len(list(ours.parameters()))
    for name, gradient in zip(names, gradients, strict=True):
        official = diffusers_to_official(name)
        own = ours.get_parameter(official_to_module(official)).grad
        gradient = gradient.flatten() if official.endswith(".mod.lin") else gradient
        torch.testing.assert_close(own, gradient, atol=1e-5, rtol=1e-4)


def test_the_command_offers_what_the_settings_take():
    """Their modules are apart, since help imports no training."""
    from dataclasses import fields

    from krea2_training.config import KINDS
    from krea2_training.settings import sections

    assert TRAINING.keys() == KINDS.keys()
    for name, command in TRAINING.items():
        known = KINDS[name].sections()
        settings = [s for group in command.groups.values() for _, s, _ in group]
        for section, _, entry in (s.partition(".") for s in [command.source, *settings]):
            assert entry in {field.name for field in fields(known[section])}, (name, section, entry)
    offered = {a.dest: a.choices for a in command_parser("train")._actions if a.choices}
    assert offered == {
        "adapter.method": sections.METHODS,
        "adapter.targets": sections.TARGETS,
        "data.references": sections.EDITS,
        "training.optimiser": sections.OPTIMISERS,
        "memory.base": sections.BASES,
        "memory.dtype": ("bf16", "fp32"),
        "output.key_style": sections.KEY_STYLES,
    }


def test_times_are_logit_normal_and_shifted():
    times = draw_times(4000, mu=0.9, spread=1.0, generator=generator_of(0, 1))
    logits = torch.logit(times.double())
    assert abs(logits.mean() - 0.9) < 0.02 and abs(logits.std() - 1) < 0.03
    assert times.min() > 0 and times.max() < 1


def test_rates_rise_hold_and_fall():
    rates = Rates(100, warmup=10, decay=0.2)
    factors = [rates.factor(step) for step in range(100)]
    assert factors[0] < 0.1 and factors[10] == 1 and factors[79] == 1
    assert factors[99] == pytest.approx(0.05)
    assert factors[80:] == sorted(factors[80:], reverse=True)


@pytest.mark.parametrize(
    "method, optimiser, average, dtypes",
    [("lora", "adamw", 0.9, {torch.float32}), ("lokr", "muon", 0.0, {torch.float32}),
     ("lora", "adamw8bit", 0.0, {torch.float32, torch.uint8})],
)  # fmt: skip
def test_a_resumed_run_equals_one_that_never_stopped(
    pictures, cache, tmp_path, method, optimiser, average, dtypes
):
    # Small tensors have no state of 8 bits.
    options = {"adapter__method": method, "adapter__rank": 16, "training__optimiser": optimiser,
               "training__average": average, "training__accumulate": 2, "training__steps": 3,
               "training__batch": 1}  # fmt: skip
    whole = train(config_of(pictures, cache, tmp_path / "whole.safetensors", **options))

    def stop(step, record):
        if step == 2:
            raise KeyboardInterrupt

    config = config_of(pictures, cache, tmp_path / "parts.safetensors", **options)
    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    assert not (tmp_path / "parts.safetensors").exists()
    state = load_file(tmp_path / "parts" / "state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == dtypes
    parts = train(config)
    ours, expected = load_file(parts), load_file(whole)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_a_base_s_content_counts_and_not_its_place(pictures, cache, tmp_path):
    def run(base, steps):
        return train(config_of(
            pictures, cache, tmp_path / "x.safetensors", training__steps=steps,
            model__transformer=str(base), model__vae=str(nano.VAE),
            model__text_encoder=str(nano.text_encoder_file()),
        ))  # fmt: skip

    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    here.write_bytes(nano.TRANSFORMERS["raw"].read_bytes())
    run(here, 1)
    here.rename(there)
    here.write_bytes(nano.TRANSFORMERS["turbo"].read_bytes())
    with pytest.raises(ValueError, match="has a run with other settings: model .another"):
        run(here, 2)
    run(there, 2)


def test_a_package_that_is_not_there_is_named(pictures, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = config_of(pictures, cache, tmp_path / "x.safetensors", training__optimiser="adamw8bit")
    with pytest.raises(ValueError, match=r"adamw8bit, which needs bitsandbytes: pip install"):
        train(config)


def test_what_is_trained_lowers_the_loss_and_is_a_lora_for_turbo(pictures, cache, tmp_path):
    losses = []
    config = config_of(
        pictures, cache, tmp_path / "style.safetensors", training__steps=12, training__batch=4,
        training__learning_rate=3e-3, data__trigger="notebook", data__caption_dropout=0.0,
        samples__prompts=["a red circle"], samples__every=12, samples__size=64,
        samples__steps=2, samples__turbo="nano",
    )  # fmt: skip
    file = train(config, lambda step, record: losses.append(record["loss"]))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert (tmp_path / "style" / "samples" / "step000012.png").is_file()
    assert (tmp_path / "style" / "loss.png").is_file()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.trigger_phrase"] == "notebook" and metadata["ss_steps"] == "12"
    assert str(tmp_path) not in json.dumps(metadata), "no folders of this machine"
    pipeline = Krea2Pipeline.nano()
    report = pipeline.load_lora(file)
    assert report.is_complete


def test_full_training_writes_a_transformer(pictures, cache, tmp_path):
    config = config_of(
        pictures, cache, tmp_path / "full.safetensors", adapter__method="full", training__steps=1,
        training__batch=1, training__learning_rate=1e-4,
    )  # fmt: skip
    tuned = load_transformer(train(config), dtype=torch.float32)
    raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
    assert tuned.preset == raw.preset
    names = [n for n, p in tuned.named_parameters() if not torch.equal(p, raw.get_parameter(n))]
    assert any(name.startswith("txtfusion") for name in names) and len(names) > 50


def test_a_loss_that_is_not_finite_leaves_the_last_state(pictures, cache, tmp_path, monkeypatch):
    config = config_of(pictures, cache, tmp_path / "x.safetensors", output__save_every=1)
    real, calls = train_module.pictures_loss, []

    def broken(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(train_module, "pictures_loss", broken)
    with pytest.raises(TrainingStopped, match=r"at step 2.*Lower training.learning_rate"):
        train(config)
    step, _ = states.read_state_header(tmp_path / "x" / "state.safetensors")
    assert step == 2
    train(config)  # the same batch is fine now


def test_a_whole_model_is_float32_once_on_the_device(pictures, cache, tmp_path):
    """Until then its weights are the file's, which processes share; wider ones are not cut."""
    file, mixed = nano.TRANSFORMERS["raw"], tmp_path / "mixed.safetensors"
    tensors = load_file(file)
    assert tensors["first.weight"].dtype == torch.bfloat16
    exact = tensors["first.weight"].float() + 1e-6
    save_file({**tensors, "first.weight": exact}, mixed)
    for path, dtype in ((file, torch.bfloat16), (mixed, torch.float32)):
        config = config_of(pictures, cache, tmp_path / "x.safetensors", adapter__method="full",
                           model__transformer=str(path), model__vae=str(nano.VAE),
                           model__text_encoder=str(nano.text_encoder_file()))  # fmt: skip
        session = Session(config)
        assert session.model.first.weight.dtype == dtype
        trained = session.make_trainable()
        assert {p.dtype for p in trained.values()} == {torch.float32}
        expected = exact if path == mixed else tensors["first.weight"].float()
        assert torch.equal(session.model.first.weight.detach(), expected)


def test_a_whole_model_begins_as_a_quantised_file(pictures, cache, tmp_path):
    tensors, file = load_file(nano.TRANSFORMERS["raw"]), tmp_path / "raw.gguf"
    name = "blocks.0.attn.wq.weight"
    expected = gguf_file(tensors, file, "Q8_0")[name]
    assert not torch.equal(expected, tensors[name].float())
    config = config_of(pictures, cache, tmp_path / "x.safetensors", adapter__method="full",
                       model__transformer=str(file), model__vae=str(nano.VAE),
                       model__text_encoder=str(nano.text_encoder_file()))  # fmt: skip
    found = Session(config).model.get_parameter(name)
    assert found.dtype == torch.float32 and torch.equal(found.detach(), expected)


def test_a_full_disk_is_named_and_keeps_the_state(pictures, cache, tmp_path, monkeypatch):
    config = config_of(pictures, cache, tmp_path / "x.safetensors", output__save_every=1)
    real, calls = states.save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(states, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert states.read_state_header(tmp_path / "x" / "state.safetensors")[0] == 2


def test_another_run_s_folder_is_refused_before_anything_is_encoded(
    pictures, cache, tmp_path, monkeypatch
):
    train(config_of(pictures, cache, tmp_path / "x.safetensors", training__steps=1))
    other = config_of(pictures, cache, tmp_path / "x.safetensors", adapter__rank=8)
    monkeypatch.setattr(Cache, "fill", lambda *arguments: pytest.fail("encoding began"))
    with pytest.raises(ValueError, match=r"settings: adapter.rank \(4 there, 8 now\). Choose"):
        train(other)


def test_the_command_trains_and_refuses(pictures, cache, tmp_path, capsys, caplog):
    output = tmp_path / "style.safetensors"
    (tmp_path / "run.toml").write_text(
        f'[data]\npath = "{pictures.as_posix()}"\ncache = "{cache.as_posix()}"\nresolution = 64\n'
        '[model]\ntransformer = "nano"\n[adapter]\nrank = 4\n[samples]\nevery = 0\n'
        f'[output]\npath = "{output.as_posix()}"\n'
    )
    words = ["train", str(tmp_path / "run.toml"), "--steps", "1", "--device", "cpu"]
    assert main([*words, "--dry-run"]) == 0
    assert "together" in capsys.readouterr().out and not output.exists()
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert output.is_file()
    for extra, expected in (
        (["--output", "style.pt"], "--output is style.pt; expected a name that ends in"),
        (["--resolution", "100"], "--resolution is [100]; expected multiples of 16"),
        (["--method", "lorra"], "--method is lorra; expected one of lora"),
    ):
        assert main([*words, *extra]) == 2
        assert expected in capsys.readouterr().err
    assert main(["train", str(pictures), "--model", "nano"]) == 2
    assert "--output is not set" in capsys.readouterr().err
    (tmp_path / "run.toml").write_text("[data]\npth = 1\n")
    assert main(words) == 2
    assert "There is no setting data.pth" in capsys.readouterr().err
    turbo = ["train", str(pictures), "--model", str(nano.TRANSFORMERS["turbo"]), "--output",
             str(tmp_path / "t.safetensors"), "--steps", "1"]  # fmt: skip
    assert main(turbo) == 2, "a single file has no text encoder"
    assert "Train on Raw" in caplog.text


def test_what_is_shipped_is_the_average(tmp_path):
    """After steps of 1 down from 0: the averages of -1 and -2, with the short memory of a start."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    run = Run(tmp_path, {"weight": weight}, [optimiser], Rates(2, decay=0.0), average=0.9, clip=0)
    run.train(lambda number: weight.sum())
    first = -1 * (1 - 1 / 11)
    second = first + (-2 - first) * (1 - 2 / 12)
    assert weight.tolist() == [-2, -2]
    assert run.values()["weight"].tolist() == pytest.approx([second] * 2)


@pytest.mark.parametrize("command", ["train", "pretrain", "prefer", "slider"])
def test_a_text_that_is_too_long_is_named_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, command
):
    from PIL import Image

    def load(*_, **__):
        raise AssertionError("loaded")

    for module in (session_module, encoders_module, pretrain_module):
        for name in ("load_part", "load_text_encoder", "load_vae", "new_transformer"):
            monkeypatch.setattr(module, name, load, raising=False)
    stems = ("one.better", "one.worse") if command == "prefer" else ("one", "two")
    for stem in stems:
        Image.new("RGB", (64, 64)).save(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}.txt").write_text(stem)
    (tmp_path / "one.txt").write_text("a red star " * 4000)
    more = {"pretrain": ["--stage-steps", "1"],
            "slider": ["--positive", "big", "--negative", "small"]}  # fmt: skip
    words = [command, str(tmp_path), "--model", "nano", "--device", "cpu",
             "--output", str(tmp_path / "x.safetensors"), *more.get(command, ())]  # fmt: skip
    if command != "slider":
        words += ["--resolution", "64"]
    assert main(words) == 2
    where = (
        f"prompt 1 of {tmp_path.name}" if command == "slider" else f"the caption of {stems[0]}.png"
    )
    assert f"1 text of more than 10,000 tokens: {where} (12,00" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "turbo, message",
    [("nope.safetensors", "samples.turbo is 'nope.safetensors'. There is no file"),
     ("tiny", "tiny.safetensors, which has other sizes"), (nano.VAE, "expected .*transformer")],
)  # fmt: skip
def test_a_turbo_of_samples_is_read_before_the_run(pictures, cache, tmp_path, turbo, message):
    if turbo == "tiny":
        turbo = tmp_path / "tiny.safetensors"
        save_transformer(Krea2Transformer(TINY), turbo)
    settings = {"samples__turbo": str(turbo), "samples__prompts": ["a star"], "samples__every": 9}
    config = config_of(pictures, cache, tmp_path / "x.safetensors", **settings)
    for call in (train, forecast):
        with pytest.raises(ValueError, match=message):
            call(config)


def test_files_are_refused_before_anything_is_loaded(pictures, tmp_path, monkeypatch, capsys):
    """By the options that name them, or would."""

    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(session_module, "load_part", load)
    (tmp_path / "folder.safetensors").mkdir()
    raw, vae = nano.TRANSFORMERS["raw"], nano.VAE
    words = ["train", str(pictures), "--model", "nano", "--device", "cpu", "--resolution", "64",
             "--output", str(tmp_path / "x.safetensors")]  # fmt: skip
    for more, expected in (
        (["--model", "nope"], "--model is 'nope'. There is no file"),
        (["--model", str(raw)], "--text-encoder is not set, and --model does not hold it"),
        (["--text-encoder", str(vae)], f"--text-encoder is {vae}. "),
        (["--vae", "nope.safetensors"], "--vae is nope.safetensors. There is no file"),
        (["--tokenizer", "nope"], "--tokenizer is nope. nope is no tokenizer folder"),
        (["--prior", "nope"], "--prior is nope, which is no folder"),
        (["--validation", "nope"], "--validation is nope, which is no folder"),
        (["--output", str(tmp_path / "folder.safetensors")], "expected a file, and this is a f"),
    ):
        assert main([*words, *more]) == 2
        assert expected in capsys.readouterr().err
    words[1] = str(tmp_path / "nowhere")
    assert main(words) == 2
    assert f"SOURCE is {words[1]}, which is no folder" in capsys.readouterr().err
    for name, value in (("steps", 0), ("guidance", -1)):
        with pytest.raises(ValueError, match=f"samples.{name} is {value}"):
            config_of(pictures, None, tmp_path / "x.safetensors", **{f"samples__{name}": value})


def test_a_quiet_command_says_nothing(pictures, tmp_path, capsys):
    words = ["train", str(pictures), "--model", "nano", "--device", "cpu", "--resolution", "64",
             "--steps", "1", "--output", str(tmp_path / "x.safetensors"), "--quiet"]  # fmt: skip
    assert main(words) == 0
    assert capsys.readouterr().err == ""


def test_half_a_character_is_named(tmp_path, pictures, cache):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": str(pictures / "0.png"), "caption": "a \ud83d cat"})
    )
    with pytest.raises(ValueError, match=r"The caption of .*0.png has half a character .*ud83d"):
        train(config_of(tmp_path / "rows.jsonl", cache, tmp_path / "x.safetensors"))
