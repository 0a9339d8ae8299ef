"""LoRA files as PEFT, LyCORIS and diffusers write and apply them, on a small random transformer.

Each reference trains nothing: its matrices are random. What it calculates with its own layers is
compared with our transformer whose weights its file has changed.
"""

import copy

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict

from diffusers_reference import TINY, diffusers_transformer, load_from, run_reference
from krea2_model.lora.files import read_lora
from krea2_model.lora.updates import LoraStack
from krea2_model.transformer.model import Krea2Transformer
from parity import assert_close, relative_error

LATENTS = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
TAPS = torch.randn(1, 7, 12, TINY.text_hidden_dim, generator=torch.Generator().manual_seed(2))
TIMESTEP = torch.tensor([0.37])
LAYERS = ["first", "wq", "wk", "wv", "wo", "gate", "up", "down", "projector", "linear"]


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = Krea2Transformer(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.08)
    return model


@torch.no_grad()
def velocity(model):
    return model(LATENTS, TIMESTEP, model.fuse_text(TAPS))


def ours(transformer, tensors, strength=1.0):
    """The velocity with a file's tensors merged in, and its report."""
    model = copy.deepcopy(transformer)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    updates, _, report = read_lora(tensors, shapes, "file.safetensors")
    stack = LoraStack(model)
    stack.add((updates, strength))
    result = velocity(model)
    stack.clear()
    assert torch.equal(velocity(model), velocity(transformer))
    return result, report


def randomise(module, names, size=0.2):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if any(part in name for part in names):
            noise = torch.randn(parameter.shape, generator=generator)
            # Magnitudes (DoRA) begin as norms and stay positive.
            positive = any(part in name for part in ("magnitude", "dora_scale"))
            parameter.data = parameter * (1 + size * noise.abs()) if positive else size * noise


PEFT = {
    "LoRA": LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS),
    "LoRA of several ranks": LoraConfig(
        r=4, lora_alpha=4, rank_pattern={"wq": 2}, alpha_pattern={"wq": 2}, target_modules=LAYERS
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=LAYERS),
    "LoKr": LoKrConfig(r=4, alpha=4, target_modules=LAYERS),
    "LoKr, both factored": LoKrConfig(
        r=2, alpha=2, decompose_both=True, decompose_factor=8, target_modules=LAYERS
    ),
    "LoHa": LoHaConfig(r=4, alpha=4, target_modules=LAYERS),
}


@pytest.mark.parametrize("style", PEFT)
def test_peft(transformer, style):
    model = get_peft_model(copy.deepcopy(transformer), PEFT[style])
    randomise(model, ("lora_", "lokr_", "hada_"))
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    expected = velocity(model.base_model.model)
    found, report = ours(transformer, tensors)
    assert relative_error(expected, velocity(transformer)) > 1e-2
    assert_close(found, expected, 1e-5, f"{style} against PEFT")
    assert report.unmatched == {}, report
    assert "PEFT" in report.family


LYCORIS = {
    "LoRA": {"algo": "lora"},
    "LoRA with a scalar": {"algo": "lora", "use_scalar": True},
    "LoRA, rank-stabilised": {"algo": "lora", "rs_lora": True},
    "DoRA over rows": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "DoRA over columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "LoKr": {"algo": "lokr", "factor": 8},
    "LoKr, full matrices": {"algo": "lokr", "factor": 8, "full_matrix": True},
    "LoKr, both factored": {"algo": "lokr", "factor": 16, "decompose_both": True, "linear_dim": 2},
    "LoKr, unbalanced": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
    "LoKr with DoRA": {"algo": "lokr", "factor": 8, "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha"},
    "LoHa with DoRA": {"algo": "loha", "dora_wd": True},
    "full differences": {"algo": "full"},
    "OFT": {"algo": "diag-oft", "linear_dim": 8},
    "GLoRA": {"algo": "glora"},
}


_LYCORIS_PARAMETERS = ("lora_", "lokr_", "hada_", "dora_scale", "scalar", "oft_blocks",
                       "a1.", "a2.", "b1.", "b2.")  # fmt: skip


@pytest.mark.parametrize("style", LYCORIS)
def test_lycoris(transformer, style):
    model = copy.deepcopy(transformer)
    options = {"linear_dim": 4, "linear_alpha": 2, **LYCORIS[style]}
    LycorisNetwork.apply_preset({"target_module": ["Linear"], "unet_target_module": ["Linear"]})
    network = create_lycoris(model, 1.0, **options)
    network.apply_to()
    if style == "full differences":
        for module in network.loras:
            module.weight.data += 0.1 * torch.randn_like(module.weight)
        tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        # Its layers hide their weights from the model, so here it merges instead.
        network.restore()
        network.merge_to(1.0)
    else:
        randomise(network, _LYCORIS_PARAMETERS)
        tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = velocity(model)
    found, report = ours(transformer, tensors)
    assert relative_error(expected, velocity(transformer)) > 1e-2
    assert_close(found, expected, 1e-5, f"{style} against LyCORIS")
    assert report.unmatched == {}, report


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", "transformer."])
def test_diffusers(prefix):
    """A file in each spelling that diffusers' Krea 2 pipeline takes, at a scale."""
    from diffusers.loaders.lora_pipeline import Krea2LoraLoaderMixin

    reference = diffusers_transformer()
    transformer = Krea2Transformer(TINY).eval().requires_grad_(False)
    load_from(transformer, reference)
    names = ["blocks.0.attn.wq", "blocks.1.mlp.down", "txtfusion.refiner_blocks.0.attn.wo", "first"]
    if prefix == "transformer.":
        names = ["transformer_blocks.0.attn.to_q", "text_fusion.layerwise_blocks.1.ff.up", "img_in"]
    layers = {name: _layer(transformer, reference, name) for name in names}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = 0.3 * torch.randn(4, layer.in_features)
        tensors[f"{prefix}{name}.lora_B.weight"] = 0.3 * torch.randn(layer.out_features, 4)
    found, report = ours(transformer, tensors, strength=0.6)

    state = Krea2LoraLoaderMixin.lora_state_dict(dict(tensors))
    Krea2LoraLoaderMixin.load_lora_into_transformer(state, reference, adapter_name="one")
    reference.set_adapters(["one"], [0.6])
    with torch.no_grad():
        expected = run_reference(reference, LATENTS, TIMESTEP, TAPS)
    assert relative_error(expected, velocity(transformer)) > 1e-2
    assert_close(found, expected, 1e-5, f"{prefix} against diffusers")
    assert report.unmatched == {} and report.matched == len(names)


def _layer(transformer, reference, name):
    modules = dict(transformer.named_modules())
    return modules[name] if name in modules else reference.get_submodule(name)
