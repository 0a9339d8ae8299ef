"""LoRA files of every style: dense references computed here, and reports."""

import pytest
import torch

from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.checkpoints.transformer_keys import official_to_diffusers
from krea2_model.config import TransformerConfig
from krea2_model.lora.files import read_lora
from krea2_model.lora.updates import LoraStack, Update
from krea2_model.transformer.model import Krea2Transformer
from parity import assert_close
from samples import random

CONFIG = TransformerConfig(
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=160,
    text_hidden_dim=64,
    text_num_attention_heads=2,
    text_num_key_value_heads=2,
    text_intermediate_size=96,
    axes_dims_rope=(8, 12, 12),
)
QUERY = "blocks.0.attn.wq"
RANK = 4


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    shapes = {n: p.shape for n, p in Krea2Transformer(CONFIG, device="meta").named_parameters()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def shapes(weights):
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def applied(weights, tensors, strength=1.0):
    """The weights with every update of a file applied, and the report."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    updates, _, report = read_lora(tensors, shapes, "style.safetensors")
    result = dict(weights)
    for name, several in updates.items():
        for update in several:
            norm = update.fused_norm(result) if update.needs_fused_weights else None
            result[name] = update.apply(result[name], strength, norm)
    return result, report


def underscores(name):
    return name.replace(".", "_")


# How trainers spell the layer QUERY, and how they call the matrices.
SPELLINGS = {
    "ai-toolkit": (f"diffusion_model.{QUERY}", "lora_A.weight", "lora_B.weight"),
    "ai-toolkit, older": (f"transformer.{QUERY}", "lora_A.weight", "lora_B.weight"),
    "PEFT": (f"base_model.model.{QUERY}", "lora_A.weight", "lora_B.weight"),
    "PEFT adapter": (f"base_model.model.{QUERY}", "lora_A.default.weight", "lora_B.default.weight"),
    "PEFT on ComfyUI": (f"base_model.model.diffusion_model.{QUERY}", "lora_A.weight",
                        "lora_B.weight"),
    "diffusers": ("transformer.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight"),
    "diffusers, older": ("transformer.transformer_blocks.0.attn.to_q", "lora.down.weight",
                         "lora.up.weight"),
    "kohya": ("lora_unet_blocks_0_attn_wq", "lora_down.weight", "lora_up.weight"),
    "kohya, diffusers": ("lora_unet_transformer_blocks_0_attn_to_q", "lora_down.weight",
                         "lora_up.weight"),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_down.weight",
                   "lora_up.weight"),
    "OneTrainer, official": ("lora_transformer_blocks_0_attn_wq", "lora_down.weight",
                             "lora_up.weight"),
    "LyCORIS": ("lycoris_blocks_0_attn_wq", "lora_down.weight", "lora_up.weight"),
    "SimpleTuner": ("lycoris_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight"),
    "SimpleTuner, prefixed": ("lycoris_transformer_transformer_blocks_0_attn_to_q",
                              "lora_down.weight", "lora_up.weight"),
    "bare": (QUERY, "lora_A.weight", "lora_B.weight"),
    "unet": (f"unet.{QUERY}", "lora_down.weight", "lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("style", SPELLINGS)
def test_lora_of_every_trainer(weights, style, alpha):
    layer, down_name, up_name = SPELLINGS[style]
    rows, columns = weights[f"{QUERY}.weight"].shape
    down, up = random(RANK, columns), random(rows, RANK)
    tensors = {f"{layer}.{down_name}": down, f"{layer}.{up_name}": up}
    if alpha is not None:
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    result, report = applied(weights, tensors, strength=0.7)
    scale = 1.0 if alpha is None else alpha / RANK
    expected = weights[f"{QUERY}.weight"] + 0.7 * scale * (up @ down)
    assert_close(result[f"{QUERY}.weight"], expected, 1e-6, style)
    assert (report.matched, report.ranks, report.unmatched) == (1, (RANK,), {})
    changed = {name for name in weights if not torch.equal(result[name], weights[name])}
    assert changed == {f"{QUERY}.weight"}


@pytest.mark.parametrize("spell", ["official", "diffusers", "underscores", "diffusers underscores"])
def test_every_weight_is_reached(weights, shapes, spell):
    """All layers, norm scales and tables, by each spelling, as full differences."""
    tensors, expected = {}, {}
    for name, weight in weights.items():
        official = name.replace(".scale.weight", ".scale").replace(".lin.weight", ".lin")
        spelled = official_to_diffusers(official) if "diffusers" in spell else official
        base, ending = spelled, ".diff"
        if spelled.endswith(".bias"):
            base, ending = spelled.removesuffix(".bias"), ".diff_b"
        base = base.removesuffix(".weight")
        prefix = "lora_unet_" if "underscores" in spell else "diffusion_model."
        base = prefix + (underscores(base) if "underscores" in spell else base)
        difference = random(*weight.shape)
        tensors[base + ending] = difference
        expected[name] = weight + difference
    result, report = applied(weights, tensors)
    assert report.unmatched == {}
    assert report.matched == len(weights)
    for name in weights:
        assert_close(result[name], expected[name], 1e-6, name)


def test_a_table_stored_in_six_rows(weights):
    difference = random(6, CONFIG.hidden_size)
    name = "transformer.transformer_blocks.1.scale_shift_table.diff"
    result, _ = applied(weights, {name: difference})
    expected = weights["blocks.1.mod.lin.weight"] + difference.flatten()
    assert_close(result["blocks.1.mod.lin.weight"], expected, 1e-6, "table")


LOKR = {
    "full": ("w1", "w2"),
    "second factored": ("w1", "w2_a", "w2_b"),
    "first factored": ("w1_a", "w1_b", "w2"),
    "both factored": ("w1_a", "w1_b", "w2_a", "w2_b"),
}


@pytest.mark.parametrize("parts", LOKR.values(), ids=LOKR)
def test_lokr(weights, parts):
    rows, columns = weights[f"{QUERY}.weight"].shape
    sizes = {
        "w1": (4, 8), "w1_a": (4, 2), "w1_b": (2, 8),
        "w2": (rows // 4, columns // 8), "w2_a": (rows // 4, 2), "w2_b": (2, columns // 8),
    }  # fmt: skip
    found = {part: random(*sizes[part]) for part in parts}
    tensors = {f"diffusion_model.{QUERY}.lokr_{part}": tensor for part, tensor in found.items()}
    tensors[f"diffusion_model.{QUERY}.alpha"] = torch.tensor(1.0)
    result, report = applied(weights, tensors)
    first = found["w1"] if "w1" in found else found["w1_a"] @ found["w1_b"]
    second = found["w2"] if "w2" in found else found["w2_a"] @ found["w2_b"]
    # Without a factored matrix there is no rank for alpha to be divided by.
    scale = 1.0 if len(parts) == 2 else 1.0 / 2
    blocks = [[scale * value * second for value in row] for row in first]
    delta = torch.cat([torch.cat(row, dim=1) for row in blocks])
    expected = weights[f"{QUERY}.weight"] + delta
    assert_close(result[f"{QUERY}.weight"], expected, 1e-6, "LoKr")
    assert report.kinds == ("LoKr",)


def test_loha(weights):
    rows, columns = weights[f"{QUERY}.weight"].shape
    layer = "lycoris_transformer_blocks_0_attn_to_q"
    parts = {"w1_a": random(rows, 3), "w1_b": random(3, columns),
             "w2_a": random(rows, 3) + 1, "w2_b": random(3, columns) - 1}  # fmt: skip
    tensors = {f"{layer}.hada_{part}": tensor for part, tensor in parts.items()}
    tensors[f"{layer}.alpha"] = torch.tensor(6.0)
    result, report = applied(weights, tensors, strength=-0.5)
    delta = 2.0 * (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    expected = weights[f"{QUERY}.weight"] - 0.5 * delta
    assert_close(result[f"{QUERY}.weight"], expected, 1e-6, "LoHa")
    assert (report.kinds, report.ranks) == (("LoHa",), (3,))


@pytest.mark.parametrize("style", ["PEFT, rows", "LyCORIS, rows", "LyCORIS, columns"])
def test_dora(weights, style):
    weight = weights[f"{QUERY}.weight"]
    rows, columns = weight.shape
    down, up = random(RANK, columns), random(rows, RANK)
    layer = f"transformer.{QUERY}"
    tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    changed = weight + up @ down
    if style == "LyCORIS, columns":
        magnitude = random(1, columns).abs()
        expected = changed * magnitude / changed.norm(dim=0)
        tensors[f"{layer}.dora_scale"] = magnitude
    else:
        magnitude = random(rows).abs()
        expected = changed * (magnitude / changed.norm(dim=1))[:, None]
        name = "lora_magnitude_vector" if style == "PEFT, rows" else "dora_scale"
        tensors[f"{layer}.{name}"] = magnitude if style == "PEFT, rows" else magnitude[:, None]
    result, report = applied(weights, tensors)
    assert_close(result[f"{QUERY}.weight"], expected, 1e-6, style)
    assert report.kinds == ("LoRA with DoRA",)
    half, _ = applied(weights, tensors, strength=0.5)
    assert_close(half[f"{QUERY}.weight"], (weight + expected) / 2, 1e-6, f"half of {style}")


@pytest.mark.parametrize("dora", [None, "rows", "columns"])
@pytest.mark.parametrize("block, width", [("blocks.1", 128), ("txtfusion.layerwise_blocks.0", 64)])
def test_fused_qkv(weights, block, width, dora):
    """Rows of a fused layer are those of query, key and value, one after the other."""
    names = [f"{block}.attn.{part}.weight" for part in ("wq", "wk", "wv")]
    fused = torch.cat([weights[name] for name in names])
    first, second = random(fused.shape[0] // 8, 2), random(8, fused.shape[1] // 2)
    diffusers = block.replace("blocks.1", "transformer_blocks.1").replace(
        "txtfusion", "text_fusion"
    )
    layer = f"lycoris_{underscores(diffusers)}_attn_to_qkv"
    tensors = {f"{layer}.lokr_w1": first, f"{layer}.lokr_w2": second}
    expected = fused + torch.kron(first, second)
    if dora == "rows":
        magnitude = random(fused.shape[0], 1).abs()
        expected = expected * magnitude / expected.norm(dim=1, keepdim=True)
        tensors[f"{layer}.dora_scale"] = magnitude
    elif dora == "columns":
        magnitude = random(1, fused.shape[1]).abs()
        expected = expected * magnitude / expected.norm(dim=0, keepdim=True)
        tensors[f"{layer}.dora_scale"] = magnitude
    updates, _, report = read_lora(tensors, {n: tuple(w.shape) for n, w in weights.items()})
    result = []
    for name in names:
        (update,) = updates[name]
        norm = update.fused_norm(weights) if update.needs_fused_weights else None
        result.append(update.apply(weights[name], 1.0, norm))
    assert_close(torch.cat(result), expected, 1e-6, "fused")
    assert report.matched == 3


def test_bfloat16_is_the_float32_result_rounded_once(weights):
    rows, columns = weights[f"{QUERY}.weight"].shape
    down, up = random(RANK, columns).bfloat16(), random(rows, RANK).bfloat16()
    layer = f"diffusion_model.{QUERY}"
    tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    base = {name: weight.bfloat16() for name, weight in weights.items()}
    result, _ = applied(base, tensors, 0.3)
    expected = base[f"{QUERY}.weight"].float() + 0.3 * (up.float() @ down.float())
    assert torch.equal(result[f"{QUERY}.weight"].bfloat16(), expected.bfloat16())


def test_the_report_says_what_was_left_out_and_why(weights):
    rows, columns = weights[f"{QUERY}.weight"].shape
    pair = {"lora_A.weight": random(RANK, columns), "lora_B.weight": random(rows, RANK)}
    tensors = {f"diffusion_model.{QUERY}.{part}": tensor for part, tensor in pair.items()}
    tensors |= {f"diffusion_model.blocks.7.attn.wq.{p}": t for p, t in pair.items()}
    tensors |= {f"diffusion_model.blocks.0.attn.wk.{p}": t for p, t in pair.items()}
    tensors["diffusion_model.blocks.1.attn.wq.lora_A.weight"] = pair["lora_A.weight"]
    tensors["diffusion_model.blocks.1.attn.wo.oft_blocks"] = random(2, 2)
    tensors["base_model.model.blocks.1.attn.wo.oft_R.default.weight"] = random(2, 2)
    tensors["lora_te_layers_0_self_attn_q_proj.lora_down.weight"] = random(2, 2)
    tensors["something.else"] = random(1)
    _, report = applied(weights, tensors)
    assert report.matched == 1
    text = str(report)
    for reason in (
        "this model has 2 blocks",
        f"made for {rows} x {columns}, the layer is {rows // 2} x {columns}",
        "incomplete: only down of a layer",
        "OFT blocks of shape (2, 2)",
        "PEFT's OFT is not supported: merge it",
        "a layer of the text encoder, and none is connected",
        "not a name that any trainer is known to write",
    ):
        assert reason in text, text
    assert set(report.unmatched) == set(tensors) - {f"diffusion_model.{QUERY}.{p}" for p in pair}
    assert text.startswith("style.safetensors: LoRA of ai-toolkit or ComfyUI, rank 4\n1 weight")


def test_a_lora_of_another_model_is_refused(weights, shapes):
    tensors = {
        f"lora_unet_double_blocks_0_img_attn_qkv.{part}": random(4, 4)
        for part in ("lora_down.weight", "lora_up.weight")
    }
    with pytest.raises(CheckpointError, match="flux.safetensors changes nothing .* such layer"):
        read_lora(tensors, shapes, "flux.safetensors")


def test_a_lora_of_a_wider_model_is_refused(weights, shapes):
    tensors = {
        f"diffusion_model.{QUERY}.lora_A.weight": random(4, 6144),
        f"diffusion_model.{QUERY}.lora_B.weight": random(6144, 4),
    }
    with pytest.raises(CheckpointError, match="made for 6144"):
        read_lora(tensors, shapes, "real.safetensors")


def test_text_encoder_layers(weights, shapes):
    text_shapes = {"layers.0.self_attn.q_proj.weight": (8, 6)}
    for layer in (
        "lora_te_model_layers_0_self_attn_q_proj",
        "lora_te1_layers_0_self_attn_q_proj",
        "text_encoder.model.language_model.layers.0.self_attn.q_proj",
        "text_encoders.qwen3vl_4b.transformer.model.layers.0.self_attn.q_proj",
    ):
        tensors = {
            f"{layer}.lora_down.weight": random(2, 6),
            f"{layer}.lora_up.weight": random(8, 2),
        }
        updates, text_updates, report = read_lora(tensors, shapes, "te", text_shapes)
        assert not updates and list(text_updates) == list(text_shapes)
        assert report.text_matched == 1


def test_several_loras_make_each_weight_once(weights, monkeypatch):
    """The same bits as one after the other, and all of none where one cannot be."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            linear = torch.nn.Linear
            self.one, self.other = (linear(24, 16, bias=False) for _ in range(2))

    torch.manual_seed(3)
    model = Model().requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    loras = [
        ({name: [Update(name, "lora", {"down": random(4, 24), "up": random(16, 4)})]
          for name in before}, 0.1 * number)
        for number in range(1, 21)
    ]  # fmt: skip
    made, apply = [], Update.apply
    monkeypatch.setattr(Update, "apply", lambda self, *a: made.append(1) or apply(self, *a))
    stack = LoraStack(model)
    for lora in loras:
        stack.add(lora)
    expected = {name: weight.clone() for name, weight in model.named_parameters()}
    assert len(made) == 2 * 210
    stack.clear()
    made.clear()
    undo = stack.add(*loras)
    assert len(made) == 2 * 20
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    bad = {"other.weight": [Update("other.weight", "diff", {"diff": random(16, 24) * 3e38})]}
    with pytest.raises(ValueError, match=r"at 0.1, 2, 1e\+10 makes other.weight infinite"):
        stack.add(loras[0], (loras[1][0], 2.0), (bad, 1e10))
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    stack.restore(undo)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
