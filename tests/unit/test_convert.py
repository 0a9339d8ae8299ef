"""Files made of files: the same numbers in another layout, or in 8 bits."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
import tiny_checkpoints as tiny
from krea2_model import Krea2Pipeline, load_text_encoder, load_transformer, load_vae
from krea2_model.checkpoints.identify import CheckpointError, read_header
from krea2_model.cli.main import main
from krea2_model.tools.convert import convert as convert_files
from krea2_model.tools.convert import quantise_blocks
from parity import assert_close, relative_error, same_weights

SIZE = {"height": 32, "width": 48, "steps": 2, "guidance": 1.0, "output_type": "latent"}


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


def test_a_folder_to_one_file_and_back(diffusers_pipeline, diffusers_folder, tmp_path):
    """And diffusers itself loads what comes back."""
    from diffusers import Krea2Pipeline as Reference

    one, folder = tmp_path / "all_in_one.safetensors", tmp_path / "folder"
    convert(diffusers_folder, one)
    names = read_header(one).tensors
    assert "model.diffusion_model.blocks.0.mod.lin" in names
    assert "text_encoders.qwen3vl_4b.transformer.model.layers.0.mlp.up_proj.weight" in names
    assert any(
        name.startswith("text_encoders.qwen3vl_4b.transformer.model.visual.") for name in names
    )
    assert "vae.decoder.head.0.gamma" in names
    convert(one, folder)
    first, through_one, back = (
        Krea2Pipeline.from_files(path, path, path) for path in (diffusers_folder, one, folder)
    )
    for part in ("transformer", "text_encoder", "vae"):
        assert same_weights(getattr(first, part), getattr(through_one, part)), part
        assert same_weights(getattr(first, part), getattr(back, part)), part
    reference = Reference.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    for part in ("transformer", "text_encoder", "vae"):
        ours, theirs = (getattr(p, part).state_dict() for p in (reference, diffusers_pipeline))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    assert reference.config.is_distilled == diffusers_pipeline.config.is_distilled


@pytest.mark.parametrize("part, load", [
    ("transformer", load_transformer), ("text_encoder", load_text_encoder), ("vae", load_vae),
])  # fmt: skip
def test_one_part_of_a_folder(diffusers_folder, tmp_path, part, load):
    target = tmp_path / f"{part}.safetensors"
    convert(diffusers_folder, target, "--part", part)
    assert same_weights(load(diffusers_folder), load(target))
    assert not any(name.startswith("model.diffusion_model") for name in read_header(target).tensors)


def test_single_files_to_a_folder_that_loads(models, turbo, tmp_path):
    convert(turbo, tmp_path / "folder")
    assert same_weights(load_transformer(turbo), load_transformer(tmp_path / "folder"))
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["is_distilled"] is True
    vae = models / "vae" / "qwen_image_vae_tiny.safetensors"
    convert(vae, tmp_path / "vae folder")
    assert same_weights(load_vae(vae), load_vae(tmp_path / "vae folder"))


@pytest.mark.parametrize("kind, error", [("fp8", 0.04), ("int8", 0.01), ("int8_convrot", 0.01)])
def test_eight_bits(turbo, tmp_path, kind, error):
    target = tmp_path / f"krea2_{kind}.safetensors"
    convert(turbo, target, "--quantise", kind)
    header = read_header(target)
    dtype = header.tensors["blocks.0.attn.wq.weight"][0]
    assert dtype == ("F8_E4M3" if kind == "fp8" else "I8")
    assert header.tensors["blocks.0.mod.lin"][0] == "F32", "tables are never in 8 bits"
    assert header.tensors["txtfusion.refiner_blocks.0.attn.wq.weight"][0] == "BF16"
    assert header.metadata["krea2.variant"] == "turbo"
    full, small = (
        load_transformer(turbo, dtype=torch.float32),
        load_transformer(target, dtype=torch.float32),
    )
    for name, weight in full.state_dict().items():
        found = small.state_dict()[name]
        if name.startswith("blocks.") and weight.ndim == 2:
            assert 0 < relative_error(found, weight) < error, name
        else:
            assert torch.equal(found, weight), name


def test_gguf_becomes_bfloat16(tmp_path):
    tensors = tiny.transformer_tensors()
    values = formats.gguf_file(tensors, tmp_path / "krea2_raw.gguf", "Q6_K")
    convert(tmp_path / "krea2_raw.gguf", tmp_path / "krea2_raw.safetensors")
    found = load_file(tmp_path / "krea2_raw.safetensors")
    name = "blocks.1.mlp.down.weight"
    assert found[name].dtype == torch.bfloat16
    assert torch.equal(found[name], values[name].bfloat16())


def test_what_cannot_be_converted_says_why(turbo, tmp_path, capsys):
    stored, _, metadata = formats.float8(load_file(turbo))
    save_file(stored, tmp_path / "fp8.safetensors", metadata)
    vae = tmp_path / "vae.safetensors"
    save_file(tiny.vae_tensors(), vae)
    cases = [
        ((tmp_path / "fp8.safetensors", tmp_path / "x", ), "which diffusers does not read"),
        ((tmp_path / "fp8.safetensors", tmp_path / "x.safetensors", "--quantise", "int8"),
         "quantise from the bf16 file"),
        ((turbo, tmp_path / "x.gguf"), "expected a name that ends in .safetensors"),
        ((turbo, tmp_path / "x", "--quantise", "fp8"), "folders are not quantised"),
        ((vae, tmp_path / "x.safetensors", "--quantise", "fp8"), "the source holds none"),
        ((turbo, turbo), "is the source itself"),
        ((tmp_path / "nothing", tmp_path / "x"), "There is no file or folder"),
    ]  # fmt: skip
    for arguments, message in cases:
        assert main(["convert", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial"))


def test_conversion_needs_memory_for_a_tensor_and_not_for_the_file(tmp_path):
    """A file of 400 MB, in a process whose anonymous memory is watched."""
    tensors = tiny.transformer_tensors()
    wide = {
        f"blocks.0.filler{n}.weight": torch.zeros(1024, 2048, dtype=torch.bfloat16)
        for n in range(100)
    }
    source = tmp_path / "big.safetensors"
    save_file(
        {f"model.diffusion_model.{n}": t for n, t in {**tensors}.items()}
        | {f"other.{n}": t for n, t in wide.items()},
        source,
    )
    script = """
