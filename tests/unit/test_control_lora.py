"""Control LoRAs: file forms, and the picture against diffusers with a widened first layer."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusers_reference import TINY, diffusers_arguments, diffusers_transformer, load_from
from krea2_model import Control, denoise
from krea2_model.checkpoints.identify import CONTROL_LORA, LORA, CheckpointError, identify
from krea2_model.checkpoints.transformer_keys import module_to_official, official_to_diffusers
from krea2_model.features.control_run import ControlSettings, RunControl
from krea2_model.features.controls import Controls, check_images, share_of
from krea2_model.features.run_features import RunFeatures
from krea2_model.lora.control import control_lora, read_control_lora
from krea2_model.lora.control_files import CHANNELS, REFERENCES, control_form
from krea2_model.lora.files import read_lora
from krea2_model.lora.in_run import RunLora
from krea2_model.transformer.model import Krea2Transformer, grid_size, patchify, unpatchify
from krea2_model.transformer.references import Reference
from parity import assert_close
from samples import random

WIDTH, CHANNEL_COUNT, RANK = TINY.hidden_size, TINY.in_channels, 3
LAYERS = ("attn.wq", "attn.wk", "attn.wv", "attn.wo", "attn.gate", "mlp.gate", "mlp.up", "mlp.down")
LATENTS, CONTROL, TAPS = (
    random(1, 16, 6, 8, seed=1),
    random(1, 16, 6, 8, seed=2),
    random(1, 5, 12, TINY.text_hidden_dim, seed=3),
)
TIME = torch.tensor([0.7])


@pytest.fixture(scope="module")
def reference():
    return diffusers_transformer()


@pytest.fixture(scope="module")
def model(reference):
    model = Krea2Transformer(TINY).requires_grad_(False)
    load_from(model, reference)
    return model


@pytest.fixture(scope="module")
def shapes(model):
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def tensors(shapes):
    """A file as published ones are: the whole input layer, and A and B of each matrix."""
    found = {
        "first.weight": random(WIDTH, 2 * CHANNEL_COUNT, seed=5) / 8,
        "first.bias": random(WIDTH, seed=6),
    }
    for block in range(TINY.num_layers):
        for seed, layer in enumerate(LAYERS):
            rows, columns = shapes[f"blocks.{block}.{layer}.weight"]
            found[f"blocks.{block}.{layer}.A"] = random(RANK, columns, seed=seed) / 4
            found[f"blocks.{block}.{layer}.B"] = random(rows, RANK, seed=20 + seed) / 8
    return found


def features(lora, strength=1.0, share_at=None, latents=CONTROL) -> RunFeatures:
    live = RunLora(lora.live, strength, share_at=share_at)
    control = RunControl(lora.projection, latents, strength, share_at=share_at)
    return RunFeatures().with_controls(((control, live),))


def velocity(model, run=None, references=(), latents=LATENTS):
    run = run or RunFeatures()
    with torch.no_grad():
        text = model.fuse_text(TAPS)
        step = run.at(0.7, grid_size(latents, 2), latents.device)
        tokens = sum(grid_size(r, 2)[0] * grid_size(r, 2)[1] for r in references)
        with step.live(model, text.shape[1], tokens):
            return model(latents, TIME, text, references=list(references))


def widened(reference, tensors, strength):
    """diffusers' model with the first layer that was trained, and the LoRA in its weights."""
    config = dataclasses.replace(TINY, in_channels=2 * CHANNEL_COUNT)
    arguments = diffusers_arguments(config)
    model = type(reference)(**arguments).eval().requires_grad_(False)
    state = {name: weight.clone() for name, weight in reference.state_dict().items()}
    image, control = tensors["first.weight"].split(CHANNEL_COUNT, dim=1)
    image = torch.lerp(state["img_in.weight"], image, strength)
    state["img_in.weight"] = torch.cat((image, strength * control), dim=1)
    state["img_in.bias"] = torch.lerp(state["img_in.bias"], tensors["first.bias"], strength)
    # The output layer is as wide as the image alone.
    if model.final_layer.linear.out_features != CHANNEL_COUNT:
        model.final_layer.linear = nn.Linear(WIDTH, CHANNEL_COUNT).requires_grad_(False)
    for name in tensors:
        if name.endswith(".A"):
            layer = name.removesuffix(".A")
            change = strength * tensors[f"{layer}.B"] @ tensors[name]
            state[official_to_diffusers(module_to_official(f"{layer}.weight"))] += change
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_equals_diffusers_with_a_widened_first_layer(reference, model, tensors, shapes, strength):
    from diffusers.pipelines.krea2 import Krea2Pipeline as DiffusersPipeline

    rows, columns = grid_size(LATENTS, 2)
    positions = DiffusersPipeline.prepare_position_ids(TAPS.shape[1], rows, columns, "cpu")
    both = torch.cat((patchify(LATENTS, 2), patchify(CONTROL, 2)), dim=2)
    with torch.no_grad():
        sample = widened(reference, tensors, strength)(both, TAPS, TIME, positions).sample
    expected = unpatchify(sample, rows, columns, 2)
    lora = control_lora(tensors, shapes)
    found = velocity(model, features(lora, strength))
    assert_close(found, expected, 1e-4, "widened")
    plain = velocity(model)
    assert (found - plain).abs().mean() > 0.1 * plain.abs().mean()
    assert torch.equal(velocity(model, features(lora, 0.0)), plain)


