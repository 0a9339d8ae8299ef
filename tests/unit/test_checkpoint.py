"""Every layout loads strictly and without a copy; everything else is refused with reasons."""

import json
import resource
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tiny_checkpoints as tiny
from krea2_model import (
    CheckpointError,
    Krea2Pipeline,
    Krea2Transformer,
    Preset,
    load_text_encoder,
    load_transformer,
    load_vae,
    save_transformer,
)
from krea2_model.checkpoints.checkpoint import Checkpoint
from krea2_model.checkpoints.identify import identify, read_header
from krea2_model.checkpoints.transformer_keys import module_to_official, official_to_diffusers
from krea2_model.checkpoints.vae_keys import vae_key_map
from parity import same_weights
from samples import saved


def diffusers_names(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name.endswith(".mod.lin"):
            tensor = tensor.unflatten(0, (6, -1))
        renamed[official_to_diffusers(name)] = tensor
    return renamed


def test_official_file(turbo):
    model = load_transformer(turbo)
    assert model.config == tiny.TRANSFORMER
    assert model.variant == "turbo" and model.preset.steps == 8
    tensors = load_file(turbo)
    assert torch.equal(model.blocks[1].mod.lin.weight, tensors["blocks.1.mod.lin"])
    assert model.blocks[1].mod.lin.weight.dtype == torch.float32
    assert model.first.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tensors_in_memory_stand_for_a_file(models, turbo):
    """Of every part, and in the same storage."""
    for load, file, key in (
        (load_transformer, turbo, "blocks.0.attn.wq.weight"),
        (load_text_encoder, models / "text_encoders/qwen3vl_tiny.safetensors", None),
        (load_vae, models / "vae/qwen_image_vae_tiny.safetensors", None),
    ):
        tensors = load_file(file)
        module = load(Checkpoint(Path("krea2_turbo_in_memory.safetensors"), dict(tensors)))
        assert same_weights(module, load(file))
        if key:
            assert module.variant == "turbo"
            assert module.state_dict()[key].data_ptr() == tensors[key].data_ptr()


def test_dtype_is_of_matrices_alone(turbo):
    model = load_transformer(turbo, dtype=torch.float32)
    assert model.first.weight.dtype == torch.float32
    half = load_transformer(turbo, dtype=torch.float16)
    assert half.first.bias.dtype == torch.float16
    assert half.last.norm.scale.weight.dtype == torch.float32


def test_a_few_float32_matrices_do_not_widen_the_rest(turbo, tmp_path):
    tensors = load_file(turbo)
    tensors["first.weight"] = tensors["first.weight"].float()
    model = load_transformer(saved(tmp_path / "mixed.safetensors", tensors))
    assert model.first.weight.dtype == model.blocks[0].mlp.up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["prefixed", "diffusers file", "all-in-one"])
def test_other_layouts_of_one_file(models, turbo, tmp_path, layout):
    tensors = load_file(turbo)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    path = tmp_path / "file.safetensors"
    if layout == "diffusers file":
        saved(path, diffusers_names(tensors))
    elif layout == "prefixed":
        saved(path, prefixed)
    else:
        encoder = load_file(models / "text_encoders" / "qwen3vl_tiny.safetensors")
        vae = load_file(models / "vae" / "qwen_image_vae_tiny.safetensors")
        prefixed |= {f"text_encoders.qwen3vl_4b.transformer.{k}": v for k, v in encoder.items()}
        prefixed |= {f"vae.{k}": v for k, v in vae.items()}
        saved(path, prefixed)
        pipeline = Krea2Pipeline.from_files(path, path, path)
        separate = load_text_encoder(models / "text_encoders" / "qwen3vl_tiny.safetensors")
        assert same_weights(pipeline.text_encoder, separate)
        plain = load_vae(models / "vae" / "qwen_image_vae_tiny.safetensors")
        assert same_weights(pipeline.vae, plain)
    assert same_weights(load_transformer(path), load_transformer(turbo))


