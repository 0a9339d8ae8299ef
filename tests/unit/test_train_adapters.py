"""Adapters: they begin as nothing, learn, and mean the same in the files of every trainer."""

import pytest
import torch

from diffusers_reference import TINY, diffusers_transformer, random_transformer
from krea2_model.lora.files import read_lora
from krea2_model.lora.updates import LoraStack
from krea2_training.config import read_config
from krea2_training.settings.sections import KEY_STYLES, Adapter, Memory
from krea2_training.weights.adapters import (
    adapters_of,
    add_adapters,
    file_tensors,
    set_strength,
    targeted,
)
from krea2_training.weights.base import FrozenLinear, TrainingBackend, four_bits, freeze_base
from trained_adapters import trained

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return random_transformer(TINY)


def inputs(model):
    generator = torch.Generator().manual_seed(3)
    config = model.config
    latents = torch.randn(2, 16, 6, 8, generator=generator)
    text = torch.randn(2, 5, config.hidden_size, generator=generator)
    return latents, torch.tensor([0.3, 0.8]), text


@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("style", KEY_STYLES)
def test_a_file_gives_what_was_trained(model, method, style):
    magnitude = "rows" if style == "diffusers" else "columns"
    settings = Adapter(method, rank=4, alpha=6.0, targets="blocks+text", magnitude=magnitude)
    reference = random_transformer(TINY)
    before = reference(*inputs(reference))
    add_adapters(model, settings)
    first = model(*inputs(model))
    torch.testing.assert_close(first, before, atol=1e-5, rtol=1e-5)
    model = random_transformer(TINY)
    after = trained(model, settings)(*inputs(model))
    assert (after - before).abs().max() > 1e-3
    tensors = file_tensors(adapters_of(model), style)
    stack = LoraStack(reference)
    updates, _, report = read_lora(tensors, stack.shapes, "trained.safetensors")
    assert report.is_complete, str(report)
    assert updates.keys() == {f"{name}.weight" for name in adapters_of(model)}
    stack.add((updates, 1.0))
    torch.testing.assert_close(reference(*inputs(reference)), after, atol=2e-5, rtol=1e-4)
    set_strength(model, 0.0)
    torch.testing.assert_close(model(*inputs(model)), before, atol=1e-5, rtol=1e-5)


def test_targets(model):
    names = {targets: set(targeted(model, targets)) for targets in ("blocks", "attention", "mlp")}
    assert len(names["blocks"]) == 8 * model.config.num_layers
    assert names["attention"] | names["mlp"] == names["blocks"]
    with_text = set(targeted(model, "blocks+text")) - names["blocks"]
    assert "txtmlp.1" in with_text and "txtfusion.refiner_blocks.0.attn.wq" in with_text
    assert not any("projector" in name for name in with_text)


def test_diffusers_and_peft_load_the_file(model):
    trained(model, Adapter(rank=4, alpha=6.0))
    tensors = file_tensors(adapters_of(model), "diffusers")
    theirs = diffusers_transformer()
    theirs.load_lora_adapter(tensors, prefix="transformer", adapter_name="ours")
    changes = {
        name: module.get_delta_weight("ours")
        for name, module in theirs.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(changes) == 8 * model.config.num_layers
    for ours, name in (("attn.wq", "attn.to_q"), ("mlp.down", "ff.down")):
        adapter = model.get_submodule(f"blocks.1.{ours}")
        expected = adapter.scale * (adapter.up @ adapter.down)
        torch.testing.assert_close(changes[f"transformer_blocks.1.{name}"], expected)


@pytest.mark.parametrize("offload", [False, True])
def test_a_frozen_base_gives_the_gradients_of_a_plain_one(model, offload):
    gradients = []
    for frozen in (False, True):
        model = random_transformer(TINY)
        if frozen:
            freeze_base(model, Memory(offload=offload), CPU)
            assert isinstance(model.blocks[0].attn.wq, FrozenLinear)
        trained(model, Adapter(rank=4))
        backend = {"backend": TrainingBackend()} if frozen else {}
        model(*inputs(model), **backend).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, held = gradients
    assert plain.keys() == held.keys() and len(plain) == 16 * model.config.num_layers
    for name in plain:
        torch.testing.assert_close(held[name], plain[name], atol=1e-7, rtol=1e-5)


def test_autograd_holds_no_dequantised_weight(model):
    freeze_base(model, Memory(base="fp8"), CPU)
    add_adapters(model, Adapter(rank=4))
    largest = max(layer.in_features * layer.out_features
                  for layer in model.modules() if isinstance(layer, FrozenLinear))  # fmt: skip
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs(model))
    matrices = {(layer.out_features, layer.in_features)
                for layer in model.modules() if isinstance(layer, FrozenLinear)}  # fmt: skip
    assert saved and largest
    assert not matrices & {shape[-2:] for shape in saved if len(shape) == 2}


@pytest.mark.parametrize(
    "base, most", [("bf16", 0.004), ("fp8", 0.05), ("int8", 0.02), ("4bit", 0.12)]
)
def test_bases_are_close_to_the_weights(model, base, most):
    plain = model.blocks[0].mlp.up.weight.detach().clone()
    freeze_base(model, Memory(base=base), CPU)
    layer = model.blocks[0].mlp.up
    error = (layer.weight_for(plain) - plain).norm() / plain.norm()
    assert 0 < error < most
    hidden = torch.randn(3, plain.shape[1], requires_grad=True)
    layer(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, layer.weight_for(plain).sum(0).expand(3, -1))


def test_four_bits_are_those_of_the_gguf_package():
    import gguf

    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    ours = four_bits(weight)
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.quantize(weight.numpy(), kind)
    assert (ours.tensors["weight"].numpy() == theirs).mean() > 0.99  # rounding of halves differs
    values = torch.from_numpy(gguf.quants.dequantize(ours.tensors["weight"].numpy(), kind))
    torch.testing.assert_close(ours.dequantise(torch.float32), values)


def test_a_dora_has_the_lengths_that_readers_of_its_file_expect(model):
    chosen = {}
    for style in KEY_STYLES:
        settings = {"output.key_style": style, "output.path": "a.safetensors",
                    "adapter.method": "dora", "data.path": ".",
                    "model.transformer": "nano"}  # fmt: skip
        chosen[style] = read_config(None, settings).adapter.magnitude
    assert chosen == {"ai-toolkit": "columns", "kohya": "columns", "diffusers": "rows"}
    wrong = {**settings, "adapter.magnitude": "columns"}  # of the last style, before any step
    with pytest.raises(ValueError, match="adapter.magnitude is columns; expected rows, or none"):
        read_config(None, wrong)
    trained(model, Adapter("dora", rank=4, magnitude="rows"))
    with pytest.raises(ValueError, match="Train with adapter.magnitude columns"):
        file_tensors(adapters_of(model), "kohya")
