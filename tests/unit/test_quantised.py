"""Quantised files without ComfyUI: their numbers, and what cannot be read."""

import json
import shutil
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
import tiny_checkpoints as tiny
from krea2_model import CheckpointError, load_text_encoder, load_transformer
from krea2_model.checkpoints.checkpoint import read_shapes
from krea2_model.checkpoints.gguf import dequantise as dequantise_gguf
from krea2_model.checkpoints.gguf import read_gguf
from krea2_model.checkpoints.transformer_keys import is_norm_or_table, module_to_official
from samples import saved
from work import count_events


def assert_holds(model, values, dtype=torch.float32):
    for name, weight in model.state_dict().items():
        expected = values[module_to_official(name)]
        expected = expected if is_norm_or_table(name) else expected.to(dtype)
        assert torch.equal(weight, expected.to(weight.dtype)), name


QUANTISED = {
    "fp8 with settings as tensors": lambda t: formats.float8(t, "tensors"),
    "fp8 with settings in the header": lambda t: formats.float8(t, "header"),
    "fp8 with the old marker": lambda t: formats.float8(t, "marker"),
    "fp8 with the old marker, full": lambda t: formats.float8(t, "marker, full"),
    "plain fp8": lambda t: formats.float8(t, "plain"),
    "int8, a scale a row": lambda t: formats.int8(t),
    "int8, one scale": lambda t: formats.int8(t, rows=False),
    "int8 convrot": lambda t: formats.int8(t, group=256),
    "int8 convrot, small groups": lambda t: formats.int8(t, group=16),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_files_are_read(tensors, tmp_path, name, prefix):
    stored, values, metadata = QUANTISED[name](tensors)
    path = saved(tmp_path / "f.safetensors", {prefix + n: t for n, t in stored.items()}, metadata)
    model = load_transformer(path, dtype=torch.float32)
    if "convrot" in name:
        for key, weight in model.state_dict().items():
            torch.testing.assert_close(weight, values[module_to_official(key)].float(),
                                       atol=1e-6, rtol=1e-5)  # fmt: skip
    else:
        assert_holds(model, values)
    # Without a wish, what was quantised comes in bfloat16.
    assert load_transformer(path).blocks[0].attn.wq.weight.dtype == torch.bfloat16


FORMS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
         "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_gguf_files_are_read(tensors, tmp_path, form):
    path = tmp_path / "krea2_turbo.gguf"
    strays = ("last.down.weight", "last.up.weight")
    values = formats.gguf_file(tensors, path, form, strays=strays)
    model = load_transformer(path, dtype=torch.float32)
    assert_holds(model, values)
    assert model.variant == "turbo"


def test_gguf_by_content_and_not_by_name(tensors, tmp_path):
    values = formats.gguf_file(tensors, tmp_path / "a.gguf", "Q8_0")
    shutil.move(tmp_path / "a.gguf", tmp_path / "misnamed.safetensors")
    assert_holds(load_transformer(tmp_path / "misnamed.safetensors", dtype=torch.float32), values)


@pytest.mark.parametrize("names", ["Hugging Face", "llama.cpp"])
def test_gguf_text_encoders(tmp_path, names):
    tensors = tiny.text_encoder_tensors()
    renamed = dict(tensors)
    if names == "llama.cpp":
        parts = {
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd",
            "model.norm": "output_norm", "model.layers": "blk",
        }  # fmt: skip
        renamed = {}
        for name, tensor in tensors.items():
            for theirs, short in parts.items():
                name = name.replace(theirs, short)
            if "visual" not in name:
                renamed[name] = tensor
    path = tmp_path / "qwen3vl.gguf"
    part = "blk." if names == "llama.cpp" else "model.layers."
    formats.gguf_file(renamed, path, "Q8_0", part=part, architecture="qwen3vl")
    plain = tmp_path / "plain.safetensors"
    save_file(tensors, plain)
    found = load_text_encoder(path, dtype=torch.float32).state_dict()
    expected = load_text_encoder(plain, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        scale = weight.abs().max()
        assert (found[name] - weight).abs().max() <= 0.01 * scale, name


def test_other_formats_name_themselves(tensors, tmp_path):
    stored, _, _ = formats.float8(tensors)
    settings = formats.settings_tensor({"format": "nvfp4"})
    for name in [name for name in stored if name.endswith(".comfy_quant")]:
        stored[name] = settings.clone()
    path = saved(tmp_path / "nvfp4.safetensors", stored)
    with pytest.raises(CheckpointError, match="nvfp4, which"):
        load_transformer(path)


def test_a_list_of_layers_that_are_not_there_is_refused(tensors, tmp_path):
    stored, _, _ = formats.float8(tensors)
    metadata = {"_quantization_metadata": json.dumps({"layers": {"blocks.9.x": {}}})}
    with pytest.raises(CheckpointError, match="lists 'blocks.9.x'"):
        load_transformer(saved(tmp_path / "f.safetensors", stored, metadata))


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"layers": 5}'])
def test_unreadable_settings_are_refused(tensors, tmp_path, text):
    stored, _, _ = formats.float8(tensors, "header")
    with pytest.raises(CheckpointError, match="unreadable list of quantised"):
        load_transformer(
            saved(tmp_path / "f.safetensors", stored, {"_quantization_metadata": text})
        )
    layer = next(name for name in stored if name.endswith(".weight_scale"))
    name = layer.replace(".weight_scale", ".comfy_quant")
    stored[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    if text != '{"layers": 5}':
        with pytest.raises(CheckpointError, match="no readable settings"):
            load_transformer(saved(tmp_path / "f.safetensors", stored))


def broken_gguf(path, tensors, how):
    formats.gguf_file(tensors, path, "Q8_0")
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "header only":
        content = content[:12]
    elif how == "type id":
        name = b"blocks.0.attn.wq.weight"
        place = content.index(name) + len(name) + 4 + 16
        content[place : place + 4] = (250).to_bytes(4, "little")
    elif how == "counts":
        content[8:24] = b"\xff" * 7 + b"\x0f" + b"\xff" * 7 + b"\x0f"
    elif how == "shape":
        name = b"blocks.0.attn.wq.weight"
        place = content.index(name) + len(name) + 4
        content[place : place + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["truncated", "header only", "type id", "counts", "shape"])
def test_broken_gguf_files_are_refused(tensors, tmp_path, how):
    path = broken_gguf(tmp_path / "broken.gguf", tensors, how)
    with pytest.raises(CheckpointError, match="broken.gguf"):
        load_transformer(path)


def raw_gguf(path, name, type_id, sides, data=b"", values=()):
    """A GGUF file of one tensor, byte by byte: also what no writer would write."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(values))
    for key, kind, content in values:
        header += text(key) + struct.pack("<I", kind) + content
    header += text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, type_id, 0)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


@pytest.mark.parametrize("type_id, name", [(15, "Q8_K"), (99, "format 99"), (26, "I32")])
def test_a_gguf_format_without_numbers_is_named(tmp_path, type_id, name):
    path = raw_gguf(tmp_path / "new.gguf", "first.weight", type_id, (256, 4), b"\0" * 8192)
    with pytest.raises(CheckpointError, match=f"first.weight as {name}"):
        read_gguf(path)


FURTHER = ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M",
           "TQ1_0", "TQ2_0", "MXFP4"]  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_further_gguf_formats_through_the_package(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 64, (6, 512 // values * size), dtype=np.uint8)
    path = raw_gguf(tmp_path / "m.gguf", "a.weight", kind.value, (512, 6), blocks.tobytes())
    tensor = read_gguf(path)[0]["a.weight"]
    expected = torch.from_numpy(gguf.dequantize(blocks, kind).reshape(6, 512).copy())
    assert tensor.format == name and tensor.shape == (6, 512)
    assert torch.equal(tensor.dequantise().nan_to_num(), expected.nan_to_num())
    assert torch.equal(dequantise_gguf(tensor.data[2:4], name, (2, 512)).nan_to_num(),
                       expected[2:4].nan_to_num())  # fmt: skip


@pytest.mark.parametrize("form", ["F32", "F16", "Q8_0"])
def test_a_tensor_stored_in_rows_of_256_has_its_own_shape(tensors, tmp_path, form):
    """As city96's converter stores what blocks do not divide: Krea 2's input layer, 64 wide."""
    weight = tensors["first.weight"].float()
    plain, rows = tmp_path / "plain.gguf", tmp_path / "rows.gguf"
    for path in (plain, rows):
        writer = gguf.GGUFWriter(path, "krea2")
        for name, tensor in tensors.items():
            array = tensor.float().numpy()
            kind = gguf.GGMLQuantizationType.F32
            if name == "first.weight":
                kind = gguf.GGMLQuantizationType[form]
                if path == rows:
                    array = array.reshape(-1, 256)
                    writer.add_array(f"comfy.gguf.orig_shape.{name}", list(weight.shape))
                array = gguf.quantize(array, kind)
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = load_transformer(rows, dtype=torch.float32).first.weight
    assert torch.equal(found, load_transformer(plain, dtype=torch.float32).first.weight)
    assert read_shapes(rows)["first.weight"] == tuple(weight.shape)


def test_rows_of_256_without_their_shape_are_refused_with_the_right_one(tensors, tmp_path):
    stored = dict(tensors)
    stored["first.weight"] = tensors["first.weight"].reshape(-1, 256)
    path = saved(tmp_path / "f.safetensors", stored)
    with pytest.raises(CheckpointError, match=r"first.weight is \(64, 256\); expected \(256, 64\)"):
        load_transformer(path)


def test_an_original_shape_of_other_values_is_refused(tmp_path):
    shape = struct.pack("<IQii", 5, 2, 4, 65)
    values = [("comfy.gguf.orig_shape.a.weight", 9, shape)]
    path = raw_gguf(tmp_path / "m.gguf", "a.weight", 0, (256, 1), b"\0" * 1024, values)
    with pytest.raises(
        CheckpointError, match=r"a.weight is \(1, 256\), and its original shape \(4,"
    ):
        read_gguf(path)


@pytest.mark.parametrize("kind", ["numbers", "texts", "arrays"])
def test_a_vocabulary_in_the_header_is_stepped_over(tmp_path, kind):
    count = 20_000
    content = {
        "numbers": struct.pack("<IQ", 5, count) + b"\0" * 4 * count,
        "texts": struct.pack("<IQ", 8, count) + (struct.pack("<Q", 3) + b"abc") * count,
        "arrays": struct.pack("<IQ", 9, 1000) + (struct.pack("<IQ", 5, 2) + b"\0" * 8) * 1000,
    }[kind]
    path = raw_gguf(tmp_path / "m.gguf", "a.weight", 0, (4, 1), b"\0" * 16,
                    [("tokenizer.ggml.tokens", 9, content)])  # fmt: skip
    assert read_shapes(path) == {"a.weight": (1, 4)}
    tracemalloc.start()
    read_shapes(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # 131 MB when each value was an object
    # A text has a length to read, numbers have none; none becomes an object, or is parsed.
    assert count_events(lambda: read_shapes(path)) < 20 * count


def test_without_the_gguf_package_the_error_says_how_to_install_it(tensors, tmp_path, monkeypatch):
    formats.gguf_file(tensors, tmp_path / "model.gguf", "Q8_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        load_transformer(tmp_path / "model.gguf")


def test_old_names_load_file_untouched(tensors, tmp_path):
    """Reading renames in memory alone."""
    stored, _, metadata = formats.float8(tensors, "marker")
    path = saved(tmp_path / "f.safetensors", stored, metadata)
    before = path.read_bytes()
    load_transformer(path)
    assert path.read_bytes() == before and load_file(path).keys() == stored.keys()
