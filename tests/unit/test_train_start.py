"""`adapter.start`: training goes on from a LoRA's file, which is refused where it does not fit."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_reference import TINY, random_transformer
from krea2_model import Krea2Pipeline, Krea2Transformer, extract_lora, load_transformer, nano
from krea2_model.cli.main import main
from krea2_model.lora.edit_family import (
    AI_TOOLKIT,
    IDENTITY,
    REFERENCES_ONLY,
    family_header,
    read_family,
)
from krea2_model.lora.files import read_lora, read_lora_file
from krea2_model.lora.updates import LoraStack
from krea2_training.commands import run_command
from krea2_training.config import KINDS, read_config
from krea2_training.distil import FAKE, STUDENT
from krea2_training.session import Session
from krea2_training.settings.sections import KEY_STYLES, Adapter, Memory
from krea2_training.weights import start as start_module
from krea2_training.weights.adapters import adapters_of, add_adapters, file_tensors
from krea2_training.weights.base import freeze_base
from krea2_training.weights.start import fill, read_start
from trained_adapters import trained

CPU = torch.device("cpu")


def inputs():
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 6, 8, generator=generator)
    text = torch.randn(2, 5, TINY.hidden_size, generator=generator)
    return latents, torch.tensor([0.3, 0.8]), text


def started(path, settings, base="as-is"):
    """A model that begins as a file."""
    model = random_transformer(TINY)
    freeze_base(model, Memory(base=base), CPU)
    updates = read_start(path, TINY, settings)
    add_adapters(model, settings)
    fill(adapters_of(model), updates)
    return model


def change_of(file, model):
    """A model with a LoRA's file merged in."""
    stack = LoraStack(model)
    stack.add((read_lora(load_file(file), stack.shapes, "lora.safetensors")[0], 1.0))
    return model


def written(path, settings, style="ai-toolkit"):
    save_file(file_tensors(adapters_of(trained(random_transformer(TINY), settings)), style), path)
    return path


