"""Settings of configuration files: those that are used, and those that cannot be."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import formats
from krea2_model import CheckpointError, load_text_encoder, load_transformer, load_vae
from krea2_model.checkpoints.checkpoint import read_shapes
from krea2_model.checkpoints.quantised import normalise_metadata
from parity import assert_close
from samples import saved
from work import assert_linear

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def folder(diffusers_folder, tmp_path):
    """A copy whose weights are links and whose configurations may be changed."""
    for source in diffusers_folder.rglob("*"):
        target = tmp_path / "model" / source.relative_to(diffusers_folder)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif source.suffix == ".json":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        else:
            target.symlink_to(source)
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


TRANSFORMER = {
    "norm_eps": [NAN, 0, -1e-5, INF, 1.0, "1e-5", True, [], {}],
    "rope_theta": [NAN, 0, -1000.0, INF, "1000", False, 10**400],
    "axes_dims_rope": [[8, 12], [8, 12, 13], [0, 16, 16], [8.0, 12, 12], "8", 5, [2**70, 1, 1]],
}


@pytest.mark.parametrize("name", TRANSFORMER)
def test_settings_of_a_transformer(folder, name):
    for value in TRANSFORMER[name]:
        change(folder / "transformer" / "config.json", **{name: value})
        with pytest.raises(CheckpointError, match=rf"transformer/config.json has {name} ") as error:
            load_transformer(folder)
        assert "Download it again" not in str(error.value) and len(str(error.value)) < 300


TAPS = [
    [],
    [10**9],
    [-1],
    [0.5],
    ["2"],
    [True],
    5,
    "2,5",
    {"2": 1},
    [2, 2],
    [[2]],
    list(range(2000)),
]


def test_layers_that_no_encoder_has(folder):
    for taps in TAPS:
        change(folder / "model_index.json", text_encoder_select_layers=taps)
        with pytest.raises(
            CheckpointError, match="model_index.json has text_encoder_select_layers"
        ):
            load_text_encoder(folder)
    change(folder / "model_index.json", text_encoder_select_layers=[2, 200])
    with pytest.raises(CheckpointError, match="has 36 layers.* layer 36 is missing"):
        load_text_encoder(folder)


@pytest.mark.parametrize("taps", [[0], [0, 1, 2], [3, 0, 7]])
def test_layers_as_diffusers_tests_its_own_pipeline(folder, diffusers_pipeline, taps):
    """Index 0 is the embedding; the order is the file's."""
    change(folder / "model_index.json", text_encoder_select_layers=taps)
    encoder = load_text_encoder(folder)
    tokens = torch.arange(100, 107)[None]
    states = diffusers_pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states
    expected = torch.stack([states[tap] for tap in taps], dim=2)
    assert_close(encoder(tokens), expected, 1e-5, f"hidden states {taps}")


@pytest.mark.parametrize("value", ["false", "true", 0, 1, [], {}])
def test_is_distilled_is_true_or_false(folder, value):
    change(folder / "model_index.json", is_distilled=value)
    with pytest.raises(
        CheckpointError, match="model_index.json has is_distilled .*true .Turbo. or"
    ):
        load_transformer(folder)


def test_settings_nested_10_000_deep(folder):
    deep = '{"a":' * 10_000 + "1" + "}" * 10_000
    for part, load in (("transformer", load_transformer), ("vae", load_vae)):
        (folder / part / "config.json").write_text(deep)
        with pytest.raises(CheckpointError, match="config.json is not valid"):
            load(folder)