def test_diffusers_folder(diffusers_folder, diffusers_pipeline):
    assert len(list((diffusers_folder / "transformer").glob("*.safetensors"))) > 1
    pipeline = Krea2Pipeline.from_folder(diffusers_folder)
    reference = diffusers_pipeline.transformer.state_dict()
    ours = pipeline.transformer.state_dict()
    assert torch.equal(ours["blocks.2.attn.wo.weight"],
                       reference["transformer_blocks.2.attn.to_out.0.weight"])  # fmt: skip
    assert pipeline.transformer.config.axes_dims_rope == (8, 12, 12)
    assert pipeline.text_encoder.config.rope_theta == 5_000_000
    # One part alone, by its own folder.
    assert same_weights(load_vae(diffusers_folder / "vae"), pipeline.vae)


def test_saved_file_has_official_names_and_loads(turbo, tmp_path):
    model = load_transformer(turbo)
    model.preset = Preset("turbo", 12, 0.5, 1.4)
    save_transformer(model, tmp_path / "copy.safetensors")
    original, copy = load_file(turbo), load_file(tmp_path / "copy.safetensors")
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[k], copy[k]) for k in original)
    again = load_transformer(tmp_path / "copy.safetensors")
    assert again.variant == "turbo" and again.preset == model.preset
    assert list(tmp_path.iterdir()) == [tmp_path / "copy.safetensors"]


def test_diffusers_to_one_file_and_back(diffusers_folder, tmp_path):
    model = load_transformer(diffusers_folder)
    save_transformer(model, tmp_path / "krea2_raw.safetensors")
    again = load_transformer(tmp_path / "krea2_raw.safetensors")
    assert same_weights(model, again) and again.config == model.config
    back = diffusers_names(load_file(tmp_path / "krea2_raw.safetensors"))
    with safe_open(next((diffusers_folder / "transformer").glob("*-00001-*")), "pt") as shard:
        for name in shard.keys():  # noqa: SIM118
            assert torch.equal(back[name], shard.get_tensor(name)), name


@pytest.mark.parametrize(
    "name, metadata, variant",
    [
        ("krea2_raw_fp8.safetensors", {}, "raw"),
        ("Krea2-TURBO.safetensors", {}, "turbo"),
        ("model.safetensors", {}, None),
        ("drawing_merge.safetensors", {}, None),
        ("turbo_based.safetensors", {"krea2.variant": "raw"}, "raw"),
    ],
)
def test_variant_is_known_from_loading(turbo, tmp_path, name, metadata, variant):
    model = load_transformer(saved(tmp_path / name, load_file(turbo), metadata))
    assert model.variant == variant and (model.preset is None) == (variant is None)


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 2])
def test_vae_names_and_dtypes(tmp_path, names, dtype, blocks):
    config = replace(tiny.VAE, num_res_blocks=blocks)
    tensors = tiny.vae_tensors(config, dtype=dtype)
    expected = load_vae(saved(tmp_path / "original.safetensors", tensors))
    assert expected.config == config and expected.conv2.weight.dtype == dtype
    if names == "diffusers":
        keys = vae_key_map(config)
        tensors = {keys[name]: tensor for name, tensor in tensors.items()}
    assert same_weights(load_vae(saved(tmp_path / "vae.safetensors", tensors)), expected)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "model.language_model.", "language_model.model.", "language_model."]
)
def test_text_encoder_prefixes_and_text_only_exports(models, tmp_path, prefix):
    path = models / "text_encoders" / "qwen3vl_tiny.safetensors"
    tensors = {
        prefix + name.removeprefix("model."): tensor
        for name, tensor in load_file(path).items()
        if not name.startswith("visual")
    }
    export = saved(tmp_path / "export.safetensors", tensors)
    assert same_weights(load_text_encoder(export), load_text_encoder(path))


def test_loading_maps_the_file_instead_of_copying_it(tmp_path):
    """Anonymous memory does not grow with the file; its pages stay the kernel's to drop."""
    config = replace(tiny.TRANSFORMER, num_layers=120)
    shapes = Krea2Transformer(config, device="meta").state_dict().items()
    tensors = {
        module_to_official(name): torch.zeros(meta.shape, dtype=torch.bfloat16)
        for name, meta in shapes
    }
    path = saved(tmp_path / "large.safetensors", tensors)
    size = path.stat().st_size
    assert size > 200e6
    script = (
        "import sys, torch; from krea2_model import load_transformer\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith('RssAnon'))\n"
        "before = anonymous(); model = load_transformer(sys.argv[1])\n"
        "print(anonymous() - before)\n"
    )
    grown = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 0.25 * size


