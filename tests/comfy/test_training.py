"""K2TrainLora: it trains as `krea2 train` on a MODEL that stays as it was; cancelling, refusals."""

import dataclasses
import functools
import sys

import comfy.model_management
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from in_process import NODES
from parity import assert_close, relative_error

COLOURS = ("red", "blue", "green")
SETTINGS = {"rank": 4, "steps": 3, "batch": 2, "resolution": 64, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(base):
    """Three pictures of two shapes with captions, in ComfyUI's input folder."""
    folder = base / "input" / "training" / "walls"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index, colour in enumerate(COLOURS):
        pixels = generator.integers(0, 255, (64, 96 if index else 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} wall")
    return folder


@pytest.fixture(scope="module")
def nano(run):
    """MODEL, CLIP and VAE of krea2-nano Raw."""
    with torch.inference_mode():
        return run("K2Loader", model="krea2-nano Raw (built in)")


@pytest.fixture
def parts(nano):
    return dict(zip(("model", "clip", "vae"), nano, strict=True))


@pytest.fixture
def train(run, folder, parts):
    """Run the node as the executor does, each input a list: `train(name="a", steps=2)`."""

    def call(**inputs):
        known = {**parts, "folder": "training/walls", **SETTINGS, **inputs}
        lists = ("images", "captions")
        return run("K2TrainLora", **{
            name: value if name in lists else [value] for name, value in known.items()
        })  # fmt: skip

    return call


@pytest.fixture(scope="module")
def training(pack):
    """The package krea2_training, as the node imports it."""
    return pack("nodes.managed.training_package").training()


def test_choices_are_those_of_the_package(pack, training):
    sections, node = training.settings.sections, pack("nodes.training")
    assert (*node.METHODS, "full") == sections.METHODS
    assert sections.TARGETS == node.TARGETS and sections.OPTIMISERS == node.OPTIMISERS
    assert sections.BASES == node.BASES
    assert pack("nodes.training_files").PICTURES == training.data.examples.PICTURES


@pytest.mark.parametrize("method", ["dora"])
def test_the_node_trains_what_the_command_does(train, training, folder, tmp_path, method):
    options = {"method": method, "caption_dropout": 0.5, "trigger": "sks", "seed": 3}
    lora, losses, curve, file = train(name=f"same/{method}", **options)
    assert file == f"same/{method}.safetensors" and curve.shape[0] == 1
    config = training.config.read_config(None, {
        "data.path": folder, "data.resolution": [64], "data.caption_dropout": 0.5,
        "data.trigger": "sks", "model.transformer": "nano", "adapter.method": method,
        "adapter.rank": 4, "training.steps": 3, "training.batch": 2, "training.warmup": 10,
        "training.learning_rate": 1e-3, "training.seed": 3, "samples.every": 0,
        "memory.device": str(comfy.model_management.get_torch_device()), "memory.dtype": "fp32",
        "output.path": tmp_path / "by_command.safetensors",
    })  # fmt: skip
    with torch.inference_mode(False):
        expected = load_file(training.train.train(config))
    log = training.engine.watch.read_log(config.output.run_folder)
    assert losses["loss"] == pytest.approx([line["loss"] for line in log], rel=1e-4)
    assert lora.keys() == expected.keys()
    for name in lora:
        assert_close(lora[name].float(), expected[name].float(), 0.02, name)


def test_pictures_that_are_wired_in_are_those_of_the_folder(train, folder):
    train = functools.partial(train, steps=1)
    images = [torch.from_numpy(np.array(Image.open(file)))[None] / 255
              for file in sorted(folder.glob("*.png"))]  # fmt: skip
    captions = [f"a {colour} wall" for colour in COLOURS]
    expected = train(name="from_folder")[1]
    wired = {"folder": "the images input", "images": images}
    assert train(name="wired", captions=captions, **wired)[1] == expected
    lines = ["\n".join(captions)]
    assert train(name="lines", captions=lines, **wired)[1] == expected
    common = train(name="common", caption="a wall", **wired)[1]
    assert common != expected and common == train(name="one", captions=["a wall"], **wired)[1]


@pytest.fixture
def hooked(monkeypatch):
    """Calls of ComfyUI's progress bar: `hooked(function)`. Those of fast steps come too."""
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
    return lambda function: monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", function)


def cancel_at(step, raises):
    """As the Cancel button does, once a step is done. raises: as the server's hook does."""
    import comfy.model_management

    def hook(value, total, preview, node_id=None):
        if total == SETTINGS["steps"] and value == step:
            comfy.model_management.interrupt_current_processing(True)
        if raises:
            comfy.model_management.throw_exception_if_processing_interrupted()

    return hook


@pytest.mark.parametrize("raises, step", [(False, 1), (True, 2)])
def test_a_cancelled_run_keeps_what_it_learned_and_goes_on(
    train, base, parts, velocity, hooked, raises, step
):
    from comfy.model_management import InterruptProcessingException

    before = velocity(parts["model"])
    whole = train(name="whole")
    hooked(cancel_at(step, raises))
    with pytest.raises(InterruptProcessingException):
        train(name=f"parts{step}")
    assert torch.equal(velocity(parts["model"]), before), "the MODEL stays as it was"
    file = base / "output" / "loras" / f"parts{step}.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_steps"] == str(step)
    hooked(None)
    resumed = train(name=f"parts{step}")
    assert torch.equal(velocity(parts["model"]), before)
    assert resumed[1] == whole[1] and len(resumed[1]["loss"]) == 3
    assert all(torch.equal(resumed[0][name], whole[0][name]) for name in whole[0])


def test_cancelling_while_pictures_are_encoded(train, folder, hooked, calls_of):
    import comfy.model_management

    def hook(value, total, preview, node_id=None):
        comfy.model_management.interrupt_current_processing(True)

    hooked(hook)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(name="early", resolution=80)
    hooked(None)
    assert len(train(name="early", resolution=80, steps=1)[1]["loss"]) == 1


def test_the_node_shows_the_curve_and_writes_where_it_says(train, base, hooked, monkeypatch):
    shown = []
    hooked(lambda value, total, preview, node_id=None: shown.append((value, total, preview)))
    train(name="people/shown", steps=3)
    previews = [preview for _, total, preview in shown if total == 3 and preview]
    assert previews and previews[-1][0] == "JPEG" and previews[-1][1].size == (640, 360)
    written = {file.relative_to(base / "output").parts[0]
               for file in (base / "output").rglob("*") if file.is_file()}  # fmt: skip
    assert written <= {"loras", "krea2_training", "krea2_training_cache"}
    assert (base / "output" / "krea2_training" / "people" / "shown" / "log.jsonl").is_file()


def test_off_resume_begins_anew_and_a_foreign_file_is_left_alone(train, base, monkeypatch):
    first = train(name="anew")[1]["loss"]
    with monkeypatch.context() as patched:
        _refuse_encoding(patched)
        with pytest.raises(ValueError, match=r"rank \(4 there, 8 now\).*Choose another name"):
            train(name="anew", rank=8, trigger="of another run")
    assert train(name="anew", rank=8, resume=False)[1]["loss"][0] == first[0]
    foreign = base / "output" / "loras" / "foreign.safetensors"
    foreign.write_bytes(b"mine")
    with pytest.raises(ValueError, match="There is a foreign.safetensors in output/loras"):
        train(name="foreign", resume=False)
    assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize("dtype, form", [
    ("fp8_scaled", "as-is"), ("int8", "as-is"), ("fp8_e4m3fn", "as-is"), ("bf16", "4bit"),
    ("bf16", "fp8"),
])  # fmt: skip
def test_any_storage_trains_to_about_the_same(run, train, parts, velocity, dtype, form):
    model = run("K2ModelLoader", file="krea2-nano Raw (built in)", dtype=dtype)[0]
    before = velocity(model)
    plain = train(name="plain", steps=1)[1]["loss"]
    found = train(name=f"stored_{dtype}_{form}", model=model, base=form, steps=1)[1]["loss"]
    assert found == pytest.approx(plain, rel=0.05)
    assert torch.equal(velocity(model), before)


def test_a_lora_of_the_model_is_part_of_the_base(run, train, parts):
    lora = run("K2LoraLoader", model=parts["model"], lora="krea2-nano notebook (built in)")[0]
    for dtype in ("auto", "int8"):
        model = run("K2ModelLoader", file="krea2-nano Raw (built in)", dtype=dtype)[0]
        with_lora = run("K2LoraLoader", model=model, lora="krea2-nano notebook (built in)")[0]
        losses = {
            name: train(name=f"{name}_{dtype}", model=each, steps=1)[1]["loss"][0]
            for name, each in (("without", model), ("with", with_lora))
        }
        assert abs(losses["with"] / losses["without"] - 1) > 1e-3
    assert train(name="with", model=lora, steps=1)[1]["loss"] == pytest.approx(
        [losses["with"]], rel=0.02
    )


def test_parts_of_comfyui_s_own_are_trained_too(
    run, train, models, raw, core_raw, core_clip, conditioning
):
    """Its loaders' MODEL, CLIP and VAE, on the same small files."""
    clip = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    vae = run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]
    ours = train(name="ours", model=raw, clip=clip, vae=vae)[1]["loss"]
    core = train(name="core", model=core_raw, clip=core_clip, vae=vae)[1]["loss"]
    assert core == pytest.approx(ours, rel=1e-3)


