"""LoRAs on outputs of layers, against the same LoRAs merged into weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_reference import TINY, random_transformer
from krea2_model.lora.live import LiveLora, LoraUse, TokenLayout, live_loras, live_loras_of_text
from krea2_model.lora.outputs import output_change
from krea2_model.lora.updates import LoraStack, Update
from parity import assert_close
from samples import random

OUT, IN, RANK = 24, 16, 4
LORA = {"up": (OUT, RANK), "down": (RANK, IN)}
FUSED = {"up": (2 * OUT, RANK), "down": (RANK, IN)}
KINDS = {
    "lora": ("lora", LORA, {"alpha": 2.0}),
    "lora, rows of a fused layer": ("lora", FUSED, {"rows": (OUT, 2 * OUT)}),
    "lokr": ("lokr", {"w1": (4, 2), "w2_a": (6, 3), "w2_b": (3, 8)}, {"alpha": 1.5}),
    "lokr, rows": ("lokr", {"w1": (4, 2), "w2": (12, 8)}, {"rows": (0, OUT)}),
    "loha": (
        "loha",
        {
            "hada_w1_a": (OUT, RANK),
            "hada_w1_b": (RANK, IN),
            "hada_w2_a": (OUT, RANK),
            "hada_w2_b": (RANK, IN),
        },
        {},
    ),
    "difference": ("diff", {"diff": (OUT, IN)}, {}),
    "replacement": ("set", {"set": (OUT, IN)}, {}),
    "dora over columns": ("lora", LORA | {"magnitude": (1, IN)}, {}),
    "dora over rows": ("lora", LORA | {"magnitude": (OUT, 1)}, {}),
    "dora, rows of a fused layer": (
        "lora",
        FUSED | {"magnitude": (1, IN)},
        {"rows": (OUT, 2 * OUT), "fused": ("other.weight", "layer.weight")},
    ),
    "oft": ("oft", {"oft_blocks": (3, 8, 8)}, {"alpha": 0.5}),
    "boft": ("boft", {"oft_blocks": (2, 4, 6, 6), "rescale": (OUT, 1)}, {}),
    "glora": (
        "glora",
        {"a1": (IN, RANK), "a2": (RANK, IN), "b1": (OUT, RANK), "b2": (RANK, IN)},
        {},
    ),
}


def update_of(name):
    kind, shapes, options = KINDS[name]
    parts = {
        part: 0.3 * random(*shape, seed=seed) for seed, (part, shape) in enumerate(shapes.items())
    }
    return Update("layer.weight", kind, parts, **options)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
        self.requires_grad_(False)


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_adds_what_the_changed_weight_would(name, strength):
    torch.manual_seed(0)
    model, update, hidden = Layers(), update_of(name), random(2, 5, IN, seed=9)
    norm = None
    if update.needs_fused_weights:
        norm = update.fused_norm({n: model.get_parameter(n) for n in update.fused})
    changed = update.apply(model.layer.weight, strength, norm)
    expected = F.linear(hidden, changed - model.layer.weight)
    change = output_change(update, model.layer, strength, hidden, model.get_parameter)
    assert_close(change(hidden), expected, 1e-5, name)


@pytest.fixture(scope="module")
def model():
    return random_transformer(TINY)


@pytest.fixture(scope="module")
def updates(model):
    """A LoRA of every linear layer that tokens pass, biases among them."""
    found = {}
    for seed, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, nn.Linear) and not name.startswith(("tmlp", "tproj")):
            out, width = layer.weight.shape
            parts = {"up": random(out, 2, seed=seed) / 10, "down": random(2, width, seed=-seed) / 3}
            found[f"{name}.weight"] = [Update(f"{name}.weight", "lora", parts)]
    bias = Update("first.bias", "diff", {"diff": random(TINY.hidden_size, seed=5)})
    return found | {"first.bias": [bias]}


LATENTS, TEXT = random(1, 16, 6, 8, seed=8), 5
LAYOUT = TokenLayout(TEXT, 12, 6)


def velocity(model, uses=(), layout=LAYOUT):
    taps = random(1, TEXT, 12, TINY.text_hidden_dim, seed=3)
    with torch.no_grad():
        with live_loras_of_text(model, uses):
            text = model.fuse_text(taps)
        picture = [random(1, 16, 4, 6, seed=10)] if layout.references else []
        with live_loras(model, uses, layout):
            return model(LATENTS, torch.tensor([0.9]), text, references=picture)


@pytest.mark.parametrize("share", [None, torch.ones(LAYOUT.total)], ids=["all", "shares of 1"])
def test_on_all_tokens_it_is_the_merged_lora(model, updates, share):
    merged = copy.deepcopy(model)
    LoraStack(merged).add((updates, 0.7))
    before = velocity(model)
    found = velocity(model, [LoraUse(LiveLora(updates), 0.7, share)])
    assert_close(found, velocity(merged), 1e-5, "merged")
    assert not torch.allclose(found, before, rtol=1e-2)
    assert torch.equal(velocity(model), before)


def test_on_some_tokens_it_changes_their_rows_alone(model, updates):
    """Against a model whose linear layers take each row by one of two weights."""
    share = torch.zeros(LAYOUT.total)
    share[1], share[TEXT : TEXT + 4], share[TEXT + 4] = 1, 1, 0.25
    blocks = {n: u for n, u in updates.items() if not n.startswith(("txtfusion", "txtmlp"))}
    expected = copy.deepcopy(model)
    for name in blocks:
        if name != "first.bias":
            _take_rows(expected, name.removesuffix(".weight"), blocks, share)
    found = velocity(model, [LoraUse(LiveLora(blocks), 0.7, share)])
    assert_close(found, velocity(expected), 1e-5, "rows")
    assert not torch.allclose(found, velocity(model), rtol=1e-2)


def _take_rows(model, name, updates, share):
    layer, update = model.get_submodule(name), updates[f"{name}.weight"][0]
    changed, plain = update.apply(layer.weight, 0.7), layer.forward
    added = 0.7 * updates["first.bias"][0].difference() if name == "first" else 0.0
    bias = 0 if layer.bias is None else layer.bias

    def forward(hidden):
        count = hidden.shape[1]
        rows = share[TEXT:] if name == "first" else share
        if name != "first" and count == LAYOUT.image:
            rows = share[TEXT : TEXT + LAYOUT.image]
        both = hidden @ changed.mT + bias + added
        return torch.lerp(plain(hidden), both, rows[:, None])

    layer.forward = forward


def test_strength_0_is_no_lora(model, updates):
    assert torch.equal(velocity(model, [LoraUse(LiveLora(updates), 0.0)]), velocity(model))


def test_two_loras_add_up(model, updates):
    halves = [LoraUse(LiveLora(updates), 0.35), LoraUse(LiveLora(updates), 0.35)]
    whole = velocity(model, [LoraUse(LiveLora(updates), 0.7)])
    assert_close(velocity(model, halves), whole, 1e-5, "two halves")


def test_hooks_are_gone_after_an_error(model, updates):
    with pytest.raises(RuntimeError), live_loras(model, [LoraUse(LiveLora(updates))], LAYOUT):
        raise RuntimeError
    assert not any(layer._forward_hooks for layer in model.modules())


def test_weights_without_tokens_are_named(updates):
    names = ["tproj.1.weight", "blocks.0.prenorm.scale.weight", "blocks.0.mod.lin.weight"]
    others = {name: [Update(name, "diff", {"diff": torch.zeros(3)})] for name in names}
    lora = LiveLora(updates | others)
    assert set(lora.left_out) == set(names)
    assert "blocks.0.attn.wq" in lora.names


def test_shares_of_another_length_are_refused(model, updates):
    use = LoraUse(LiveLora(updates), share=torch.ones(3))
    with pytest.raises(ValueError, match="3 shares; expected 23"), live_loras(model, [use], LAYOUT):
        pass