def test_statistics_of_the_vae_are_the_folder_s(folder, diffusers_pipeline):
    mean, std = [0.1 * i for i in range(16)], [1 + 0.2 * i for i in range(16)]
    change(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    vae = load_vae(folder)
    latents = torch.randn(1, 16, 4, 4)
    raw = latents * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    expected = diffusers_pipeline.vae.decode(raw.unsqueeze(2)).sample[:, :, 0]
    assert_close(vae.decode(latents), expected.clamp(-1, 1), 1e-5, "decoded by diffusers")


STATISTICS = [
    {"z_dim": 8}, {"latents_mean": [0.0] * 15}, {"latents_std": [1.0] * 17},
    {"latents_std": [1.0] * 15 + [0.0]}, {"latents_std": [-1.0] * 16}, {"latents_mean": [NAN] * 16},
    {"latents_mean": 3}, {"latents_std": ["1"] * 16}, {"latents_std": []},
]  # fmt: skip


def test_statistics_that_cannot_be(folder):
    original = (folder / "vae" / "config.json").read_text()
    for values in STATISTICS:
        (folder / "vae" / "config.json").write_text(original)
        change(folder / "vae" / "config.json", **values)
        with pytest.raises(
            CheckpointError, match=rf"vae/config.json has .*{next(iter(values))}|z_dim"
        ):
            load_vae(folder)


LAYER = "blocks.0.attn.wq"
SCALES = [NAN, 0.0, -0.5, INF, -INF]


@pytest.mark.parametrize("value", SCALES)
def test_scales_that_no_quantiser_writes(tensors, tmp_path, value):
    for stored, _, metadata in (
        formats.float8(tensors, "header"),
        formats.float8(tensors, "marker"),
    ):
        name = f"{LAYER}.{'weight_scale' if metadata else 'scale_weight'}"
        stored[name] = torch.tensor(value)
        with pytest.raises(
            CheckpointError, match=rf"{LAYER}.weight_scale is .*; expected a finite"
        ):
            load_transformer(saved(tmp_path / "f.safetensors", stored, metadata))
    stored, _, metadata = formats.int8(tensors)
    stored[f"{LAYER}.weight_scale"][3] = value
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight_scale is"):
        load_transformer(saved(tmp_path / "f.safetensors", stored, metadata))


def test_a_row_of_zeros_may_have_the_scale_0(tensors, tmp_path):
    stored, _, metadata = formats.int8(tensors)
    stored[f"{LAYER}.weight_scale"][3], stored[f"{LAYER}.weight"][3] = 0, 0
    model = load_transformer(saved(tmp_path / "f.safetensors", stored, metadata))
    assert not model.blocks[0].attn.wq.weight[3].any()


@pytest.mark.parametrize("shape", [(0,), (2,), (255, 1), (257,), (256, 2)])
def test_scales_of_another_size(tensors, tmp_path, shape):
    for stored, _, metadata in (formats.float8(tensors), formats.int8(tensors)):
        stored[f"{LAYER}.weight_scale"] = torch.ones(shape)
        with pytest.raises(
            CheckpointError, match=rf"{LAYER}.weight_scale holds .*expected 1 or 256"
        ):
            load_transformer(saved(tmp_path / "f.safetensors", stored, metadata))


QUANTISATIONS = [
    "[]", "null", "5", '"fp8"', "{}", '{"format": []}', '{"format": null}', "[" * 50_000,
    '{"format": "float8_e4m3fn", "params": [1]}',
]  # fmt: skip


@pytest.mark.parametrize("text", QUANTISATIONS)
def test_settings_of_other_types(tensors, tmp_path, text):
    stored, _, _ = formats.float8(tensors, "tensors")
    stored[f"{LAYER}.comfy_quant"] = torch.tensor(list(text.encode("latin-1")), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=LAYER):
        load_transformer(saved(tmp_path / "f.safetensors", stored))
    with pytest.raises(CheckpointError, match="f.safetensors"):
        load_transformer(
            saved(tmp_path / "f.safetensors", stored, {"_quantization_metadata": text})
        )


@pytest.mark.parametrize(
    "group", [2**62, 10**400, 3, 0, -4, 8, 128, 512, 1024, "64", 16.0, True, None]
)
def test_groups_that_do_not_fit(tensors, tmp_path, group):
    stored, _, _ = formats.int8(tensors, group=16)
    settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    stored[f"{LAYER}.comfy_quant"] = formats.settings_tensor(settings)
    with pytest.raises(CheckpointError, match=rf"{LAYER} is rotated in groups of .*power of 4"):
        load_transformer(saved(tmp_path / "f.safetensors", stored))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8,
                                   torch.bool])  # fmt: skip
