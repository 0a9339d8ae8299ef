"""LoRA files that hold nothing, no numbers or a layer twice, and those that fail halfway."""

import pytest
import torch
from safetensors.torch import save_file

from krea2_model import Krea2Pipeline
from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.lora.files import read_lora
from samples import random
from work import assert_linear

SHAPES = {"blocks.0.attn.wq.weight": (16, 16), "blocks.0.attn.wk.weight": (8, 16),
          "blocks.0.prenorm.scale.weight": (16,)}  # fmt: skip
QUERY = "diffusion_model.blocks.0.attn.wq"


def pair(layer=QUERY, rows=16, columns=16, rank=2):
    return {
        f"{layer}.lora_A.weight": random(rank, columns),
        f"{layer}.lora_B.weight": random(rows, rank),
    }


GOOD = pair("diffusion_model.blocks.0.attn.wk", rows=8)
UP = f"{QUERY}.lora_B.weight"
NOTHING = {
    "zero up": pair() | {UP: torch.zeros(16, 2)},
    "alpha 0": pair() | {f"{QUERY}.alpha": torch.tensor(0.0)},
    "zero difference": {f"{QUERY}.diff": torch.zeros(16, 16)},
    "zero LoKr": {f"{QUERY}.lokr_w1": torch.zeros(4, 4), f"{QUERY}.lokr_w2": random(4, 4)},
    "zero OFT": {f"{QUERY}.oft_blocks": torch.zeros(4, 4, 4)},
    "zero GLoRA": {f"{QUERY}.{n}.weight": torch.zeros(s) for n, s in
                   {"a1": (16, 2), "a2": (2, 16), "b1": (16, 2), "b2": (2, 16)}.items()},
}  # fmt: skip


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_is_said(name, alone):
    tensors = NOTHING[name] if alone else NOTHING[name] | GOOD
    updates, _, report = read_lora(tensors, SHAPES, "empty.safetensors")
    assert len(updates) == (0 if alone else 1) and report.matched == 1 + len(updates)
    assert report.idle == ("blocks.0.attn.wq.weight",) and not report.is_complete
    assert f"does nothing to {'all' if alone else '1'} of them" in str(report)


def test_a_magnitude_on_zero_matrices_does_something():
    tensors = NOTHING["zero up"] | {f"{QUERY}.dora_scale": torch.ones(16, 1)}
    updates, _, report = read_lora(tensors, SHAPES)
    assert report.matched == 1 and not report.unmatched


