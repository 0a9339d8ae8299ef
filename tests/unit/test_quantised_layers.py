"""Quantised layers: the numbers of plain ones, in the memory of the file."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
import tiny_checkpoints as tiny
from krea2_model import load_text_encoder, load_transformer
from krea2_model.checkpoints.checkpoint import open_checkpoint
from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.checkpoints.quantised_weight import QuantisedWeight
from krea2_model.checkpoints.transformer import save_transformer
from krea2_model.lora.files import read_lora
from krea2_model.lora.updates import LoraStack
from krea2_model.tools.convert import convert
from live_bytes import LiveBytes
from parity import assert_close


def branched(tensors):
    stored, values, metadata = formats.float8(tensors)
    layer = "blocks.0.attn.wq"
    generator = torch.Generator().manual_seed(5)
    rows, columns = tensors[f"{layer}.weight"].shape
    stored[f"{layer}.svdq_l1"] = torch.randn(rows, 4, generator=generator).bfloat16() * 0.1
    stored[f"{layer}.svdq_l2"] = torch.randn(4, columns, generator=generator).bfloat16() * 0.1
    stored[f"{layer}.pre_quant_scale"] = torch.rand(columns, generator=generator) + 0.5
    return stored, values, metadata


FORMS = {
    "fp8": formats.float8,
    "plain fp8": lambda t: formats.float8(t, "plain"),
    "fp8 with a branch": branched,
    "int8 convrot": lambda t: formats.int8(t, group=256),
    "Q8_0": "Q8_0",
    "Q4_K": "Q4_K",
}


@pytest.fixture
def file(tensors, tmp_path, request):
    """A quantised file of the form that the test names."""
    write = FORMS[request.param]
    if isinstance(write, str):
        formats.gguf_file(tensors, tmp_path / "krea2_turbo.gguf", write)
        return tmp_path / "krea2_turbo.gguf"
    stored, _, metadata = write(tensors)
    path = tmp_path / "krea2_turbo.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path, metadata)
    return path


def layers_of(model):
    return {n: part for n, part in model.named_modules() if isinstance(part, QuantisedLinear)}


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    config, dtype = model.config, model.compute_dtype
    taps = torch.randn(1, 7, 12, config.text_hidden_dim, generator=generator, dtype=torch.float32)
    latents = torch.randn(1, 16, 8, 8, generator=generator)
    return latents, torch.tensor([0.7]), taps.to(dtype)


@torch.no_grad()
def velocity(model):
    latents, time, taps = inputs(model)
    return model(latents, time, model.fuse_text(taps))


@pytest.mark.parametrize("file", FORMS, indirect=True)
def test_numbers_are_those_of_plain_weights_to_the_bit(file):
    plain = load_transformer(file)
    quantised = load_transformer(file, keep_quantised=True)
    layers = layers_of(quantised)
    assert layers.keys() >= {f"blocks.1.{n}" for n in ("attn.wq", "attn.gate", "mlp.down")}
    for name, layer in layers.items():
        assert torch.equal(layer.weight, plain.get_submodule(name).weight), name
    assert torch.equal(velocity(quantised), velocity(plain))
    assert quantised.compute_dtype == plain.compute_dtype


def test_a_matrix_is_the_same_in_one_run_of_rows_or_many(monkeypatch):
    for form, group in (("float8_e4m3fn", None), ("int8_tensorwise", 16)):
        data = torch.randint(-100, 100, (960, 64), dtype=torch.int8)
        stored = {"weight": data, "weight_scale": torch.rand(960, 1)}
        if form.startswith("float8"):
            stored["weight"] = data.to(torch.float8_e4m3fn)
        weight = QuantisedWeight(form, (960, 64), stored, group)
        expected = weight.dequantise(torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr("krea2_model.checkpoints.quantised_weight.VALUES_AT_A_TIME", 64 * 25)
            with LiveBytes() as counted:
                found = weight.dequantise(torch.bfloat16)
            assert counted.peak < 960 * 64 * 2 + 5 * 64 * 25 * 4
        assert torch.equal(found, expected)


@pytest.mark.parametrize("file", ["Q8_0"], indirect=True)
def test_loading_never_holds_the_plain_weights(file):
    checkpoint = open_checkpoint(file, "transformer")
    with LiveBytes() as counted:
        model = load_transformer(checkpoint, keep_quantised=True)
    plain = 2 * sum(layer.in_features * layer.out_features for layer in layers_of(model).values())
    # What is stored in float32, as files of blocks have all else, is cast.
    wide = [t for t in checkpoint.tensors.values() if getattr(t, "dtype", 0) == torch.float32]
    cast = 2 * sum(tensor.numel() for tensor in wide)
    assert counted.peak < 0.2 * plain + 1.1 * cast
    with LiveBytes() as counted:
        load_transformer(checkpoint)
    assert counted.peak > 0.9 * plain
    with LiveBytes() as counted:
        velocity(model)
    largest = 2 * max(layer.in_features * layer.out_features for layer in layers_of(model).values())
    assert counted.peak < 8 * largest < 0.8 * plain


@pytest.mark.parametrize("file", ["fp8", "Q8_0"], indirect=True)
def test_moving_and_casting_leave_what_is_stored(file):
    model = load_transformer(file, keep_quantised=True)
    name, layer = next(iter(layers_of(model).items()))
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    expected = load_transformer(file, dtype=torch.float32).get_submodule(name).weight
    model.to(torch.float32)
    assert layer.dtype == torch.float32 and torch.equal(layer.weight, expected)
    for key, tensor in layer.state_dict().items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor.float(), before[key].float())
    assert velocity(model).dtype == torch.float32
    model.to("meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert layer.weight.is_meta and layer.weight.dtype == torch.float32


@pytest.mark.parametrize("file", ["fp8 with a branch", "int8 convrot", "Q8_0"], indirect=True)
def test_saved_files_hold_the_same_numbers(file, tmp_path):
    model = load_transformer(file, keep_quantised=True)
    save_transformer(model, tmp_path / "saved.safetensors")
    again = load_transformer(tmp_path / "saved.safetensors", keep_quantised=True)
    assert torch.equal(velocity(again), velocity(model))
    assert again.variant == "turbo"
    # Blocks of GGUF are none of safetensors' formats.
    assert bool(layers_of(again)) == (file.suffix != ".gguf")


@pytest.mark.parametrize("file", ["Q8_0"], indirect=True)
def test_converted_files_are_plain(file, tmp_path):
    target = tmp_path / "plain.safetensors"
    convert(file, target)
    assert {t.dtype for t in load_file(target).values()} <= {torch.bfloat16, torch.float32}
    assert not layers_of(load_transformer(target, keep_quantised=True))


def test_quantised_text_encoders(tmp_path, monkeypatch):
    monkeypatch.setattr("krea2_model.checkpoints.text_encoder._tokenizer_for", lambda *_: None)
    config = replace(tiny.TEXT_ENCODER, vocab_size=200)
    encoder = tiny.text_encoder_tensors(config)
    stored, _, _ = formats.float8(encoder, part="layers.")
    save_file(stored, tmp_path / "fp8.safetensors")
    plain = load_text_encoder(tmp_path / "fp8.safetensors")
    quantised = load_text_encoder(tmp_path / "fp8.safetensors", keep_quantised=True)
    assert len(layers_of(quantised)) == 7 * quantised.config.num_tapped_layers
    tokens = torch.arange(100, 130)[None]
    with torch.no_grad():
        assert torch.equal(quantised(tokens), plain(tokens))


def updates_for(model, kind, name):
    """A LoRA of a kind on every weight of the first block, of sizes that show."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return 0.05 * torch.randn(shape, generator=generator)

    shapes, tensors = LoraStack(model).shapes, {}
    for weight, shape in shapes.items():
        if not weight.startswith("blocks.0.") or len(shape) != 2:
            continue
        layer, (rows, columns) = f"diffusion_model.{weight.removesuffix('.weight')}", shape
        if kind in ("lora", "dora"):
            tensors[f"{layer}.lora_A.weight"] = random(4, columns)
            tensors[f"{layer}.lora_B.weight"] = random(rows, 4)
            if kind == "dora":
                tensors[f"{layer}.dora_scale"] = 1 + random(rows, 1).abs()
        elif kind == "lokr":
            tensors[f"{layer}.lokr_w1"] = random(2, 2)
            tensors[f"{layer}.lokr_w2"] = random(rows // 2, columns // 2)
        else:
            tensors[f"{layer}.diff"] = random(rows, columns)
    return read_lora(tensors, shapes, name)[0]


@pytest.mark.parametrize(
    "file, kind",
    [("fp8", "lora"), ("Q4_K", "lora"), ("fp8", "dora"), ("Q4_K", "lokr"), ("fp8", "diff")],
    indirect=["file"],
)
def test_loras_are_added_at_use_and_taken_out_exactly(file, kind):
    plain = load_transformer(file, dtype=torch.float32)
    model = load_transformer(file, dtype=torch.float32, keep_quantised=True)
    before = velocity(model)
    stacks = LoraStack(plain), LoraStack(model)
    assert stacks[0].shapes == stacks[1].shapes
    for stack in stacks:
        first = stack.add((updates_for(model, kind, "a"), 0.8))
        second = stack.add((updates_for(model, "lora", "b"), -0.5))
    layer, merged = model.blocks[0].attn.wq, plain.blocks[0].attn.wq.weight
    # The same formulas: merged into the plain weight, and applied to it at use.
    assert torch.equal(layer.weight, merged)
    assert ("lora_down" in layer._buffers) == (kind == "lora")
    changed = velocity(plain)
    assert_close(velocity(model), changed, 1e-5, f"{kind} beside quantised weights")
    assert (before - changed).abs().max() > 1e-3
    assert not [name for name in model.state_dict() if "lora" in name]
    stacks[1].restore(second)
    stacks[1].restore(first)
    assert torch.equal(velocity(model), before)
    stacks[1].add((updates_for(model, kind, "a"), 0.8))
    stacks[1].clear()
    assert torch.equal(velocity(model), before)
    assert not [name for name, _ in model.named_buffers() if "lora" in name]


@pytest.mark.parametrize("file", ["fp8"], indirect=True)
def test_a_changed_model_is_saved_merged(file, tmp_path):
    model = load_transformer(file, keep_quantised=True)
    LoraStack(model).add((updates_for(model, "lora", "a"), 1.0))
    save_transformer(model, tmp_path / "merged.safetensors")
    again = load_transformer(tmp_path / "merged.safetensors", keep_quantised=True)
    assert torch.equal(again.blocks[0].attn.wq.weight, model.blocks[0].attn.wq.weight)
    assert layers_of(model).keys() - layers_of(again).keys() == {
        name for name in layers_of(model) if name.startswith("blocks.0.")
    }


@pytest.mark.parametrize("file", ["fp8"], indirect=True)
def test_a_lora_that_makes_a_weight_infinite_changes_nothing(file):
    model = load_transformer(file, dtype=torch.float16, keep_quantised=True)
    stack, expected = LoraStack(model), velocity(model)
    with pytest.raises(ValueError, match="infinite in torch.float16"):
        stack.add((updates_for(model, "lora", "a"), 1e7))
    assert torch.equal(velocity(model), expected)