@pytest.mark.parametrize("name", ["blocks.0.attn.wq.weight", "blocks.1.mod.lin", "first.bias"])
def test_whole_numbers_are_no_weights(tensors, tmp_path, dtype, name):
    path = saved(tmp_path / "f.safetensors", {**tensors, name: tensors[name].to(dtype)})
    with pytest.raises(CheckpointError, match=r"stores .* as (u?int\d+|bool); expected floating"):
        load_transformer(path)


def test_whole_numbers_in_other_parts(models, tmp_path):
    for file, name, load in (
        ("text_encoders/qwen3vl_tiny.safetensors", "model.layers.0.mlp.up_proj.weight",
         load_text_encoder),
        ("vae/qwen_image_vae_tiny.safetensors", "conv2.weight", load_vae),
    ):  # fmt: skip
        tensors = load_file(models / file)
        path = saved(tmp_path / "f.safetensors", {**tensors, name: tensors[name].to(torch.int64)})
        with pytest.raises(CheckpointError, match="as int64; expected floating"):
            load(path)


@pytest.mark.parametrize("listed", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("named", ["", "model.diffusion_model."])
def test_lists_of_quantised_layers_under_any_prefix(tensors, tmp_path, listed, named):
    stored, _, metadata = formats.float8(tensors, "header")
    expected = load_transformer(saved(tmp_path / "plain.safetensors", stored, metadata))
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    layers = {"layers": {listed + layer: value for layer, value in layers.items()}}
    renamed = {named + name: tensor for name, tensor in stored.items()}
    path = saved(
        tmp_path / "f.safetensors", renamed, {"_quantization_metadata": json.dumps(layers)}
    )
    found = load_transformer(path)
    assert torch.equal(found.blocks[0].attn.wq.weight, expected.blocks[0].attn.wq.weight)


def test_a_list_of_layers_takes_linear_time():
    def read(count):
        names = [f"blocks.{i}.attn.wq" for i in range(count)]
        keys = (f"model.diffusion_model.{n}.weight" for n in names)
        layers = json.dumps({"layers": {n: {"format": "float8_e4m3fn"} for n in names}})
        tensors = dict.fromkeys(keys, torch.ones(1, 1))
        return normalise_metadata(tensors, {"_quantization_metadata": layers}, "f")

    assert len(read(1_000)) == 2_000
    assert_linear(read, 250)


@pytest.mark.parametrize("shape", ["[1e999, 2]", "[-1, 2]", "[true]", '["3"]', "[1.5]", "3", "null",
                                   "[9223372036854775808]", "[[1]]"])  # fmt: skip
def test_shapes_that_are_none(tmp_path, shape):
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'.encode()
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="f.safetensors is incomplete"):
        read_shapes(path)


@pytest.mark.parametrize("metadata", [{"krea2.mu": "nan"}, {"krea2.guidance": "inf"},
                                      {"krea2.steps": "0"}, {"krea2.size": "-8"},
                                      {"krea2.steps": "9" * 5000}])  # fmt: skip
def test_sampling_defaults_that_cannot_be(tensors, tmp_path, metadata):
    metadata = {"krea2.steps": "8"} | metadata
    with pytest.raises(CheckpointError, match="carries unreadable sampling defaults"):
        load_transformer(saved(tmp_path / "f.safetensors", tensors, metadata))


@pytest.mark.parametrize("place", ["_orig_mod.{}", "model.diffusion_model._orig_mod.{}"])
def test_a_model_saved_while_compiled(tensors, tmp_path, place):
    renamed = {place.format(name): tensor for name, tensor in tensors.items()}
    by_block = {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in tensors.items()}
    for stored in (renamed, by_block):
        model = load_transformer(saved(tmp_path / "f.safetensors", stored))
        assert torch.equal(model.first.weight, tensors["first.weight"])
