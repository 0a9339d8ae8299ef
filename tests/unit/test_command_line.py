"""The command line, as a user types it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from krea2_model import Krea2Pipeline
from krea2_model.cli.main import main
from krea2_model.text import expander
from nano_training.judge import read_thing


@pytest.fixture(scope="module")
def weights(models):
    return [
        *("--transformer", str(models / "diffusion_models/krea2_tiny_turbo.safetensors")),
        *("--text-encoder", str(models / "text_encoders/qwen3vl_tiny.safetensors")),
        *("--vae", str(models / "vae/qwen_image_vae_tiny.safetensors")),
        *("--dtype", "fp32", "--width", "64", "--height", "48"),
    ]


def test_a_prompt_gives_a_picture_with_a_progress_bar(weights, tmp_path):
    output = tmp_path / "new folder" / "fox.png"
    command = [
        *("-X", "importtime", "-m", "krea2_model", "a fox", "--output", str(output)),
        *weights,
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(output)
    assert "8/8" in done.stderr
    assert Image.open(output).size == (64, 48)
    # torch's compiler takes as long to import as torch itself.
    assert "torch.nn" in done.stderr and "torch._dynamo" not in done.stderr


def test_generate_is_the_default_and_several_images_are_numbered(weights, tmp_path, capsys):
    options = ["--images", "2", "--steps", "1", "--output", str(tmp_path / "fox.png")]
    assert main(["generate", "a fox", *options, *weights]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "fox.png"),
        str(tmp_path / "fox-2.png"),
    ]
    assert Image.open(tmp_path / "fox-2.png").size == (64, 48)


def test_a_diffusers_folder(diffusers_folder, tmp_path):
    options = ["--width", "32", "--height", "32", "--steps", "1"]
    output = str(tmp_path / "fox.png")
    assert main(["a fox", "--model", str(diffusers_folder), "--output", output, *options]) == 0
    assert Image.open(output).size == (32, 32)


@pytest.mark.parametrize("model, steps", [("nano", 8), ("nano-raw", 28)])
def test_the_built_in_models(tokenizer_folder, tmp_path, capfd, model, steps):
    output = tmp_path / "star.png"
    assert main(["a green star", "--model", model, "--output", str(output)]) == 0
    assert f"{steps}/{steps}" in capfd.readouterr().err
    found = read_thing(np.asarray(Image.open(output), dtype=np.float32) / 255)
    assert (found.shape, found.colour, found.place) == ("star", "green", "centre")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Name the weights"),
        (["--model", "nowhere"], "There is no file or folder nowhere"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert main(["a fox", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("krea2: error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("option", ["--start-image", "--reference", "--image", "--edit"])
@pytest.mark.parametrize("content", [None, b"no picture", "cut"])
def test_no_picture_is_said_before_weights_are_read(tmp_path, capsys, monkeypatch, option, content):
    path = tmp_path / "photo.png"
    if content is not None:
        Image.effect_noise((64, 64), 90).save(path)
        path.write_bytes(path.read_bytes()[:300] if content == "cut" else content)
    monkeypatch.setattr("krea2_model.pipeline.pipeline.Krea2Pipeline.from_files", None)
    assert main(["a fox", "--model", "nano", option, str(path)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"krea2: error: {option}")
        and "photo.png" in error
        and error.count("\n") == 1
    )


@pytest.mark.parametrize("option, value", [("--seed", str(2**64)), ("--guidance", "1e30")])
def test_bad_numbers_are_said_before_weights_are_read(capsys, monkeypatch, option, value):
    monkeypatch.setattr("krea2_model.pipeline.pipeline.Krea2Pipeline.from_files", None)
    assert main(["a fox", "--model", "nano", option, value]) == 2
    assert f"error: {option} is " in capsys.readouterr().err


def test_bad_values_are_one_line(weights, tmp_path, capsys):
    output = tmp_path / "fox.png"
    assert main(["a fox", *weights, "--steps", "0", "--output", str(output)]) == 2
    assert "--steps is 0; expected" in capsys.readouterr().err
    assert not output.exists()


def test_where_weights_are_can_be_chosen(monkeypatch):
    found = {}

    def load(*files, **options):
        found.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(Krea2Pipeline, "from_files", load)
    assert main(["a fox", "--model", "nano", "--device", "auto", "--max-memory", "12"]) == 2
    assert [found[name] for name in ("device", "offload", "max_memory")] == ["auto", "auto", 12.0]
    assert main(["a fox", "--model", "nano", "--device", "cpu", "--offload", "parts"]) == 2
    assert [found[name] for name in ("device", "offload", "max_memory")] == ["cpu", "parts", None]
    assert main(["a fox", "--model", "nano"]) == 2
    assert [found[name] for name in ("device", "offload", "max_memory")] == ["auto", "auto", None]


def test_expand_is_a_command(weights, capsys, monkeypatch):
    """Random weights write nonsense; what is said of it is that it lacks the lettering."""
    monkeypatch.setitem(expander.LENGTHS, "short", expander.Length(words=5, tokens=15))
    encoder = weights[weights.index("--text-encoder") + 1]
    options = ["--text-encoder", encoder, "--dtype", "fp32", "--length", "short", "--seed", "3"]
    texts = []
    for offload in ("auto", "blocks"):
        assert main(["expand", 'a sign "OPEN"', *options, "--offload", offload]) == 0
        out, error = capsys.readouterr()
        assert 'The expansion lacks "OPEN" of the prompt' in error and "token" in error
        texts.append(out)
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 1 and len(texts[0]) > 20


def test_expand_refuses_nano(tokenizer_folder, capsys):
    assert main(["expand", "a fox", "--model", "nano"]) == 2
    assert "krea2-nano's text encoder is random and cannot write" in capsys.readouterr().err
    assert main(["expand", "a fox"]) == 2
    assert "Name the weights: --model or --text-encoder." in capsys.readouterr().err


def test_edits_are_made_again(tokenizer_folder, tmp_path, capsys):
    """By krea2-nano's reference LoRA, whose name tells its family; and what does not go along."""
    photo, output, again = (tmp_path / name for name in ("photo.png", "edit.png", "again.png"))
    Image.effect_noise((128, 96), 90).save(photo)
    lora = ["--model", "nano-raw", "--lora", "krea2_nano_reference_lora.safetensors"]
    edit = ["--edit", str(photo), "--edit-task", "removal", "--edit-boost", "2", "--steps", "2"]
    assert main(["a green star", *lora, *edit, "--output", str(output)]) == 0
    with Image.open(output) as picture:
        assert picture.size == (128, 96)
    assert main(["again", str(output), "--output", str(again), "--edit", str(photo)]) == 0
    assert again.read_bytes() != b"" and np.array_equal(Image.open(again), Image.open(output))
    capsys.readouterr()
    for more, words in ((["--image", str(photo)], "leave --image out"),
                        (["--edit", str(photo)] * 2, "There are 3 pictures")):  # fmt: skip
        assert main(["a green star", *lora, *edit, *more]) == 2
        assert words in capsys.readouterr().err
