"""`krea2` as a program: quick to start, mistakes explained, everything checked before loading."""

import errno
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import krea2_model
from krea2_model import nano, public
from krea2_model.cli import choices
from krea2_model.cli.main import main
from krea2_model.cli.parser import COMMANDS, command_parser
from krea2_model.features.edits import FAMILIES, TASKS
from krea2_model.features.style_transfer import StyleSettings
from krea2_model.features.variations import STRENGTH
from krea2_model.images.picture_texts import read_texts
from krea2_model.lora.names import KEY_STYLES
from krea2_model.memory.plan import OFFLOADS
from krea2_model.pipeline.pipeline import Krea2Pipeline
from krea2_model.text.describer import CAPTION_LENGTHS, CREATIVITY, DESCRIBED_SIDE
from krea2_model.text.expander import LENGTHS, MAX_VARIANTS
from krea2_model.tools.convert import PARTS, QUANTISATIONS
from krea2_model.tools.extract import EXTRACTED
from krea2_model.transformer.references import REFERENCE_METHODS
from krea2_model.transformer.text_attention import NegativeGuidance

ROOT = Path(krea2_model.__file__).parents[1]


@pytest.fixture
def unloaded(monkeypatch):
    """Fails where weights would be loaded."""

    def load(*files, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Krea2Pipeline, "from_files", load)


