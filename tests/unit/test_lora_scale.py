"""The scale of a LoRA from its file's header, beside diffusers' own Krea 2 loader and PEFT."""

import json

import pytest
import torch
from diffusers import Krea2Pipeline as DiffusersPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from diffusers_reference import TINY, diffusers_transformer
from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.checkpoints.transformer_keys import diffusers_to_official, official_to_module
from krea2_model.lora.files import read_lora, read_lora_file
from krea2_model.transformer.model import Krea2Transformer
from parity import assert_close

LAYERS = ["to_q", "to_k", "img_in", "down"]
CONFIGS = {
    "alpha above the rank": {"r": 4, "lora_alpha": 16},
    "alpha below the rank": {"r": 4, "lora_alpha": 2},
    "rank-stabilised": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 2, "to_k": 3},
        "alpha_pattern": {r"^transformer_blocks\.1\.attn.to_q": 1, "ff.down": 12, "img_in": 5},
    },
    "expressions": {"r": 4, "lora_alpha": 8, "alpha_pattern": {r".*attn\.to_[qk]": 3}},
    "rank-stabilised patterns": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"to_k": 6},
        "rank_pattern": {"to_q": 2},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return diffusers_transformer()


SHAPES = {
    name: tuple(tensor.shape)
    for name, tensor in Krea2Transformer(TINY, device="meta").state_dict().items()
}


def differences(path):
    tensors, metadata = read_lora_file(path)
    updates, _, report = read_lora(tensors, SHAPES, path.name, metadata=metadata)
    assert not report.unmatched
    return {name: update.difference() for name, (update,) in updates.items()}, report


def written_by_diffusers(reference, folder, **config):
    """A file of diffusers' own, with random matrices, as its training script saves it."""
    reference.add_adapter(LoraConfig(target_modules=LAYERS, **config), "default")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    DiffusersPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(reference),
        **_collate_lora_metadata({"transformer": reference}),
    )
    reference.delete_adapters("default")
    return folder / "pytorch_lora_weights.safetensors"


def applied_by_diffusers(reference, path):
    """What diffusers' loader adds to each weight."""
    state, metadata = DiffusersPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    DiffusersPipeline.load_lora_into_transformer(
        state, reference, adapter_name="read", metadata=metadata
    )
    found = {}
    for name, module in reference.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = official_to_module(diffusers_to_official(f"{name}.weight"))
            found[weight] = module.get_delta_weight("read").detach()
    reference.delete_adapters("read")
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_as_diffusers_reads_it(reference, tmp_path, config):
    path = written_by_diffusers(reference, tmp_path, **config)
    expected = applied_by_diffusers(reference, path)
    found, report = differences(path)
    assert found.keys() == expected.keys() and len(found) > 5
    for name, difference in expected.items():
        assert_close(found[name], difference, 1e-5, name)
    assert "lora_adapter_metadata in the header" in str(report)


def pair(rank=4, prefix="transformer.transformer_blocks.0.attn.to_q.", down="lora_A", up="lora_B"):
    return {f"{prefix}{down}.weight": torch.ones(rank, 128), f"{prefix}{up}.weight":
            torch.ones(128, rank)}  # fmt: skip


def scale_of(tensors, metadata, tmp_path, name="file.safetensors"):
    path = tmp_path / name
    save_file(tensors, path, metadata)
    found, report = differences(path)
    (difference,) = found.values()
    return float(difference[0, 0]) / 4, str(report)


def flat(**settings):
    return {"lora_adapter_metadata": json.dumps(settings)}


KOHYA = {"prefix": "lora_unet_blocks_0_attn_wq.", "down": "lora_down", "up": "lora_up"}
ALPHA = {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(2.0)}
FIELDS = {
    "SimpleTuner, flat": (pair(), flat(r=4, lora_alpha=16), 4.0),
    "SimpleTuner, rank-stabilised": (pair(), flat(r=4, lora_alpha=4, use_rslora=True), 2.0),
    "without alpha, PEFT's own": (pair(), flat(r=4), 2.0),
    "another part's": (pair(), flat(**{"text_encoder.lora_alpha": 16}), 1.0),
    "nested": (pair(), flat(transformer={"r": 4, "lora_alpha": 2}), 0.5),
    "a tensor wins": (pair() | ALPHA, flat(r=4, lora_alpha=16), 0.5),
    "in the header itself": (pair(), {"lora_rank": "4", "lora_alpha": "16"}, 4.0),
    "kohya": (pair(**KOHYA), {"ss_network_dim": "4", "ss_network_alpha": "1.0"}, 0.25),
    "kohya, rank-stabilised": (
        pair(**KOHYA),
        {"ss_network_alpha": "1.0", "ss_network_args": '{"rs_lora": "True"}'},
        0.5,
    ),
    "kohya without a number": (pair(**KOHYA), {"ss_network_alpha": "None"}, 1.0),
    # musubi-tuner's conversion to these names has multiplied alpha in.
    "kohya's header, converted": (pair(), {"ss_network_alpha": "1.0"}, 1.0),
    "nothing": (pair(), {}, 1.0),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_trainers(tmp_path, name):
    tensors, metadata, expected = FIELDS[name]
    found, report = scale_of(tensors, metadata, tmp_path)
    assert found == pytest.approx(expected, rel=1e-6)
    assert f"scale {expected:g} (" in report


def test_peft_folder(tmp_path):
    """adapter_config.json counts beside the name that PEFT gives the weights, and no other."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    tensors = pair(prefix="base_model.model.blocks.0.attn.wq.")
    found, report = scale_of(tensors, {}, tmp_path, "adapter_model.safetensors")
    assert found == 4.0 and "adapter_config.json" in report
    assert scale_of(tensors, {}, tmp_path)[0] == 1.0


@pytest.mark.parametrize(
    "settings",
    ["[]", "{", '{"lora_alpha": "many"}', '{"lora_alpha": 1e999}', '{"alpha_pattern": [1]}',
     '{"alpha_pattern": {"(a+)+$": 1}}', '{"alpha_pattern": {"[": 1}}', '{"r": true}',
     '{"alpha_pattern": {"to_q": null}}', "[" * 100_000],
)  # fmt: skip
def test_settings_that_cannot_be_read_are_refused(settings):
    with pytest.raises(CheckpointError, match="file: lora_adapter_metadata"):
        read_lora(pair(), SHAPES, "file",
                  metadata={"lora_adapter_metadata": settings})  # fmt: skip


def test_the_pipeline_applies_it(tmp_path):
    """Krea2Pipeline.load_lora and diffusers' load_lora_weights are one path to the header."""
    from krea2_model import Krea2Pipeline

    pipeline = Krea2Pipeline.nano()
    weight = pipeline.transformer.blocks[0].attn.wq.weight
    before, (rows, columns) = weight.clone(), weight.shape
    down, up = torch.randn(4, columns), 0.01 * torch.randn(rows, 4)
    layer = "transformer.transformer_blocks.0.attn.to_q."
    save_file(
        {f"{layer}lora_A.weight": down, f"{layer}lora_B.weight": up},
        tmp_path / "style.safetensors",
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})},
    )
    report = pipeline.load_lora(tmp_path / "style.safetensors", 0.5)
    assert_close(weight - before, 0.5 * 4 * up @ down, 1e-4, "header")
    assert report.scales == (4.0,)