def test_blocks_of_a_gguf_file_are_read_as_they_are(run, train, models, raw, velocity):
    import formats

    tensors = load_file(models / "diffusion_models" / "krea2_tiny_raw.safetensors")
    file = models / "diffusion_models" / "tiny_raw_trained.gguf"
    formats.gguf_file(tensors, file, "Q8_0")
    try:
        model = run("K2ModelLoader", file=file.name)[0]
        parts = {"clip": run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0],
                 "vae": run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]}  # fmt: skip
        before = velocity(model)
        found = train(name="gguf", model=model, steps=1, **parts)[1]["loss"]
        assert found == pytest.approx(train(name="raw", model=raw, steps=1, **parts)[1]["loss"],
                                      rel=0.02)  # fmt: skip
        assert torch.equal(velocity(model), before)
    finally:
        file.unlink()


def test_too_little_memory_is_warned_of_before_anything_is_encoded(
    train, training, monkeypatch, caplog
):
    _refuse_encoding(monkeypatch)
    monkeypatch.setattr(training.forecast, "free_device_bytes", lambda device: 10**8)
    with pytest.raises(AssertionError, match="encoding began"):
        train(name="large", trigger="no such memory", rank=8)
    device = comfy.model_management.get_torch_device()
    said = f"The run needs about 1.{3 if device.type == 'cpu' else 2} GB, and 0.1 GB are free on "
    assert f"{said}{device}. Choose base 4bit" in caplog.text