def test_reference_tokens_are_left_alone_and_a_mask_gives_the_rest_its_shares(
    model, tensors, shapes
):
    lora, other = control_lora(tensors, shapes), random(1, 16, 4, 4, seed=9)
    tokens, references = 12, 4
    half = torch.cat((torch.ones(6), torch.full((3,), 0.25), torch.zeros(3)))

    def embedded(run):
        seen = []
        step = run.at(0.7, (3, 4), LATENTS.device)
        with (
            torch.no_grad(),
            step.live(model, TAPS.shape[1], references),
            # Registered last, it sees what the hooks before it made.
            model.first.register_forward_hook(lambda *call: seen.append(call[2])),
        ):
            model(LATENTS, TIME, model.fuse_text(TAPS), references=[other])
        return seen[0]

    plain = embedded(RunFeatures())
    added = embedded(features(lora, 0.8, lambda rows, columns: half)) - plain
    trained = patchify(LATENTS, 2) @ tensors["first.weight"][:, :CHANNEL_COUNT].T
    trained = trained + tensors["first.bias"] - plain[:, :tokens]
    expected = 0.8 * half[:, None] * (patchify(CONTROL, 2) @ lora.projection.T + trained)
    assert_close(added[:, :tokens], expected, 1e-5, "image")
    assert not added[:, tokens:].any()


def test_stacked_controls_add_up_and_each_has_its_window(model, tensors, shapes):
    lora = control_lora(tensors, shapes)
    one, two = features(lora, 0.7), features(lora, -0.7)
    both = RunFeatures().with_controls(
        tuple(zip(one.controls + two.controls, one.loras + two.loras, strict=True))
    )
    # A LoRA and its opposite.
    assert_close(velocity(model, both), velocity(model), 1e-4, "opposites")
    late = ControlSettings(1.0, 0.5, 1.0).window()
    held = dataclasses.replace(features(lora).controls[0], window=late)
    assert not held.acts_at(0.7) and held.acts_at(0.4) and not held.acts_at(0.6)
    assert torch.equal(
        velocity(model, RunFeatures().with_controls(((held, None),))), velocity(model)
    )


@pytest.mark.parametrize(
    "spelling",
    [
        "img_in.weight",
        "diffusion_model.first.weight",
        "x_embedder.weight",
        "transformer.img_in.weight",
    ],
)
def test_spellings_of_the_input_layer(tensors, shapes, spelling):
    renamed = {n: t for n, t in tensors.items() if not n.startswith("first.")}
    renamed = {
        n.replace(".A", ".lora_A.weight").replace(".B", ".lora_B.weight"): t
        for n, t in renamed.items()
    } | {spelling: tensors["first.weight"]}
    renamed[spelling.replace("weight", "bias")] = tensors["first.bias"]
    lora = control_lora(renamed, shapes)
    expected = control_lora(tensors, shapes)
    assert torch.equal(lora.projection, expected.projection)
    assert lora.updates.keys() == expected.updates.keys() and lora.report.matched == 24