import sys, threading, time
from pathlib import Path
import torch
from krea2_model.checkpoints.storage import Entry, read_safetensors, write_safetensors
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
source, target = map(Path, sys.argv[1:])
tensors, _ = read_safetensors(source)
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
def entry(name, t):
    return Entry(name, t.dtype, tuple(t.shape), lambda: (t.float() * 1).to(t.dtype))
entries = [entry(*item) for item in tensors.items()]
write_safetensors(target, entries, {})
done = True
thread.join()
print(peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "copy.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 100_000, "kB, of a file of 420,000"
    assert read_header(source).tensors == read_header(tmp_path / "copy.safetensors").tensors


def test_inspect_says_what_files_are(models, turbo, diffusers_folder, tmp_path, capsys):
    tensors = load_file(turbo)
    stored, _, metadata = formats.float8(tensors, "header")
    save_file(stored, tmp_path / "krea2_raw_fp8.safetensors", metadata)
    formats.gguf_file(tensors, tmp_path / "krea2_turbo.gguf", "Q4_K", strays=("last.up.weight",))
    partial = {name: t for name, t in tensors.items() if name != "blocks.1.attn.wo.weight"}
    save_file({**partial, "odd": torch.zeros(1)}, tmp_path / "broken.safetensors")
    lora = {"diffusion_model.blocks.0.attn.wq.lora_A.weight": torch.zeros(4, 6144),
            "diffusion_model.blocks.0.attn.wq.lora_B.weight": torch.zeros(6144, 4)}  # fmt: skip
    save_file(lora, tmp_path / "style.safetensors")
    control = {"first.weight": torch.zeros(8, 4), "blocks.0.attn.wq.A": torch.zeros(2, 8),
               "blocks.0.attn.wq.B": torch.zeros(8, 2)}  # fmt: skip
    save_file(control, tmp_path / "control.safetensors")
    save_file({"double_blocks.0.x": torch.zeros(1)}, tmp_path / "flux.safetensors")
    expected = {
        turbo: ["a Krea 2 transformer", "variant: turbo (its name)", "layout: official names",
                "2 blocks of width 256", "bfloat16"],
        tmp_path / "krea2_raw_fp8.safetensors": ["variant: raw", "x float8_e4m3fn"],
        tmp_path / "krea2_turbo.gguf": ["x GGUF Q4_K", "ignored: last.up.weight"],
        tmp_path / "broken.safetensors": ["missing: blocks.1.attn.wo.weight", "surplus: odd"],
        tmp_path / "style.safetensors": ["a LoRA", "rank 4", "1 weight of the transformer"],
        tmp_path / "control.safetensors": ["a control LoRA"],
        tmp_path / "flux.safetensors": ["a Flux transformer", "Krea 2 uses"],
        models / "text_encoders" / "qwen3vl_tiny.safetensors": ["a Qwen3-VL text encoder",
                                                                "vision tower: yes"],
        models / "vae" / "qwen_image_vae_tiny.safetensors": ["a Qwen-Image VAE", "base width 16"],
        diffusers_folder: ["a diffusers folder with transformer, text_encoder, vae",
                           "layout: diffusers names", "is_distilled in model_index.json"],
    }  # fmt: skip
    for path, parts in expected.items():
        assert main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        for part in parts:
            assert part in text, text


def test_a_lora_from_the_command_line_and_back_out(models, turbo, tmp_path, capsys):
    torch.manual_seed(0)
    tensors = {
        "diffusion_model.blocks.0.attn.wq.lora_A.weight": torch.randn(4, 256),
        "diffusion_model.blocks.0.attn.wq.lora_B.weight": torch.randn(256, 4),
    }
    save_file(tensors, tmp_path / "style.safetensors")
    pipeline = Krea2Pipeline.from_files(
        turbo, models / "text_encoders/qwen3vl_tiny.safetensors",
        models / "vae/qwen_image_vae_tiny.safetensors", dtype=torch.float32,
    )  # fmt: skip
    weight = pipeline.transformer.blocks[0].attn.wq.weight
    before = weight.clone()
    plain = pipeline("a fox", **SIZE)
    delta = (
        tensors["diffusion_model.blocks.0.attn.wq.lora_B.weight"]
        @ tensors["diffusion_model.blocks.0.attn.wq.lora_A.weight"]
    )
    report = pipeline.load_lora(tmp_path / "style.safetensors", scale=0.5)
    assert report.matched == 1
    assert_close(weight, before + 0.5 * delta, 1e-6, "one LoRA")
    pipeline.load_lora(tmp_path / "style.safetensors", scale=-0.25)
    assert_close(weight, before + 0.25 * delta, 1e-6, "two LoRAs")
    assert not torch.allclose(pipeline("a fox", **SIZE), plain)
    pipeline.unload_lora()
    assert torch.equal(weight, before)
    assert torch.equal(pipeline("a fox", **SIZE), plain)


def test_a_full_disk_is_named_and_leaves_the_old_file(turbo, tmp_path):
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"old")
    script = (
        "import resource, sys; from krea2_model.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(main(['convert', *sys.argv[1:], '--quantise', 'fp8', '--force']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(turbo), str(target)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"File too large: '{target}'" in done.stderr, done.stderr
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("part, file, name, value", [
    ("vae", "vae/config.json", "latents_std", [2.0] * 16),
    ("transformer", "transformer/config.json", "rope_theta", 500.0),
    ("text_encoder", "model_index.json", "text_encoder_select_layers", [0, 1, 2]),
])  # fmt: skip
def test_settings_that_one_file_cannot_carry(diffusers_folder, tmp_path, part, file, name, value):
    folder = tmp_path / "model"
    shutil.copytree(diffusers_folder, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(
        CheckpointError, match=f"{part} sets .*one file cannot carry. Name a folder"
    ):
        convert_files(folder, tmp_path / "one.safetensors", part=part)
    convert_files(folder, tmp_path / "again", part=part)
    assert not (tmp_path / "one.safetensors").exists()


def test_quantised_blocks_go_where_they_are_wanted():
    """All but their settings, which are text and stay in main memory."""
    tensors = {"blocks.0.attn.wq.weight": torch.randn(8, 16), "first.bias": torch.randn(8)}
    made = quantise_blocks(tensors, "fp8", result_device="meta")
    layer = "blocks.0.attn.wq"
    assert made[f"{layer}.weight"].is_meta and made[f"{layer}.weight_scale"].is_meta
    assert json.loads(bytes(made[f"{layer}.comfy_quant"].tolist()))["format"] == "float8_e4m3fn"
    assert made["first.bias"] is tensors["first.bias"]
