"""Preference: pairs of pictures, the loss against its formula, `krea2 prefer`."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_reference import TINY, random_transformer
from krea2_model import Krea2Pipeline
from krea2_model.cli.main import main
from krea2_model.cli.settings import as_json
from krea2_training.config import PreferConfig, read_config
from krea2_training.data.cache import Texts
from krea2_training.data.pairs import Pairs, read_pairs
from krea2_training.flow import generator_of, noised
from krea2_training.prefer import prefer, preference_loss
from krea2_training.settings.methods import Prefer
from krea2_training.settings.sections import Adapter
from krea2_training.weights.adapters import adapters_of, add_adapters, set_strength


def picture(file, colour, size=(64, 64), texts=None):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    Image.new("RGB", size, colour).save(file, pnginfo=info)


def settings_of(prompt):
    return {"krea2": as_json({"prompt": prompt, "seed": 1})}


@pytest.fixture
def pairs(tmp_path):
    """A folder of two pairs: one with its prompt beside it, one with its prompt inside."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    settings = settings_of("a blue square")
    for name, texts in (("fox", {}), ("square", settings)):
        picture(folder / f"{name}.better.png", "white", texts=texts)
        picture(folder / f"{name}.worse.png", "black", texts=texts)
    (folder / "fox.txt").write_text("a fox\n")
    return folder


def test_pairs_of_a_folder_and_of_tables(pairs, tmp_path):
    found = read_pairs(Pairs(pairs, 64))
    assert [one.prompt for one in found] == ["a fox", "a blue square"]
    assert found[0].chosen.example.image == pairs / "fox.better.png"
    assert found[0].rejected.example.image == pairs / "fox.worse.png"
    rows = [{"prompt": "a fox", "chosen": "fox.better.png", "rejected": "fox.worse.png"}]
    (pairs / "picks.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (pairs / "picks.csv").write_text("prompt,chosen,rejected\na fox,fox.better.png,fox.worse.png\n")
    assert read_pairs(Pairs(pairs / "picks.jsonl", 64)) != []
    jsonl, csv = (read_pairs(Pairs(pairs / f"picks.{kind}", 64))[0] for kind in ("jsonl", "csv"))
    assert jsonl.prompt == csv.prompt == "a fox"
    assert jsonl.chosen.example.image == csv.chosen.example.image == pairs / "fox.better.png"


def test_pairs_that_are_refused(pairs, tmp_path):
    def fails(path, expected):
        with pytest.raises(ValueError, match=expected):
            read_pairs(Pairs(path, 64))

    picture(pairs / "owl.better.png", "white")
    fails(pairs, r"1 picture in .* without the other: owl\. Each needs NAME.better.png and")
    picture(pairs / "owl.worse.png", "white", size=(128, 64))
    fails(pairs, r"1 pair in .* without a prompt: owl\. Write it into owl.txt")
    (pairs / "owl.txt").write_text("an owl")
    fails(pairs, r"owl.better.png are 64 x 64 and 128 x 64 px; expected one shape")
    (pairs / "owl.worse.png").write_bytes(b"no picture")
    fails(pairs, r"owl.worse.png cannot be read as a picture")
    fails(tmp_path / "nothing", "which is no folder and no table")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no pairs; expected NAME.better.png")
    (pairs / "rows.jsonl").write_text('{"prompt": "a fox", "chosen": "fox.better.png"}\n')
    fails(pairs / "rows.jsonl", r"rows.jsonl, row 1 has no rejected; expected columns")
    row = {"prompt": ["owl"], "chosen": "owl.better.png", "rejected": "owl.worse.png"}
    (pairs / "rows.jsonl").write_text(json.dumps(row))
    fails(pairs / "rows.jsonl", r"row 1: prompt is \['owl'\]; expected a text")


@pytest.fixture
def model():
    return random_transformer(TINY)


def draws():
    generator = torch.Generator().manual_seed(7)
    winner, loser = torch.randn(2, 2, 16, 8, 8, generator=generator)
    return winner, loser, Texts(torch.randn(2, 5, 12, TINY.text_hidden_dim, generator=generator))


def test_a_model_that_has_learned_nothing_is_its_reference(model):
    add_adapters(model, Adapter(rank=2))
    measured = preference_loss(model, *draws(), generator_of(0, 0), Prefer())
    # Attention rounds otherwise with gradients, and beta is 1000.
    assert measured.loss.item() == pytest.approx(math.log(2), abs=2e-3)
    assert measured.numbers["drift"] < 1e-9 and abs(measured.numbers["winner's error"]) < 1e-6


@pytest.mark.parametrize("hold", [0.0, 2.0])
def test_the_loss_is_its_formula(model, hold):
    """With errors by separate passes of plain models, one picture at a time."""
    add_adapters(model, Adapter(rank=2))
    torch.manual_seed(3)
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.up, std=0.05)
    winner, loser, texts = draws()
    settings = Prefer(beta=3.0, hold=hold)
    measured = preference_loss(model, winner, loser, texts, generator_of(0, 0), settings)
    noise = noised(winner, generator_of(0, 0), None, 1.0)
    pure = noise.velocity + winner

    @torch.no_grad()
    def error(image, index, strength):
        set_strength(model, strength)
        time = noise.times[index]
        noisy = (1 - time) * image[index] + time * pure[index]
        text = model.fuse_text(texts.taps[index : index + 1])
        velocity = model(noisy[None], time[None], text)[0]
        set_strength(model, 1.0)
        return (velocity - (pure[index] - image[index])).square().mean()

    expected = 0.0
    for index in range(2):
        won = error(winner, index, 1.0) - error(winner, index, 0.0)
        lost = error(loser, index, 1.0) - error(loser, index, 0.0)
        expected -= torch.nn.functional.logsigmoid(-3.0 * (won - lost)).item() / 2
        expected += hold * 3.0 * max(0.0, won.item()) / 2
    assert measured.loss.item() == pytest.approx(expected, abs=1e-4)
    assert measured.numbers["drift"] > 0