def corrupt_header(path, header, data=b""):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


HEADERS = {
    "not an object": [1, 2],
    "entry without dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "entry is a number": {"a": 3},
    "offsets beyond the end": {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_broken_headers(tmp_path, name):
    path = tmp_path / "broken.safetensors"
    corrupt_header(path, HEADERS[name], b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"broken.safetensors .*[Dd]ownload"):
        load_transformer(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"GGUF\x03\0\0\0\0", "is a broken GGUF file"),
        (b"PK\x03\x04rest of a zip", "is a PyTorch pickle"),
        (b"\x80\x02}q\x00.....", "is a PyTorch pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<html>Access denied</html>", "is a web page"),
        (b"\xff" * 64, "not a whole safetensors file"),
        (struct.pack("<Q", 10**10) + b"{}", "not a whole safetensors file"),
    ],
)
def test_files_of_another_format(tmp_path, content, message):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(path)


def test_truncated_file(turbo, tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes(turbo.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="half.safetensors is incomplete"):
        load_transformer(path)


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    """The length of a header may start with any byte, a pickle's first one too."""
    for size in range(300):
        path = saved(tmp_path / "file.safetensors", {"a": torch.zeros(1)}, {"note": "x" * size})
        assert read_header(path).shapes == {"a": (1,)}


@pytest.mark.parametrize(
    "loader, part, message",
    [
        (load_transformer, "vae", "is a Qwen-Image VAE; expected a Krea 2 transformer"),
        (load_transformer, "text_encoders", "is a Qwen3-VL text encoder; expected a Krea 2"),
        (load_text_encoder, "vae", "is a Qwen-Image VAE; expected a Qwen3-VL text encoder"),
        (load_vae, "diffusion_models", "is a Krea 2 transformer; expected a Qwen-Image VAE"),
    ],
)
def test_wrong_kinds(models, loader, part, message):
    path = sorted((models / part).glob("*.safetensors"))[0]
    with pytest.raises(CheckpointError, match=message):
        loader(path)


FOREIGN = {
    "double_blocks.0.img_attn.qkv.weight": "a Flux transformer",
    "diffusion_model.blocks.0.attn.wq.lora_A.weight": "a LoRA",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a CLIP text encoder",
    "decoder.up.0.block.0.conv1.weight": "a Stable Diffusion or Flux VAE",
    "something.else": "a file of unknown kind",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_named(tmp_path, name):
    path = saved(tmp_path / "foreign.safetensors", {name: torch.zeros(2, 2)})
    assert identify([name]) == FOREIGN[name]
    with pytest.raises(CheckpointError, match=f"is {FOREIGN[name]}"):
        load_transformer(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("blocks.1.attn.wo.weight"), r"1 missing \(such as blocks.1.attn.wo"),
        (lambda t: t.pop("last.linear.weight"), "'last.linear.weight' is missing"),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), r"1 surplus \(such as extra"),
        (
            lambda t: t.update({"blocks.1.mlp.up.weight": torch.zeros(768, 255)}),
            r"blocks.1.mlp.up.weight is \(768, 255\) instead of \(768, 256\)",
        ),
        (
            lambda t: t.update({"tmlp.0.bias": torch.full((256,), float("inf"))}),
            "tmlp.0.bias holds NaN or infinity",
        ),
    ],
)
def test_incomplete_or_damaged_transformers(turbo, tmp_path, change, message):
    tensors = load_file(turbo)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(saved(tmp_path / "bad.safetensors", tensors))


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_transformer(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="holds no .safetensors file"):
        load_transformer(tmp_path)


@pytest.mark.parametrize("shard", ["missing.safetensors", "../outside.safetensors"])
def test_index_that_names_what_is_not_there(turbo, tmp_path, shard):
    folder = tmp_path / "transformer"
    folder.mkdir()
    saved(tmp_path / "outside.safetensors", load_file(turbo))
    index = {"weight_map": {"first.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names the shard .* not in that folder"):
        load_transformer(folder)


def test_refusals_take_little_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "claims.safetensors"
    path.write_bytes(struct.pack("<Q", 10 * 2**30) + b"{" + b" " * 100)
    with pytest.raises(CheckpointError):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