NO_NUMBERS = {
    "NaN": {UP: torch.full((16, 2), float("nan"))},
    "infinity": {UP: torch.full((16, 2), float("inf"))},
    "NaN times zero": {
        UP: torch.zeros(16, 2), f"{QUERY}.lora_A.weight": torch.full((2, 16), float("nan")),
    },
    "1e30": {UP: torch.full((16, 2), 1e30)},
    "alpha NaN": {f"{QUERY}.alpha": torch.tensor(float("nan"))},
    "alpha infinite": {f"{QUERY}.alpha": torch.tensor(float("inf"))},
    "magnitude NaN": {f"{QUERY}.dora_scale": torch.full((16, 1), float("nan"))},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_no_weight_can_take_is_refused(name):
    tensors = GOOD | pair() | NO_NUMBERS[name]
    with pytest.raises(CheckpointError, match=r"^bad.safetensors .*blocks.0.attn.wq"):
        read_lora(tensors, SHAPES, "bad.safetensors")


def test_a_layer_under_several_names_counts_once():
    tensors = {}
    for prefix in ("diffusion_model.", "transformer.", "base_model.model.", "_orig_mod."):
        tensors |= pair(f"{prefix}blocks.0.attn.wq")
    tensors |= pair("lora_unet_blocks_0_attn_wq")
    updates, _, report = read_lora(tensors, SHAPES)
    (update,) = updates["blocks.0.attn.wq.weight"]
    expected = tensors[UP] @ tensors[f"{QUERY}.lora_A.weight"]
    assert torch.allclose(update.difference(), expected)
    assert len(report.unmatched) == 8 and "counts once" in str(report)


def test_integers_need_a_scale():
    tensors = pair()
    tensors[UP] = torch.ones(16, 2, dtype=torch.int8)
    _, _, report = read_lora(tensors | GOOD, SHAPES)
    assert "stored as int8 without a scale" in str(report)
    assert "blocks.0.attn.wq" not in str(report).splitlines()[0] and report.matched == 1
    tensors[f"{UP}_scale"] = torch.tensor(0.5)
    updates, _, report = read_lora(tensors, SHAPES)
    (update,) = updates["blocks.0.attn.wq.weight"]
    expected = 0.5 * torch.ones(16, 2) @ tensors[f"{QUERY}.lora_A.weight"]
    assert torch.allclose(update.difference(), expected) and not report.unmatched


MISFITS = {
    "LoHa of two shapes": {
        f"{QUERY}.hada_w1_a": random(16, 2), f"{QUERY}.hada_w1_b": random(2, 16),
        f"{QUERY}.hada_w2_a": random(8, 2), f"{QUERY}.hada_w2_b": random(2, 16),
    },
    "LoHa with a factor of 1 x 1": {
        f"{QUERY}.hada_w1_a": random(16, 2), f"{QUERY}.hada_w1_b": random(2, 16),
        f"{QUERY}.hada_w2_a": random(1, 2), f"{QUERY}.hada_w2_b": random(2, 1),
    },
    "LoHa with a first factor of 1 x 1": {
        f"{QUERY}.hada_w1_a": random(1, 2), f"{QUERY}.hada_w1_b": random(2, 1),
        f"{QUERY}.hada_w2_a": random(16, 2), f"{QUERY}.hada_w2_b": random(2, 16),
    },
    "LoKr with a factor of 1 x 1": {
        f"{QUERY}.lokr_w1": random(1, 1), f"{QUERY}.lokr_w2": random(1, 16),
    },
    "DoRA on a norm": {
        "diffusion_model.blocks.0.prenorm.scale.lora_A.weight": random(2, 1),
        "diffusion_model.blocks.0.prenorm.scale.lora_B.weight": random(16, 2),
        "diffusion_model.blocks.0.prenorm.scale.dora_scale": random(16, 1),
    },
    "up matrix of a convolution": pair() | {UP: random(16, 2, 3, 3)},
    "OFT of other rows": {f"{QUERY}.oft_blocks": random(3, 4, 4)},
    "OFT that is not square": {f"{QUERY}.oft_blocks": random(4, 4, 2)},
    "BOFT of other rows": {f"{QUERY}.oft_blocks": random(2, 3, 4, 4)},
    "BOFT of too many stages": {f"{QUERY}.oft_blocks": random(9, 4, 4, 4)},
    "GLoRA of another width": {f"{QUERY}.{n}.weight": random(*s) for n, s in
                               {"a1": (8, 2), "a2": (2, 8), "b1": (16, 2), "b2": (2, 16)}.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_left_out(name):
    updates, _, report = read_lora(MISFITS[name] | GOOD, SHAPES)
    assert set(updates) == {"blocks.0.attn.wk.weight"}
    assert set(report.unmatched) == set(MISFITS[name])
    with pytest.raises(CheckpointError, match="changes nothing in this"):
        read_lora(MISFITS[name], SHAPES)


@pytest.fixture
def pipeline():
    return Krea2Pipeline.nano()


def file_for(pipeline, path, rank=2, **others):
    rows, columns = pipeline.transformer.blocks[0].attn.wq.weight.shape
    save_file(pair(rows=rows, columns=columns, rank=rank) | others, path)
    return path


def test_a_refused_lora_leaves_the_weights_and_the_next_one_works(pipeline, tmp_path):
    before = {n: w.clone() for n, w in pipeline.transformer.state_dict().items()}
    good = file_for(pipeline, tmp_path / "good.safetensors")
    rows, _ = pipeline.transformer.blocks[0].attn.wo.weight.shape
    other = "diffusion_model.blocks.0.attn.wo"
    bad = file_for(pipeline, tmp_path / "bad.safetensors", **{
        f"{other}.lora_A.weight": torch.full((1, rows), float("nan")),
        f"{other}.lora_B.weight": torch.ones(rows, 1),
    })  # fmt: skip
    with pytest.raises(CheckpointError, match="holds NaN"):
        pipeline.load_lora(bad)
    # Finite numbers, at a strength at which they are not.
    with pytest.raises(ValueError, match="makes blocks.0.attn.wq.weight infinite"):
        pipeline.load_lora(good, 3e38)
    state = pipeline.transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    pipeline.load_lora(good)
    once = pipeline.transformer.blocks[0].attn.wq.weight.clone()
    with pytest.raises(ValueError, match="nothing was changed"):
        pipeline.load_lora(good, 3e38)
    assert torch.equal(pipeline.transformer.blocks[0].attn.wq.weight, once)
    pipeline.unload_lora()
    state = pipeline.transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("layer", ["diffusion_model.blocks.{}.attn.wq", "lora_unet_other_{}_q"])
def test_layers_without_a_place_are_reported_in_linear_time(layer):
    def read(count):
        tensors = dict(GOOD)
        for number in range(1, count + 1):
            tensors[f"{layer.format(number)}.lora_down.weight"] = matrix
            tensors[f"{layer.format(number)}.lora_up.weight"] = matrix
        _, _, report = read_lora(tensors, SHAPES)
        return report, str(report)

    matrix = torch.ones(1, 1)
    report, text = read(2_000)
    assert len(report.unmatched) == 4_000 and "and 3997 more" in text
    assert_linear(read, 500)


@pytest.mark.parametrize("adapter", ["default", "style", "my_adapter-2"])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
def test_names_of_adapters_and_compiled_modules(adapter, wrapper):
    layers = (f"{wrapper}blocks.0.attn.wq", f"blocks.0.{wrapper}attn.{wrapper}wq",
              f"base_model.model.{wrapper}transformer_blocks.0.attn.to_q")  # fmt: skip
    for layer in layers:
        tensors = {
            f"{layer}.lora_A.{adapter}.weight": random(2, 16),
            f"{layer}.lora_B.{adapter}.weight": random(16, 2),
            f"{layer}.alpha": torch.tensor(1.0),
        }
        updates, _, report = read_lora(tensors, SHAPES)
        (update,) = updates["blocks.0.attn.wq.weight"]
        assert update.scale == 0.5 and not report.unmatched
    tensors = {
        "blocks.0.attn.wq.lokr_w1." + adapter: random(4, 4),
        "blocks.0.attn.wq.lokr_w2." + adapter: random(4, 4),
    }
    assert read_lora(tensors, SHAPES)[2].kinds == ("LoKr",)