def test_training_on_turbo_is_warned_of(run, train, caplog):
    model = run("K2ModelLoader", file="krea2-nano (built in)")[0]
    train(name="turbo", model=model, steps=1)
    assert "undoes its distillation" in caplog.text


def test_core_s_nodes_take_the_lora(train, parts, velocity):
    import comfy_extras.nodes_train as core

    lora = train(name="wire", learning_rate=1e-2)[0]
    before = velocity(parts["model"])
    patched = core.LoraModelLoader.execute(parts["model"], lora, 1.0).result[0]
    assert relative_error(velocity(patched), before) > 1e-4
    patched.detach()


@pytest.mark.parametrize("options, message", [
    ({"folder": "no/such"}, "There is no folder 'no/such'"),
    ({"folder": "../output"}, "folder is '../output'; expected a name in the input folder"),
    ({"folder": "training/empty"}, "holds no pictures"),
    ({"folder": "training/bare"}, "1 of 1 picture without a caption: a.png.*set caption, one"),
    ({"folder": "the images input"}, "no images are connected"),
    ({"images": [torch.zeros(1, 64, 64, 3)]}, "images are connected too"),
    ({"name": "../../escape"}, "name is '../../escape'; expected"),
    ({"name": " "}, "name is ''; expected"),
    ({"steps": 0}, "steps is 0; expected a whole number from 1"),
    ({"resolution": 72}, r"resolution is \[72\]; expected multiples of 16"),
    ({"method": "full"}, "method is 'full'; expected one of lora"),
    ({"optimiser": "adamw8bit"}, "optimiser is adamw8bit, which needs bitsandbytes"),
    ({"base": "6bit"}, "base is '6bit'; expected one of as-is"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_encoded(
    train, folder, monkeypatch, options, message
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (folder.parent / "empty").mkdir(exist_ok=True)
    (folder.parent / "bare").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(folder.parent / "bare" / "a.png")
    _refuse_encoding(monkeypatch)
    with pytest.raises(ValueError, match=message):
        train(**options)


@pytest.mark.parametrize("captions, message", [
    (["one", "two"], "3 images and 2 captions"), (None, "3 of 3 images without a caption"),
    (["one", "", "three"], "1 of 3 images without a caption"),
    (["one\ntwo"], "3 images and 2 captions"),
])  # fmt: skip
def test_captions_have_to_be_as_many_as_images(train, monkeypatch, captions, message):
    _refuse_encoding(monkeypatch)
    with pytest.raises(ValueError, match=message):
        train(folder="the images input", images=[torch.zeros(3, 64, 64, 3)], captions=captions)


def test_a_caption_that_is_too_long_is_named(train, monkeypatch):
    _refuse_encoding(monkeypatch)
    with pytest.raises(ValueError, match=r"the caption of image 1 \(12,00\d\)"):
        train(folder="the images input", images=[torch.zeros(1, 64, 64, 3)],
              captions=["a red star " * 4000])  # fmt: skip


def test_parts_of_other_models_are_refused(run, train, models, monkeypatch, parts, pack):
    import types

    _refuse_encoding(monkeypatch)
    other = types.SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="model is a Linear; expected a Krea 2 MODEL"):
        train(model=other)
    other = types.SimpleNamespace(cond_stage_model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="clip is a Linear; expected Krea 2's text encoder"):
        train(clip=other)
    wide = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    encoder = wide.cond_stage_model
    monkeypatch.setattr(encoder, "config", dataclasses.replace(encoder.config, hidden_size=320))
    with pytest.raises(ValueError, match="clip is a text encoder of width 320; this model needs"):
        train(clip=wide)
    other = types.SimpleNamespace(first_stage_model=torch.nn.Linear(1, 1), latent_channels=16)
    with pytest.raises(ValueError, match="vae is a Linear; expected the Qwen-Image VAE"):
        train(vae=other)
    with pytest.raises(ValueError, match="vae is empty"):
        train(vae=None)
    eight = run("K2ModelLoader", file="krea2-nano Raw (built in)", dtype="int8")[0]
    with pytest.raises(ValueError, match="base is fp8, but the file holds blocks.0"):
        train(name="twice", model=eight, base="fp8")


def _refuse_encoding(monkeypatch):
    import comfy.sd

    def fail(*arguments, **options):
        raise AssertionError("encoding began")

    monkeypatch.setattr(comfy.sd.CLIP, "encode_from_tokens", fail)
    monkeypatch.setattr("krea2_kit.nodes.managed.vae.Krea2VAE.encode", fail)


@pytest.mark.parametrize("name", [
    "../walls", "training/../..", "/etc", "\\\\host\\share", "C:\\Windows", "~/x", "a\0b",
    "..", ".", "training//walls", "x/. ./y", "con:", "",
])  # fmt: skip
def test_names_that_lead_out_of_the_folders(folder, name):
    node = NODES["K2TrainLora"]
    for field in ("folder", "name"):
        for value in (name, [name]):
            verdict = node.validate_inputs(**{field: value})
            assert isinstance(verdict, str) and field in verdict, (field, name)


def test_the_list_has_folders_of_pictures_only(folder, pack):
    (folder.parent / "texts").mkdir(exist_ok=True)
    (folder.parent / "texts" / "a.txt").write_text("a")
    found = pack("nodes.training_files").list_picture_folders()
    assert "training/walls" in found and "training/texts" not in found
    assert NODES["K2TrainLora"].validate_inputs(folder="training/walls", name="a/b") is True


def test_a_changed_folder_runs_again(folder):
    node = NODES["K2TrainLora"]
    before = node.fingerprint_inputs(folder=["training/walls"])
    assert before == node.fingerprint_inputs(folder=["training/walls"])
    caption = folder / "0.txt"
    text = caption.read_text()
    caption.write_text("something else")
    try:
        assert node.fingerprint_inputs(folder=["training/walls"]) != before
    finally:
        caption.write_text(text)