@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("style", KEY_STYLES)
def test_the_start_is_the_file(tmp_path, method, style):
    magnitude = "rows" if style == "diffusers" else "columns"
    small = Adapter(method, rank=3, alpha=6.0, targets="blocks+text", magnitude=magnitude)
    file = written(tmp_path / "lora.safetensors", small, style)
    expected = change_of(file, random_transformer(TINY))(*inputs())
    for rank, alpha in ((3, None), (5, 2.0)):
        own = Adapter(method, rank=rank, alpha=alpha, targets="blocks+text", magnitude=magnitude)
        model = started(file, own)
        torch.testing.assert_close(model(*inputs()), expected, atol=2e-5, rtol=1e-4)
        # All of it can learn: the part of the rank that the file does not fill too.
        model(*inputs()).square().mean().backward()
        adapter = model.get_submodule("blocks.0.attn.wq")
        assert adapter.up.grad.abs().amin(dim=0).shape == (rank,)
        assert (adapter.up.grad.abs().sum(dim=0) > 0).all()
    # What was trained on is written as it was.
    again = file_tensors(adapters_of(model), style)
    save_file(again, tmp_path / "again.safetensors")
    same = change_of(tmp_path / "again.safetensors", random_transformer(TINY))(*inputs())
    torch.testing.assert_close(same, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("magnitude", ["columns", "rows"])
@pytest.mark.parametrize("base", ["as-is", "fp8"])
def test_a_dora_begins_as_a_lora(tmp_path, magnitude, base):
    file = written(tmp_path / "lora.safetensors", Adapter(rank=3))
    plain = started(file, Adapter(rank=4), base)(*inputs())
    dora = started(file, Adapter("dora", rank=4, magnitude=magnitude), base)(*inputs())
    torch.testing.assert_close(dora, plain, atol=2e-5, rtol=1e-4)


def test_fused_layers_and_layers_that_the_file_leaves_alone(tmp_path):
    generator = torch.Generator().manual_seed(7)
    attention = random_transformer(TINY).blocks[1].attn
    rows = sum(getattr(attention, name).weight.shape[0] for name in ("wq", "wk", "wv"))
    down = torch.randn(2, TINY.hidden_size, generator=generator) * 0.2
    tensors = {
        "lora_unet_blocks_1_attn_qkv.lora_down.weight": down,
        "lora_unet_blocks_1_attn_qkv.lora_up.weight": torch.randn(rows, 2, generator=generator),
        "lora_unet_blocks_1_attn_qkv.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "fused.safetensors")
    expected = change_of(tmp_path / "fused.safetensors", random_transformer(TINY))(*inputs())
    model = started(tmp_path / "fused.safetensors", Adapter(rank=4))
    torch.testing.assert_close(model(*inputs()), expected, atol=2e-5, rtol=1e-4)
    assert not model.blocks[0].attn.wq.up.any() and model.blocks[1].attn.wk.up.any()


def test_a_whole_factor_begins_an_adapter_of_its_rank(tmp_path):
    """LyCORIS writes the large factor of LoKr so where its rank is high."""
    own = Adapter("lokr", rank=64, factor=4)
    tensors = {}
    parts = file_tensors(adapters_of(trained(random_transformer(TINY), own)), "kohya")
    for name, tensor in parts.items():
        layer, _, part = name.rpartition(".")
        if part == "lokr_w1":
            product = parts[f"{layer}.lokr_w2_a"] @ parts[f"{layer}.lokr_w2_b"]
            tensors |= {name: tensor, f"{layer}.lokr_w2": product}
    save_file(tensors, tmp_path / "whole.safetensors")
    expected = change_of(tmp_path / "whole.safetensors", random_transformer(TINY))(*inputs())
    model = started(tmp_path / "whole.safetensors", own)
    torch.testing.assert_close(model(*inputs()), expected, atol=2e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    def file(name, settings=None, style="ai-toolkit", more=None, rename=("", "")):
        tensors = dict(more or {})
        if settings is not None:
            model = trained(random_transformer(TINY), settings)
            tensors |= file_tensors(adapters_of(model), style)
        tensors = {key.replace(*rename): tensor for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    lora = file("lora", Adapter(rank=4))
    text = file("text", Adapter(rank=4, targets="blocks+text"))
    lokr = file("lokr", Adapter("lokr", rank=2, factor=4))
    dora = file("dora", Adapter("dora", rank=2))
    query = "diffusion_model.blocks.0.attn.wq"
    side = TINY.hidden_size
    encoder = {f"text_encoders.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(2, 2)
               for part in "AB"}  # fmt: skip
    norm = {"diffusion_model.blocks.0.prenorm.scale.diff": torch.ones(side)}
    zeros = {f"{query}.lora_A.weight": torch.ones(2, side),
             f"{query}.lora_B.weight": torch.zeros(side, 2)}  # fmt: skip
    for path, settings, expected in (
        (lora, Adapter(rank=2), "has rank 4 .*at most adapter.rank, 2. Set adapter.rank to 4"),
        (lora, Adapter(rank=4, targets="mlp"), "blocks.0.attn.*Set adapter.targets to blocks"),
        (text, Adapter(rank=4), "txtfusion.*Set adapter.targets to blocks.text"),
        (lora, Adapter("lokr", rank=4), "holds a LoRA.*Set adapter.method to lora"),
        (lokr, Adapter(rank=4), "holds a LoKr.*Set adapter.method to lokr"),
        (lokr, Adapter("lokr", rank=4, factor=8), "is 4 x 4.*8 x 8.*adapter.factor to 4"),
        (dora, Adapter(rank=4), "holds a DoRA.*Set adapter.method to dora"),
        (dora, Adapter("dora", rank=4, magnitude="rows"), "key_style to ai-toolkit"),
        (file("more", Adapter(rank=2), more=encoder), Adapter(rank=4), "q_proj.*text encoder"),
        (file("norm", Adapter(rank=2), more=norm), Adapter(rank=4), "prenorm.scale.*--targets"),
        (file("blocks", Adapter(rank=2), rename=("blocks.1.", "blocks.77.")), Adapter(rank=4),
         "this model has 3 blocks"),
        (file("zeros", more=zeros), Adapter(rank=4), "changes nothing"),
        (nano.LORA, Adapter(rank=8), "made for"),
        (nano.CONTROL_LORA, Adapter(rank=8), "control LoRA"),
        (nano.TRANSFORMERS["raw"], Adapter(rank=8), "expected a LoRA"),
        (tmp_path / "none.safetensors", Adapter(), "is not there; expected the"),
        (tmp_path, Adapter(), "is a folder; expected the"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"adapter.start is .*{path.name}.*{expected}"):
            read_start(path, TINY, settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures, pairs, prompts and a reward, and an extracted LoRA of nano's Turbo."""
    folder = tmp_path_factory.mktemp("start")
    for part in ("pictures", "pairs"):
        (folder / part).mkdir()
    for name, colour in (("red", "#d72828"), ("blue", "#284bcd")):
        Image.new("RGB", (64, 64), colour).save(folder / "pictures" / f"{name}.png")
        (folder / "pictures" / f"{name}.txt").write_text(f"{name} background")
    for kind, colour in (("better", "#d72828"), ("worse", "#284bcd")):
        Image.new("RGB", (64, 64), colour).save(folder / "pairs" / f"one.{kind}.png")
    (folder / "pairs" / "one.txt").write_text("a background")
    (folder / "prompts.txt").write_text("a red circle\na blue star\n")
    (folder / "score.py").write_text(
        "def bright(pictures, rows):\n    return pictures.mean(axis=(1, 2, 3))\n"
    )
    extract_lora(nano.TRANSFORMERS["turbo"], nano.TRANSFORMERS["raw"],
                 folder / "turbo.safetensors", rank=16, targets="blocks")  # fmt: skip
    return folder


def config_of(data, command, output, **more):
    prompts = {"prompts.path": data / "prompts.txt", "prompts.size": 64}
    own = {
        "train": {"data.path": data / "pictures", "data.resolution": [64]},
        "prefer": {"pairs.path": data / "pairs", "pairs.resolution": 64},
        "distil": {**prompts, "distil.steps": [2], "distil.fake_updates": 1},
        "slider": {**prompts, "slider.positive": "red", "slider.negative": "blue"},
        "reward": {**prompts, "reward.rewards": [f"{data / 'score.py'}:bright"],
                   "reward.groups": 1, "reward.group_size": 2, "reward.rollout_steps": 2,
                   "reward.random_steps": 1},
    }[command]  # fmt: skip
    settings = {
        "model.transformer": "nano", "output.path": output, "adapter.rank": 20,
        "adapter.alpha": 10.0, "adapter.start": data / "turbo.safetensors", "training.steps": 1,
        "training.learning_rate": 1e-9, "training.weight_decay": 0, "samples.every": 0,
        "memory.device": "cpu",
    }  # fmt: skip
    more = {name.replace("__", "."): value for name, value in more.items()}
    return read_config(None, {**settings, **own, **more}, KINDS[command])


def changes(file):
    """The change of each of nano's weights by a LoRA's file."""
    model = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
    updates, _, report = read_lora(load_file(file), LoraStack(model).shapes)
    assert report.is_complete
    return {name: own[0].difference() for name, own in updates.items()}


@pytest.mark.parametrize("command", ["train", "prefer", "distil", "slider", "reward"])
def test_a_run_that_learns_nothing_gives_its_start(data, tmp_path, command):
    result = run_command(config_of(data, command, tmp_path / "x.safetensors"), lambda *_: None)
    found, expected = changes(result), changes(data / "turbo.safetensors")
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert (found[name] - change).norm() < 5e-3 * change.norm(), name  # 16 bits in the files


def test_the_student_alone_begins_as_a_turbo(data, tmp_path, tokenizer_folder):
    """And paints its picture, quantised base and all."""
    config = config_of(data, "distil", tmp_path / "x.safetensors", memory__base="fp8")
    session = Session(config)
    roles = session.make_roles((STUDENT, FAKE))
    assert all(part.up.any() for part in roles.adapters[STUDENT].values())
    assert not any(part.up.any() for part in roles.adapters[FAKE].values())
    result = run_command(config, lambda *_: None)
    pictures = []
    for file in (result, data / "turbo.safetensors"):
        raw = Krea2Pipeline.nano("raw")
        raw.load_lora(file)
        pictures.append(raw("a blue star", output_type="np", seed=3, steps=8, guidance=0))
    plain = Krea2Pipeline.nano("raw")("a blue star", output_type="np", seed=3, steps=8, guidance=0)
    error, change = abs(pictures[0] - pictures[1]).mean(), abs(pictures[1] - plain).mean()
    assert error < 0.1 * change


def test_a_run_that_goes_on_reads_no_start(data, tmp_path, monkeypatch):
    def config(steps, name="a.safetensors", start="start.safetensors"):
        return config_of(
            data, "train", tmp_path / name, training__steps=steps, training__learning_rate=1e-3,
            adapter__start=tmp_path / start, training__warmup=0, training__decay=0,
        )  # fmt: skip

    content = (data / "turbo.safetensors").read_bytes()
    for name in ("start", "copy"):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    other = load_file(data / "turbo.safetensors")
    save_file({name: 0.5 * t for name, t in other.items()}, tmp_path / "other.safetensors")
    whole = load_file(run_command(config(3, "whole.safetensors"), lambda *_: None))
    run_command(config(2), lambda *_: None)
    with pytest.raises(ValueError, match="other settings: start"):
        run_command(config(3, start="other.safetensors"), lambda *_: None)
    none = config_of(data, "train", tmp_path / "a.safetensors", training__steps=3,
                     training__learning_rate=1e-3, training__warmup=0, training__decay=0,
                     adapter__start=None)  # fmt: skip
    with pytest.raises(ValueError, match="other settings: start"):
        run_command(none, lambda *_: None)
    # The same content by another name, and then by none: the state has it.
    with monkeypatch.context() as patch:
        patch.delattr(start_module, "read_start")
        parts = load_file(run_command(config(3, start="copy.safetensors"), lambda *_: None))
        assert all(torch.equal(parts[name], whole[name]) for name in whole)
        (tmp_path / "start.safetensors").unlink()
        run_command(config(3), lambda *_: None)
    with pytest.raises(ValueError, match="is not there"):
        run_command(config(3, "b.safetensors"), lambda *_: None)
    # Nor does a state of a run without a start stand for one.
    zero = config_of(data, "train", tmp_path / "b.safetensors", adapter__start=None)
    run_command(zero, lambda *_: None)
    with pytest.raises(ValueError, match="is not there"):
        run_command(config(3, "b.safetensors"), lambda *_: None)


def test_a_file_of_another_model_is_refused_before_anything_is_loaded(
    data, tmp_path, monkeypatch, capsys
):
    from krea2_training import session

    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(session, "load_part", load)
    save_file(file_tensors(adapters_of(trained(random_transformer(TINY), Adapter(rank=2))),
                           "kohya"), tmp_path / "tiny.safetensors")  # fmt: skip
    words = ["train", str(data / "pictures"), "--model", "nano", "--resolution", "64",
             "--device", "cpu", "--output", str(tmp_path / "x.safetensors"), "--start"]  # fmt: skip
    for more in ([], ["--dry-run"]):
        assert main([*words, str(tmp_path / "tiny.safetensors"), *more]) == 2
        assert "tiny.safetensors" in capsys.readouterr().err
    assert main([*words, str(nano.LORA), "--method", "full"]) == 2
    assert "--start is" in capsys.readouterr().err
    turbo = str(data / "turbo.safetensors")
    for more, expected in (
        (["nope.safetensors"], "--start is nope.safetensors, which is not there; expected"),
        ([turbo, "--rank", "4"], "expected at most --rank, 4. Set --rank to 16"),
        ([turbo, "--method", "lokr"], "--method is lokr, which begins as a LoKr. Set --method to"),
    ):
        assert main([*words, *more]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    (tmp_path / "run.toml").write_text(
        f'[data]\npath = "{(data / "pictures").as_posix()}"\n[model]\ntransformer = "nano"\n'
        '[adapter]\nstart = "nope.safetensors"\n[output]\npath = "x.safetensors"\n'
    )
    for more, expected in ([], "adapter.start is "), (["--start", "no"], "--start is no, which"):
        assert main(["train", str(tmp_path / "run.toml"), *more]) == 2
        assert expected in capsys.readouterr().err, "the name of what the user wrote"


def test_what_a_start_says_of_its_use_is_in_the_result(data, tmp_path, caplog):
    """Unless the run says otherwise; also where the file is gone when the run goes on."""
    words = {"krea2.steps": "4", "modelspec.trigger_phrase": "sks"}
    words |= family_header(AI_TOOLKIT, cache=True)
    start = tmp_path / "start.safetensors"
    save_file(load_file(data / "turbo.safetensors"), start, words)

    def run(name, command="train", **more):
        config = config_of(data, command, tmp_path / name, adapter__start=start, **more)
        return read_lora_file(run_command(config, lambda *_: None))[1]

    first = run("a.safetensors")
    assert words.items() <= first.items() and first["ss_steps"] == "1"
    assert "start.safetensors is a LoRA for 4 steps" in caplog.text and "family" not in caplog.text
    other = run("b.safetensors", data__trigger="dog", data__references="identity")
    assert other["modelspec.trigger_phrase"] == "dog" and other["krea2.steps"] == "4"
    assert read_family("b", other).name == IDENTITY, "the run's own"
    few = run("c.safetensors", "distil")
    assert few["krea2.steps"] == "2" and few["training_info"] == words["training_info"]
    start.unlink()
    assert words.items() <= run("a.safetensors", training__steps=2).items()


def test_pictures_with_references_make_an_edit_lora(data, tmp_path, caplog):
    """And a style that goes on from one stays one, by the file's name too."""
    folder = tmp_path / "edits"
    folder.mkdir()
    for name in ("one", "one.ref1"):
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
    (folder / "one.txt").write_text("a wall")
    for name, more, start in (
        ("edit", {"data__path": folder}, None),
        ("style", {}, nano.REFERENCE_LORA),
        ("both", {"data__path": folder}, nano.REFERENCE_LORA),
        ("plain", {}, None),
    ):
        own = {**more, "adapter__start": start, "adapter__targets": "blocks+text"}
        file = run_command(config_of(data, "train", tmp_path / f"{name}.safetensors", **own),
                           lambda *_: None)  # fmt: skip
        family = read_family(file.name, read_lora_file(file)[1])
        assert (family is None) == (name == "plain")
        assert family is None or family.name == REFERENCES_ONLY
    assert "family" not in caplog.text
    Image.new("RGB", (64, 64)).save(data / "pictures" / "red.ref1.png")
    start = tmp_path / "edit.safetensors"
    config = config_of(data, "train", tmp_path / "other.safetensors", adapter__start=start,
                       adapter__targets="blocks+text", data__references="identity")  # fmt: skip
    run_command(config, lambda *_: None)
    (data / "pictures" / "red.ref1.png").unlink()
    assert "an edit LoRA of family references-only, and this run shows references as identity" in (
        caplog.text
    )


def test_a_run_does_not_write_over_what_it_begins_with(data, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content := (data / "turbo.safetensors").read_bytes())
    with pytest.raises(ValueError, match="are both .*a.safetensors.*Name another output"):
        run_command(config_of(data, "train", file, adapter__start=file), lambda *_: None)
    assert file.read_bytes() == content and not (tmp_path / "a").exists()


def test_settings_in_a_file_and_in_the_result(data, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'[data]\npath = "{(data / "pictures").as_posix()}"\n[model]\ntransformer = "nano"\n'
        '[adapter]\nstart = "loras/a.safetensors"\n[output]\npath = "x.safetensors"\n'
    )
    config = read_config(tmp_path / "run.toml")
    assert config.adapter.start == tmp_path / "loras" / "a.safetensors"
    from krea2_training.weights.results import Result

    metadata = Result(Krea2Transformer(TINY), config, "").metadata(1)
    assert json.loads(metadata["krea2.training"])["adapter"]["start"] == "a.safetensors"