def test_a_lora_of_the_input_layer_is_both_halves(model, shapes):
    """As Flux's control LoRAs are: with rank, alpha, and a weight that is to be reshaped."""
    down, up = random(RANK, 2 * CHANNEL_COUNT, seed=1), random(WIDTH, RANK, seed=2) / 8
    tensors = {
        "diffusion_model.first.lora_A.weight": down,
        "diffusion_model.first.lora_B.weight": up,
        "diffusion_model.first.alpha": torch.tensor(6.0),
        "diffusion_model.first.reshape_weight": torch.tensor([WIDTH, 2 * CHANNEL_COUNT]),
    }
    lora = control_lora(tensors, shapes)
    whole = 6.0 / RANK * up @ down
    assert_close(lora.projection, whole[:, CHANNEL_COUNT:], 1e-5, "control half")
    (update,) = lora.updates["first.weight"]
    assert_close(update.difference(), whole[:, :CHANNEL_COUNT], 1e-5, "image half")
    assert not torch.equal(velocity(model, features(lora)), velocity(model))


@pytest.mark.parametrize(("part", "factor"), [("diff_b", 1.0), ("lora_B.bias", 2.0)])
def test_a_bias_beside_the_change_of_the_input_layer(model, shapes, part, factor):
    """A full difference has its own; that of a LoRA's second matrix is scaled as the LoRA is."""
    bias = random(WIDTH, seed=4)
    whole = random(WIDTH, 2 * CHANNEL_COUNT, seed=1) / 8
    tensors = {"first.diff": whole, f"first.{part}": bias}
    if part != "diff_b":
        tensors = {
            "first.lora_A.weight": random(RANK, 2 * CHANNEL_COUNT, seed=1),
            "first.lora_B.weight": torch.zeros(WIDTH, RANK),
            "first.alpha": torch.tensor(2.0 * RANK),
            f"first.{part}": bias,
        }
    lora = control_lora(tensors, shapes)
    change = lora.live.change(model, "first", 0.5, torch.zeros(1, 3, CHANNEL_COUNT))
    assert_close(change, (0.5 * factor * bias).expand(1, 3, -1), 1e-6, "bias")
    if part == "diff_b":
        assert torch.equal(lora.projection, whole[:, CHANNEL_COUNT:])


def test_forms_are_told_by_tensors_and_name(tensors, tmp_path):
    widened_shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    plain = {"diffusion_model.blocks.0.attn.wq.lora_A.weight": (2, 8)}
    assert control_form(widened_shapes, "x") == CHANNELS
    assert control_form(plain, "krea2_turbo_openpose_controlnet.safetensors") == REFERENCES
    assert control_form(plain, "NK2E-canny-v0.1.safetensors") == REFERENCES
    assert control_form(plain, "x", {"ss_output_name": "my lineart"}) == REFERENCES
    for name in ("watercolour.safetensors", "controlled chaos", "game controllers"):
        assert control_form(plain, name) is None
    # A plain LoRA of the input layer.
    assert control_form({"first.lora_A.weight": (4, 64)}, "style") is None
    assert identify(tensors) == CONTROL_LORA
    spelled = ["first.weight", "blocks.0.attn.wq.lora_A.weight", "blocks.0.attn.wq.lora_B.weight"]
    assert identify(spelled) == CONTROL_LORA and identify(spelled[1:]) == LORA