def config_of(pairs, output, **settings):
    defaults = {
        "pairs.path": pairs, "pairs.resolution": 64, "model.transformer": "nano",
        "output.path": output, "adapter.rank": 4, "training.steps": 4, "training.batch": 2,
        "training.warmup": 0, "training.decay": 0.0, "training.learning_rate": 2e-3,
        "samples.every": 0, "memory.device": "cpu",
    }  # fmt: skip
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    return read_config(None, defaults | settings, PreferConfig)


def test_the_preferred_pictures_become_likelier(pairs, tmp_path):
    records = []
    config = config_of(pairs, tmp_path / "whole.safetensors")
    whole = prefer(config, lambda step, record: records.append(record))
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert records[-1]["pairs right"] == 1 and records[-1]["drift"] > 0

    def stop(step, record):
        if step == 2:
            raise KeyboardInterrupt

    config = config_of(pairs, tmp_path / "parts.safetensors")
    with pytest.raises(KeyboardInterrupt):
        prefer(config, stop)
    parts, expected = load_file(prefer(config)), load_file(whole)
    assert all(torch.equal(parts[name], expected[name]) for name in expected)
    assert Krea2Pipeline.nano().load_lora(whole).is_complete
    other = config_of(pairs, tmp_path / "parts.safetensors", prefer__hold=0.0)
    with pytest.raises(ValueError, match="has a run with other settings: prefer"):
        prefer(other)


def test_the_command_refuses_and_forecasts(pairs, tmp_path, capsys):
    words = ["prefer", str(pairs), "--model", "nano", "--output", str(tmp_path / "x.safetensors")]
    assert main([*words, "--resolution", "64", "--dry-run", "--device", "cpu"]) == 0
    assert "at 64 px" in capsys.readouterr().out
    for extra, expected in (
        (["--method", "full"], "--method is full; expected lora, dora or lokr"),
        (["--resolution", "100"], "--resolution is 100; expected a multiple of 16"),
        (["--beta", "0"], "--beta is 0; expected"),
    ):
        assert main([*words, *extra]) == 2
        assert expected in capsys.readouterr().err


def test_a_page_to_pick_on(tmp_path, capsys):
    """Grouped by the prompts inside, with text that would end its script made harmless."""
    prompts = ["a fox </script>", "a fox </script>", "an owl", "alone"]
    for index, prompt in enumerate(prompts):
        picture(tmp_path / f"{index}.png", "white", texts=settings_of(prompt))
    picture(tmp_path / "3 b.png", "white", texts=settings_of("an owl"))
    assert main(["pick", str(tmp_path)]) == 0
    page = tmp_path / "pick.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    data = text.partition('id="groups">')[2].partition("</script>")[0]
    assert json.loads(data) == [
        {"prompt": "a fox </script>", "files": ["0.png", "1.png"]},
        {"prompt": "an owl", "files": ["2.png", "3 b.png"]},
    ]
    for index in (1, 2):
        (tmp_path / f"{index}.png").unlink()
    assert main(["pick", str(tmp_path)]) == 2
    assert "has no two pictures of one prompt" in capsys.readouterr().err
