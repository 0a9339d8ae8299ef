"""One quantised input for the layers that read it: counted, and bit for bit the same."""

from collections import Counter
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file

import formats

FP8 = "fp8, settings as tensors"

FP8 = "fp8, settings as tensors"
# Formats whose layers quantise their input before they multiply, and how often the two blocks and
# the four of text fusion do. A block has eight such layers: queries, keys, values, gate and output;
# gate, up and down of the MLP. Six of them share two inputs, so four remain, and five in the last
# block, where queries and gate read the image alone. Text fusion is too narrow for the other two
# formats, but for its MLPs' last layer.
COUNTS = {FP8: (6 * 8, 5 * 4 + 5), "mxfp8": (2 * 8 + 4, 4 + 5 + 4), "nvfp4": (2 * 8 + 4, 4 + 5 + 4)}
SHARING = [form for form in COUNTS if form == FP8 or form in QUANT_ALGOS]


@pytest.fixture(scope="module")
def tensors(models):
    return load_file(models / "diffusion_models" / "krea2_tiny_turbo.safetensors")


@pytest.fixture
def load(pack, tensors, monkeypatch):
    """A MODEL from tensors in memory, in a format of `formats.WRITERS`; `change` edits them.

    Calculated in that format, as on a card that has it.
    """
    for form in ("fp8", "nvfp4", "mxfp8"):
        name = f"supports_{form}_compute"
        monkeypatch.setattr(comfy.model_management, name, lambda *args: True, raising=False)

    def call(form, change=lambda stored: None):
        stored, _, metadata = formats.WRITERS[form](tensors)
        change(stored)
        checkpoint = pack("krea2_model.checkpoints.checkpoint").Checkpoint(
            Path("krea2_turbo_quantised.safetensors"), stored, metadata
        )
        return pack("nodes.managed.model").load_model(checkpoint)

    return call


@pytest.fixture
def counted(monkeypatch, pack, velocity):
    """`counted(model, on)`: the velocity, and how many inputs were quantised for it."""
    counts: Counter = Counter()
    quantise = QuantizedTensor.from_float.__func__

    def recorded(cls, tensor, layout, **options):
        counts[layout] += 1
        return quantise(cls, tensor, layout, **options)

    monkeypatch.setattr(QuantizedTensor, "from_float", classmethod(recorded))
    switches = pack("krea2_model.nn.switches")

    def call(model, on):
        counts.clear()
        with switches.switched(*["quantise_once"] * on):
            return velocity(model), sum(counts.values())

    return call


def blocks_of(model):
    return model.model.diffusion_model.blocks


@pytest.mark.parametrize("form", SHARING)
def test_same_bits_from_half_as_many(load, counted, form):
    model = load(form)
    assert len(blocks_of(model)) == 2
    expected, before = counted(model, on=False)
    found, after = counted(model, on=True)
    assert torch.equal(found, expected)
    assert (before, after) == COUNTS[form]


def full_precision(stored):
    settings = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    for name in stored:
        if name.endswith(".comfy_quant"):
            stored[name] = formats.settings_tensor(settings)


@pytest.mark.parametrize("form", ["int8, one scale", "int8 convrot", FP8])
def test_layers_that_quantise_inside_or_not_at_all_stay(load, counted, form):
    if form != FP8 and "int8_tensorwise" not in QUANT_ALGOS:
        form = FP8  # an older ComfyUI has no layers in int8
    model = load(form, full_precision if form == FP8 else lambda stored: None)
    expected, before = counted(model, on=False)
    found, after = counted(model, on=True)
    assert torch.equal(found, expected) and before == after == 0


def input_scales(stored, scale=0.02):
    """A scale for the input of every layer, as files of some programs have it."""
    for name in list(stored):
        if name.endswith(".weight_scale"):
            stored[name.replace(".weight_scale", ".input_scale")] = torch.tensor(scale)


def test_scales_of_their_own_stay(load, counted):
    """Of the six layers that share, one has another scale, and one none."""

    def change(stored):
        input_scales(stored)
        stored["blocks.0.attn.wk.input_scale"] = torch.tensor(0.1)
        del stored["blocks.0.mlp.up.input_scale"]

    plain, fewest = counted(load(FP8, input_scales), on=True)
    model = load(FP8, change)
    expected, before = counted(model, on=False)
    assert before == COUNTS[FP8][0] and not torch.equal(expected, plain)
    found, after = counted(model, on=True)
    assert torch.equal(found, expected)
    assert after == fewest + 2


def test_a_change_of_a_scale_is_seen(load, counted):
    model = load(FP8, input_scales)
    _, fewest = counted(model, on=True)
    layer = blocks_of(model)[0].mlp.up
    layer.input_scale = torch.nn.Parameter(torch.tensor(0.1), requires_grad=False)
    expected, _ = counted(model, on=False)
    found, after = counted(model, on=True)
    assert torch.equal(found, expected) and after == fewest + 1


@pytest.mark.parametrize("what", ["patch", "hook", "forward", "full precision", "smoothing"])
def test_layers_that_others_changed_keep_their_own_way(load, counted, what):
    """Patched on use, listened to, replaced, told not to quantise, smoothed before."""
    model = load(FP8)
    first, untouched = counted(model, on=True)
    layer, seen = blocks_of(model)[0].attn.wk, []
    if what == "patch":
        layer.weight_function = [lambda weight: weight * 2]
    elif what == "hook":
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].ndim))
    elif what == "forward":
        forward = type(layer).forward
        layer.forward = lambda x: seen.append(x.ndim) or forward(layer, x) * 2
    elif what == "full precision":
        layer._full_precision_mm = True
    elif "pre_quant_scale" not in QUANT_ALGOS["nvfp4"]["parameters"]:
        return  # an older ComfyUI has none
    else:
        layer.pre_quant_scale = torch.full((256,), 0.5)
    expected, before = counted(model, on=False)
    found, after = counted(model, on=True)
    assert torch.equal(found, expected)
    own = what in ("hook", "forward", "smoothing")  # of its own, which the others do without
    assert after == untouched + own
    assert set(seen) <= {3}, "it reads the input as it is"
    if what in ("hook", "forward"):
        assert seen


def test_a_compiler_and_gradients_see_the_plain_layers(load, pack, monkeypatch):
    module = pack("nodes.managed.shared_inputs")
    layers = blocks_of(load(FP8))[0].attn
    hidden = torch.randn(1, 3, 256)
    made = []
    monkeypatch.setattr(module, "_input_format", lambda layer: made.append(layer))
    with pack("krea2_model.nn.switches").switched("quantise_once"):
        with torch.inference_mode(False), torch.enable_grad():
            module.share_input(hidden, layers.wq, layers.wk)
        module.share_input(hidden[None], layers.wq, layers.wk)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        module.share_input(hidden, layers.wq, layers.wk)
        assert made == []
        monkeypatch.undo()