def test_refused_files(tensors, shapes, tmp_path):
    def error(changed, form="auto", name="depth.safetensors"):
        with pytest.raises(ValueError) as caught:
            control_lora(changed, shapes, name, form=form)
        return str(caught.value)

    other = tensors | {"first.weight": torch.zeros(2 * WIDTH, 2 * CHANNEL_COUNT)}
    assert f"width {2 * WIDTH}" in error(other) and "another model" in error(other)
    wide = tensors | {"first.weight": torch.zeros(WIDTH, 3 * CHANNEL_COUNT)}
    assert "192 channels; this model needs width 128 and 128" in error(wide)
    plain = {n: t for n, t in tensors.items() if not n.startswith("first.")}
    assert "Load Krea 2 LoRA" in error(plain)
    assert "does not widen" in error(plain, CHANNELS)
    assert "widens" in error(tensors, REFERENCES)
    assert "form is 'depth'" in error(tensors, "depth")
    deeper = tensors | {
        f"blocks.9.attn.wq.{part}": tensors[f"blocks.0.attn.wq.{part}"] for part in "AB"
    }
    assert "another model" in error(deeper) and "3 blocks" in error(deeper)
    broken = tensors | {"first.weight": torch.full((WIDTH, 2 * CHANNEL_COUNT), torch.nan)}
    assert "NaN" in error(broken)
    for nowhere in ("first.weight", "first.bias"):
        odd = tensors | {
            nowhere: tensors[nowhere].clone().index_fill_(0, torch.tensor(3), torch.inf)
        }
        assert "infinity" in error(odd)
    odd = tensors | {"first.bias": torch.zeros(WIDTH // 2)}
    assert "another model: the bias" in error(odd)
    half = {"first.lora_A.weight": torch.zeros(2, 2 * CHANNEL_COUNT)}
    assert "half a LoRA" in error(half)
    # And as a plain LoRA a control LoRA is refused, by the right node.
    with pytest.raises(CheckpointError, match="Krea 2 Control LoRA"):
        read_lora(tensors, shapes)
    save_file(tensors, tmp_path / "canny.safetensors")
    lora = read_control_lora(tmp_path / "canny.safetensors", shapes)
    assert lora.form == CHANNELS and "24 weights of the transformer" in str(lora)


def test_refused_images_masks_and_numbers():
    picture = torch.zeros(3, 64, 64)
    with pytest.raises(ValueError, match="1 x 1 px"):
        check_images(torch.zeros(3, 1, 1), None)
    with pytest.raises(ValueError, match="32 x 64 px"):
        check_images(picture, torch.ones(1, 64, 32))
    with pytest.raises(ValueError, match="empty"):
        check_images(picture, torch.zeros(1, 64, 64))
    for bad in ({"strength": "1"}, {"strength": float("nan")}, {"start": 0.6, "end": 0.4}):
        with pytest.raises(ValueError, match="A control"):
            Control("x", picture, **bad)
    with pytest.raises(ValueError, match="method"):
        Control("x", picture, method="other")
    with pytest.raises(ValueError, match="Control"):
        Controls.of([torch.zeros(3)], {})


def test_a_mask_gives_each_token_its_share():
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    shares = share_of(mask)(4, 4).view(4, 4)
    assert torch.equal(shares, torch.tensor([0.0, 0, 1, 1]).expand(4, 4))
    # Cropped as the image is: a wide picture shows its middle.
    assert share_of(mask)(2, 4).view(2, 4).tolist() == [[0, 0, 1, 1]] * 2


def test_reference_tokens_act_on_text_and_references_in_their_window(model, tensors, shapes):
    """A LoRA of all layers, text fusion too, by steps, against merged weights."""
    import copy

    from krea2_model.features.prompt_embeds import PromptEmbeds, StepTexts
    from krea2_model.lora.updates import LoraStack

    name = "txtfusion.refiner_blocks.0.attn.wq.weight"
    rows, columns = shapes[name]
    plain = {n: t for n, t in tensors.items() if not n.startswith("first.")}
    plain |= {
        "txtfusion.refiner_blocks.0.attn.wq.A": random(RANK, columns, seed=7),
        "txtfusion.refiner_blocks.0.attn.wq.B": random(rows, RANK, seed=8),
    }
    plain = {
        n.replace(".A", ".lora_A.weight").replace(".B", ".lora_B.weight"): t
        for n, t in plain.items()
    }
    lora = control_lora(plain, shapes, "pose_controlnet.safetensors")
    assert lora.form == REFERENCES and lora.projection is None
    window = ControlSettings(1.0, 0.0, 0.5).window()
    run = RunFeatures(loras=(RunLora(lora.live, 0.9, window, on_references=True),))
    texts = StepTexts(PromptEmbeds(TAPS), model, 1, run)
    other = [Reference(random(1, 16, 4, 4, seed=9))]

    def predict(model, texts, features):
        steps = denoise(
            model, LATENTS, texts, sigmas=[1.0, 0.4, 0.0], guidance=0, references=other,
            features=features,
        )  # fmt: skip
        return [latents for _, latents, _ in steps]

    found = predict(model, texts, run)
    merged = copy.deepcopy(model)
    LoraStack(merged).add((lora.updates, 0.9))
    with torch.no_grad():
        expected = predict(merged, merged.fuse_text(TAPS), None)
        assert_close(found[0], expected[0], 1e-4, "inside the window")
        assert not torch.equal(texts(1.0).states, texts(0.4).states)
        assert torch.equal(texts(0.4).states, model.fuse_text(TAPS))