def test_help_and_version_without_torch():
    """All in one process, since each takes a tenth of a second."""
    code = (
        "import sys, contextlib, io, json\n"
        "from krea2_model.cli.main import main\n"
        "from krea2_model.cli.parser import COMMANDS\n"
        "codes = []\n"
        "for words in ([], ['--help'], ['--version'], *([c, '--help'] for c in COMMANDS)):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try: codes.append(main(words))\n"
        "        except SystemExit as end: codes.append(end.code)\n"
        "    assert out.getvalue()\n"
        "heavy = ('torch', 'numpy', 'PIL', 'transformers', 'tqdm', 'safetensors')\n"
        "print(json.dumps([codes, [name for name in heavy if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout) == [[0] * (3 + len(COMMANDS)), []], done.stderr


def test_the_package_is_lazy_and_complete():
    code = "import sys, krea2_model; print('torch' in sys.modules, krea2_model.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert done.stdout.split() == ["False", project["version"]], done.stderr
    names: dict = {}
    exec("from krea2_model import *", names)
    assert names["Krea2Pipeline"] is Krea2Pipeline and names["__version__"] == project["version"]
    offered = {name for name in vars(public) if not name.startswith("_")} - {"annotations"}
    assert set(krea2_model.__all__) == offered | {"__version__"}
    assert set(krea2_model.__all__) <= set(dir(krea2_model))
    with pytest.raises(AttributeError, match="no attribute 'Krea3Pipeline'"):
        krea2_model.Krea3Pipeline  # noqa: B018


def test_words_and_defaults_in_help_are_those_of_the_code():
    assert choices.OFFLOADS == OFFLOADS and tuple(LENGTHS) == choices.LENGTHS
    assert tuple(CAPTION_LENGTHS) == choices.CAPTION_LENGTHS
    written = command_parser("describe").parse_args(["a.png"])
    assert (written.creativity, written.max_side) == (CREATIVITY, DESCRIBED_SIDE)
    assert choices.PARTS == PARTS and choices.QUANTISATIONS == QUANTISATIONS
    assert choices.EXTRACTED == EXTRACTED and choices.KEY_STYLES == KEY_STYLES
    assert choices.VARY_STRENGTH == STRENGTH
    assert choices.REFERENCE_METHODS == REFERENCE_METHODS
    assert choices.EDIT_FAMILIES == FAMILIES and tuple(TASKS) == choices.EDIT_TASKS
    assert str(MAX_VARIANTS) == "16"
    text, nag = command_parser("generate").format_help(), NegativeGuidance()
    for name in ("scale", "blend", "limit", "end"):
        option = text.partition(f"--nag-{name}")[2].partition("--")[0]
        assert option.split("default:")[1].split()[0] == f"{getattr(nag, name):g}"
    parser, style = command_parser("generate"), StyleSettings()
    for name in ("strength", "start", "end"):
        assert parser.get_default(f"style_{name}") == getattr(style, name)


@pytest.mark.parametrize(
    "words, message",
    [
        (["expnad", "a fox", "--model", "x"], "no command expnad. Did you mean expand?"),
        (["convret", "a", "b"], "no command convret. Did you mean convert?"),
        (["modles"], "no command modles. Did you mean models?"),
        (["a", "fox"], "fox is one word too many. Write a prompt of several words in quotes."),
        (["a fox", "--cfg_scale", "3"], "of generate; here it is --guidance, CFG scale less 1."),
        (["a fox", "--negative-prompt=x"], "no option --negative-prompt of generate; here it is"),
        (["a fox", "-W", "64"], "here it is --width and --height."),
        (["a fox", "--sampler", "dpm"], "no option --sampler of generate; here it is always Euler"),
        (["a fox", "--frobnicate"], "of generate. krea2 generate --help lists them."),
        (["models", "--cfg", "3"], "There is no option --cfg of models. krea2 models --help lists"),
        (["convert"], "source, target are missing. See krea2 convert --help."),
        (["a fox", "--stpes", "3"], "no option --stpes of generate. Did you mean --steps?"),
        (["models", "--fecth"], "no option --fecth of models. Did you mean --fetch?"),
        (["--nope"], "no prompt and no command"),
        (["generate"], "prompt is missing. See krea2 generate --help."),
        (["a fox", "--steps", "x"], "--steps is x; expected a whole number from 1 to 10000."),
        (["a fox", "--width", "0"], "--width is 0; expected a whole number from 1 to 16384."),
        (["a fox", "--guidance", "nan"], "--guidance is nan; expected a number, 0 to 100."),
        (["a fox", "--max-memory", "0"], "--max-memory is 0; expected a number of GB, above 0."),
        (["a fox", "--dtype", "bf"], "--dtype is bf; expected one of bf16, fp16, fp32."),
        (["a fox", "--layer-weights", "1,2"], "--layer-weights is 1,2; expected 12 numbers"),
        (["a fox", "--steps"], "--steps: expected one argument."),
        (["render", "x.txt", "--seeds", "4-1"], "--seeds is 4-1; expected seeds from 0"),
        (["a fox", "--lora", "x.safetensors:nan"], "expected a scale that is a number"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(capsys, unloaded, words, message):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("krea2: error: ") and message in error and error.count("\n") == 1


def test_a_word_near_a_command_is_a_prompt_beside_weights(tmp_path, capsys, monkeypatch):
    prompts = []

    def load(*files, **options):
        prompts.append(files)
        raise ValueError("enough")

    monkeypatch.setattr(Krea2Pipeline, "from_files", load)
    words = ["--model", "nano", "--output", str(tmp_path / "a.png"), "--quiet"]
    assert main(["chick", *words]) == 2 and len(prompts) == 1
    assert main(["generate", "expnad", *words]) == 2 and len(prompts) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--denoise", "0.5"], "--denoise is 0.5 without a picture to change"),
        (["--device", "cuda:99"], "--device is 'cuda:99'"),
        (["--device", "abc"], "--device is 'abc'; expected 'auto', 'cpu'"),
        (["--lora", "nowhere.safetensors"], "no file or folder nowhere.safetensors (--lora)"),
        (["--vae", "nowhere"], "no file or folder nowhere (--vae)"),
        (["--lora", "{vae}"], "--lora {vae} is a Qwen-Image VAE; expected a LoRA"),
        (["--transformer", "{vae}"], "is a Qwen-Image VAE; expected a Krea 2 transformer"),
        (["--text-encoder", "{encoder}"], "gives text of width 64; krea2_nano_turbo"),
        (["--model", "krea2-nano"], "Check the name and the folder. Did you mean nano?"),
        (["--model", "NANO"], "Check the name and the folder. Did you mean nano?"),
        (["--model", "krea/Krea-2-Turbo"], "`krea2 models` says which files to get"),
        (["--models", "nowhere"], "--models is nowhere, which is no folder"),
        (["--offload", "none", "--max-memory", "5"], "--max-memory is 5.0, and offload 'none'"),
        (["--guidance-start", "0.9", "--guidance-end", "0.1"], "start 0.9 and end 0.1"),
        (["--tokenizer", "{folder}"], "is no tokenizer folder"),
        (["--lora", "{folder}"], "a folder; expected a .safetensors file in it"),
        (["--start-image", "{folder}"], "a folder; expected a picture in it"),
        (["--output", "{folder}"], "is a folder; expected the name of a file"),
        (["--negative", "(a:99)"], "The prompt has the weight 99 in '(a:99)'"),
        (["--blend", "(a:99)"], "The prompt has the weight 99 in '(a:99)'"),
        (["--regions", '[{{"prompt": "(a:99)", "box": [0, 0, 1, 1]}}]'], "has the weight 99"),
        (["--max-sequence-length", "5"], "--max-sequence-length is 5; expected a whole number"),
        (["--layer-weights", ",".join("0" * 12)], "--layer-weights are all 0"),
        (["--mu", "99"], "--mu is 99, at which steps of a run have the same noise"),
        (["--nag-start", "0.8"], "--nag-start is 0.8 and --nag-end 0.75, so that it would never"),
        (["--image", "{square}"] * 9, "There are 9 pictures of --image; expected at most 8"),
        (["--edit", "{square}"], "no --lora tells its family. Give an edit LoRA with --lora"),
        (["--width", "9000", "--height", "64", "--upscale", "4"], "at most 16384 a side"),
        (["--style-image", "nowhere.png"], "--style-image is nowhere.png, which is not there"),
        (["--style-image", "{pixel}"], "A style picture is 1 x 1 px; expected at least 16 px"),
    ],
)
def test_everything_is_checked_before_weights_are_loaded(
    models, tmp_path, capsys, unloaded, words, message
):
    places = {"vae": models / "vae/qwen_image_vae_tiny.safetensors", "folder": tmp_path}
    places["pixel"] = models / "pixel.png"
    Image.new("RGB", (1, 1)).save(places["pixel"])
    places["square"] = models / "square.png"
    Image.new("RGB", (64, 64)).save(places["square"])
    places["encoder"] = models / "narrow_encoder.safetensors"
    names = ("embed_tokens.weight", "layers.0.input_layernorm.weight")
    names += ("layers.0.self_attn.q_norm.weight",)
    save_file({f"model.{name}": torch.zeros(64) for name in names}, places["encoder"])
    words = [word.format(**places) for word in words]
    options = ["--model", "nano", "--output", str(tmp_path / "a.png")]
    assert main(["a fox", *options, *words]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "failure, code, message",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            1,
            "Memory ran out. Try --offload",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Memory ran out."),
        (MemoryError(), 1, "Memory ran out."),
        (
            OSError(errno.ENOSPC, "No space left", "a.png"),
            1,
            "The disk is full while writing a.png",
        ),
        (RuntimeError("CUDA error: device-side assert"), 1, "The device failed: CUDA error"),
        (ModuleNotFoundError("No module", name="gguf"), 1, "pip install gguf"),
        (KeyboardInterrupt(), 130, "krea2: stopped"),
    ],
)
def test_failures_of_a_run_are_one_line(tmp_path, capsys, monkeypatch, failure, code, message):
    def fail(*files, **options):
        raise failure

    monkeypatch.setattr(Krea2Pipeline, "from_files", fail)
    words = ["a fox", "--model", "nano", "--output", str(tmp_path / "a.png"), "--quiet"]
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main([*words, "--verbose"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Krea2Pipeline, "from_files", None)
    assert main(["a fox", "--model", "nano", "--output", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err
    assert "TypeError" in error and "please report" in error


def test_a_closed_pipe_is_silent():
    words = "models --memory 16 --models ."
    command = f'"{sys.executable}" -m krea2_model {words} | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.usefixtures("nano_once")
def test_names_that_exist_are_not_written_over(tmp_path, capsys):
    output = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(output)
    old = output.read_bytes()
    words = ["a red circle", "--model", "nano", "--steps", "1", "--output", str(output), "--quiet"]
    assert main([*words, "--images", "2"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"a-{n}.png") for n in (2, 3)]
    assert output.read_bytes() == old
    assert main([*words, "--force"]) == 0
    assert output.read_bytes() == (tmp_path / "a-2.png").read_bytes() != old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-2.png", "a-3.png", "a.png"]


@pytest.mark.usefixtures("nano_once")
def test_notes_on_stderr_and_files_on_stdout(tmp_path, capsys):
    output = tmp_path / "a.png"
    words = ["a star", "--model", "nano", "--steps", "1", "--output", str(output), "--force"]
    assert main([*words, "--negative", "blue"]) == 0
    out, error = capsys.readouterr()
    assert out == f"{output}\n"
    assert "--negative has no effect at guidance 0; add --nag" in error
    assert main([*words, "--guidance-start", "0.1"]) == 0
    assert "--guidance-start has no effect at guidance 0" in capsys.readouterr().err
    assert main(["a __colour__ star", *words[1:], "--guidance", "1", "--guidance-end", "0.5"]) == 0
    error = capsys.readouterr().err
    assert "__colour__ stays in the prompt as text" in error and "has no effect" not in error
    assert "a.png: 100%" in error and "loading the model" in error
    assert main([*words, "--negative", "blue", "--nag"]) == 0
    assert "no effect" not in capsys.readouterr().err
    assert main([*words, "--negative", "blue", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["a star", *words[1:], "--evaluate-every", "5"]) == 0
    assert "no ComfyUI graph in the picture: it cannot express --evaluate-every" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("nano_once")
def test_names_of_files_are_found_in_the_models_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "models" / "vae").mkdir(parents=True)
    shutil.copyfile(nano.VAE, tmp_path / "models" / "vae" / "mine.safetensors")
    output = tmp_path / "a.png"
    words = ["a star", "--model", "nano", "--steps", "1", "--output", str(output), "--quiet"]
    assert main([*words, "--vae", "mine.safetensors"]) == 2
    assert "no file or folder mine.safetensors (--vae)" in capsys.readouterr().err
    assert main([*words, "--vae", "mine.safetensors", "--models", str(tmp_path / "models")]) == 0
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr("krea2_model.cli.checks.find_tokenizer", lambda *names: tmp_path)
    assert main([*words, "--vae", "mine.safetensors"]) == 0
    settings = json.loads(read_texts(output)["krea2"])["settings"]
    assert (settings["model"], settings["vae"]) == ("nano", "mine.safetensors")


def test_parts_that_are_not_named_come_from_the_models_folder(models, tmp_path, monkeypatch):
    taken = []

    def load(*files, **options):
        taken.append([file.name for file in files if file])
        raise ValueError("enough")

    monkeypatch.setattr(Krea2Pipeline, "from_files", load)
    places = {
        "diffusion_models/krea2_turbo_fp8_scaled.safetensors": "krea2_tiny_turbo",
        "text_encoders/qwen3vl_4b_bf16.safetensors": "qwen3vl_tiny",
        "vae/qwen_image_vae.safetensors": "qwen_image_vae_tiny",
    }
    for name, source in places.items():
        (tmp_path / name).parent.mkdir()
        folder = name.partition("/")[0]
        shutil.copyfile(models / folder / f"{source}.safetensors", tmp_path / name)
    words = ["a fox", "--models", str(tmp_path), "--output", str(tmp_path / "a.png")]
    assert main(words) == 2
    mine = str(models / "vae" / "qwen_image_vae_tiny.safetensors")
    assert main([*words, "--vae", mine]) == 2
    assert main([*words, "--model", "nano"]) == 2
    # Files of other names are known by their headers.
    assert main(["a fox", "--models", str(models), "--output", str(tmp_path / "a.png")]) == 2
    assert taken[3] == [
        f"{name}.safetensors"
        for name in ("krea2_tiny_turbo", "qwen3vl_tiny", "qwen_image_vae_tiny")
    ]
    names = [Path(name).name for name in places]
    assert taken[:2] == [names, [*names[:2], "qwen_image_vae_tiny.safetensors"]]
    assert taken[2][0] == "krea2_nano_turbo.safetensors"
