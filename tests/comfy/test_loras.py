"""K2LoraLoader in ComfyUI: beside core's own code, several at once, every way of loading."""

import json

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

from parity import assert_close, relative_error
from samples import random

QUERY, DOWN, TABLE = "blocks.0.attn.wq", "blocks.1.mlp.down", "blocks.1.mod.lin"


@pytest.fixture
def save(models):
    """Write a LoRA file; its name."""
    folder = models / "loras"
    folder.mkdir(exist_ok=True)
    written = []

    def call(name, tensors):
        path = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        written.append(path)
        return path.name

    yield call
    for path in written:
        path.unlink()


def low_rank(layers, shapes, seed=0, rank=4, prefix="diffusion_model.", alpha=None):
    """A LoRA of some layers, and what it adds to their weights."""
    tensors, changes = {}, {}
    for layer in layers:
        rows, columns = shapes[f"{layer}.weight"]
        down, up = random(rank, columns, seed=seed) * 0.2, random(rows, rank, seed=seed)
        tensors[f"{prefix}{layer}.lora_A.weight"] = down
        tensors[f"{prefix}{layer}.lora_B.weight"] = up
        if alpha is not None:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
        changes[f"{layer}.weight"] = up @ down * (1 if alpha is None else alpha / rank)
    return tensors, changes


@pytest.fixture
def shapes(turbo):
    state = turbo.model.diffusion_model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def styles(shapes):
    """Files that core reads as well as we do, on one layer."""
    rows, columns = shapes[f"{QUERY}.weight"]
    layer = f"diffusion_model.{QUERY}"
    lora = {
        f"{layer}.lora_down.weight": random(4, columns) * 0.2,
        f"{layer}.lora_up.weight": random(rows, 4),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    factors = {
        f"{layer}.lokr_w1": random(8, 8),
        f"{layer}.lokr_w2": random(rows // 8, columns // 8),
    }
    products = {
        f"{layer}.hada_{name}_{part}": random(*shape, seed=seed) * 0.5
        for seed, name in enumerate(("w1", "w2"))
        for part, shape in (("a", (rows, 3)), ("b", (3, columns)))
    }
    return {
        "LoRA": lora,
        "LoKr": factors,
        "LoHa": products,
        "DoRA over columns": lora | {f"{layer}.dora_scale": random(1, columns).abs() + 1},
        "full difference": {f"{layer}.diff": random(rows, columns) * 0.1},
    }


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize(
    "style", ["OFT", "OFT, limited", "BOFT", "BOFT, rescaled", "GLoRA", "GLoRA, older"]
)
def test_those_that_change_a_weight_by_what_it_holds(
    run, turbo, core_turbo, shapes, save, velocity, style, strength
):
    """As core's loader applies them to core's Krea 2, at every strength."""
    rows, columns = shapes[f"{QUERY}.weight"]
    layer = f"diffusion_model.{QUERY}"
    tensors = {
        "OFT": {"oft_blocks": random(rows // 8, 8, 8) * 0.1},
        "OFT, limited": {"oft_blocks": random(rows // 8, 8, 8), "alpha": torch.tensor(2.0)},
        "BOFT": {"oft_blocks": random(3, rows // 8, 8, 8) * 0.1, "alpha": torch.tensor(0.0)},
        "BOFT, rescaled": {"oft_blocks": random(2, rows // 4, 4, 4) * 0.1,
                           "alpha": torch.tensor(0.0), "rescale": 1 + random(rows, 1) * 0.1},
        "GLoRA": {"a1.weight": random(columns, 4) * 0.1, "a2.weight": random(4, columns) * 0.1,
                  "b1.weight": random(rows, 4) * 0.1, "b2.weight": random(4, columns) * 0.1,
                  "alpha": torch.tensor(2.0)},
        "GLoRA, older": {
            "a1.weight": random(4, columns) * 0.1, "a2.weight": random(columns, 4) * 0.1,
            "b1.weight": random(4, columns) * 0.1, "b2.weight": random(rows, 4) * 0.1,
        },
    }[style]  # fmt: skip
    name = save("rotating", {f"{layer}.{part}": tensor for part, tensor in tensors.items()})
    before = velocity(turbo)
    core = run("LoraLoaderModelOnly", model=core_turbo, lora_name=name, strength_model=strength)[0]
    expected = velocity(core)
    assert relative_error(expected, before) > 1e-3
    core.detach()
    for model in (turbo, core_turbo):
        patched, _, report = run("K2LoraLoader", model=model, lora=name, strength=strength)
        assert style.split(",")[0] in report and "left out" not in report
        assert_close(velocity(patched), expected, 1e-5, f"{style} at {strength}")
        patched.detach()


@pytest.mark.parametrize("config, scale", [
    ({"transformer.r": 4, "transformer.lora_alpha": 16}, 4.0),
    ({"r": 4, "lora_alpha": 4, "use_rslora": True}, 2.0),
])  # fmt: skip
def test_the_scale_of_the_header(run, turbo, shapes, save, models, config, scale):
    tensors, changes = low_rank([QUERY], shapes)
    name = save("header", tensors)
    save_file(tensors, models / "loras" / name, {"lora_adapter_metadata": json.dumps(config)})
    patched, _, report = run("K2LoraLoader", model=turbo, lora=name, strength=1.0)
    assert f"scale {scale:g} (lora_adapter_metadata" in report
    (patch,) = patched.patches[f"diffusion_model.{QUERY}.weight"]
    weight = turbo.model.diffusion_model.get_parameter(f"{QUERY}.weight")
    key = f"diffusion_model.{QUERY}.weight"
    found = comfy.lora.calculate_weight([patch], weight.float().clone(), key)
    assert_close(found - weight.float(), scale * changes[f"{QUERY}.weight"], 1e-4, "header")


def test_a_refused_lora_leaves_the_model_and_the_next_one_works(run, turbo, shapes, save, velocity):
    tensors, _ = low_rank([QUERY], shapes)
    good = save("good", tensors)
    rows = shapes[f"{DOWN}.weight"][0]
    broken = low_rank([DOWN], shapes)[0]
    broken[f"diffusion_model.{DOWN}.lora_B.weight"] = torch.full((rows, 4), float("nan"))
    bad = save("bad", tensors | broken)
    before = velocity(turbo)
    with pytest.raises(ValueError, match=f"bad.safetensors holds NaN.*{DOWN}"):
        run("K2LoraLoader", model=turbo, lora=bad)
    assert torch.equal(velocity(turbo), before)
    patched = run("K2LoraLoader", model=turbo, lora=good, strength=1.0)[0]
    assert relative_error(velocity(patched), before) > 1e-3
    patched.detach()


def test_what_float16_cannot_hold_is_refused(run, models, shapes, save):
    """Finite numbers, which bfloat16 takes and float16 does not."""
    rows, columns = shapes[f"{QUERY}.weight"]
    layer = f"diffusion_model.{QUERY}"
    name = save("huge", {f"{layer}.lora_A.weight": torch.full((1, columns), 1000.0),
                         f"{layer}.lora_B.weight": torch.full((rows, 1), 50.0)})  # fmt: skip
    for dtype, strength, fits in (("fp16", 1.0, True), ("fp16", 2.0, False), ("bf16", 2.0, True)):
        model = run("K2ModelLoader", file="krea2_tiny_turbo.safetensors", dtype=dtype)[0]
        if fits:
            run("K2LoraLoader", model=model, lora=name, strength=strength)
        else:
            with pytest.raises(ValueError, match=f"strength 2 makes {QUERY}.weight infinite"):
                run("K2LoraLoader", model=model, lora=name, strength=strength)


@pytest.mark.parametrize("style", ["LoRA", "LoKr", "LoHa", "DoRA over columns", "full difference"])
def test_beside_core(run, turbo, core_turbo, shapes, save, velocity, style):
    """On our MODEL and on core's, through our node and through core's: the same image."""
    name = save("style", styles(shapes)[style])
    before = velocity(turbo)
    core = run("LoraLoaderModelOnly", model=core_turbo, lora_name=name, strength_model=0.6)[0]
    expected = velocity(core)
    assert relative_error(expected, before) > 1e-3
    core.detach()
    stock = run("LoraLoaderModelOnly", model=turbo, lora_name=name, strength_model=0.6)[0]
    assert_close(velocity(stock), expected, 1e-5, f"{style} by core on ours")
    stock.detach()
    ours = run("K2LoraLoader", model=turbo, lora=name, strength=0.6)[0]
    assert_close(velocity(ours), expected, 1e-5, f"{style} by us on ours")
    ours.detach()
    on_core = run("K2LoraLoader", model=core_turbo, lora=name, strength=0.6)[0]
    assert_close(velocity(on_core), expected, 1e-5, f"{style} by us on core's")
    on_core.detach()
    assert torch.equal(velocity(turbo), before), "nothing stays behind"


def test_several_at_once(run, turbo, shapes, save):
    """Each with its own strength, below 0 too, beside one of core's loader."""
    original = {name: t.clone() for name, t in turbo.model.diffusion_model.state_dict().items()}
    expected, patched = dict(original), turbo
    for seed, (strength, node) in enumerate(
        ((0.8, "K2LoraLoader"), (-0.5, "K2LoraLoader"), (1.3, "LoraLoaderModelOnly"))
    ):
        tensors, changes = low_rank([QUERY, DOWN][: seed + 1], shapes, seed, alpha=2.0)
        name = save(f"several{seed}", tensors)
        if node == "K2LoraLoader":
            patched = run(node, model=patched, lora=name, strength=strength)[0]
        else:
            patched = run(node, model=patched, lora_name=name, strength_model=strength)[0]
        for weight, change in changes.items():
            expected[weight] = expected[weight] + strength * change
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    state = patched.model.diffusion_model.state_dict()
    for name in original:
        assert_close(state[name], expected[name], 1e-6, name)
    assert not torch.equal(state[f"{QUERY}.weight"], original[f"{QUERY}.weight"])
    patched.detach()


def test_strength_zero_and_opposite_strengths_are_nothing(run, turbo, shapes, save, velocity):
    before = velocity(turbo)
    name = save("zero", low_rank([QUERY], shapes)[0])
    zero = run("K2LoraLoader", model=turbo, lora=name, strength=0.0)[0]
    assert torch.equal(velocity(zero), before)
    zero.detach()
    twice = turbo
    for strength in (0.7, -0.7):
        twice = run("K2LoraLoader", model=twice, lora=name, strength=strength)[0]
    assert_close(velocity(twice), before, 1e-5, "there and back")
    twice.detach()


def test_bfloat16_weights_are_rounded_once(run, models, shapes, save):
    """The float32 result of the file's 16 bits, rounded to them: to the last bit."""
    ours = run("K2ModelLoader", file="krea2_tiny_turbo.safetensors", dtype="bf16")[0]
    original = ours.model.diffusion_model.blocks[0].attn.wq.weight.clone()
    assert original.dtype == torch.bfloat16
    tensors, changes = low_rank([QUERY], shapes)
    patched = run("K2LoraLoader", model=ours, lora=save("rounded", tensors), strength=0.3)[0]
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    weight = patched.model.diffusion_model.blocks[0].attn.wq.weight
    up, down = (tensors[f"diffusion_model.{QUERY}.lora_{part}.weight"] for part in "BA")
    expected = original.float().add(up @ down, alpha=0.3).bfloat16()
    # Core adds noise before it rounds to 8 bits, never to 16.
    assert torch.equal(weight, expected)
    patched.detach()


def test_text_encoder_layers(run, models, turbo, shapes, save):
    """A file with layers of both: each goes to its model at its own strength."""
    clip = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    layer = "layers.3.mlp.up_proj"
    stored = load_file(models / "text_encoders" / "qwen3vl_tiny.safetensors")
    weight = stored[f"model.{layer}.weight"].float()
    down, up = random(4, weight.shape[1]) * 0.3, random(weight.shape[0], 4)
    tensors = low_rank([QUERY], shapes)[0] | {
        f"lora_te_model_{layer.replace('.', '_')}.lora_down.weight": down,
        f"lora_te_model_{layer.replace('.', '_')}.lora_up.weight": up,
    }
    name = save("both", tensors)
    before = clip.encode_from_tokens(clip.tokenize("a fox"))
    model, patched, report = run(
        "K2LoraLoader", model=turbo, clip=clip, lora=name, strength=1.0, clip_strength=-0.5
    )
    assert "1 weight of the transformer matched, 1 of the text encoder" in report
    found = patched.encode_from_tokens(patched.tokenize("a fox"))
    changed = dict(stored)
    changed[f"model.{layer}.weight"] = weight - 0.5 * (up @ down)
    path = models / "text_encoders" / "changed_encoder.safetensors"
    save_file(changed, path)
    reference = run("K2TextEncoderLoader", file=path.name)[0]
    expected = reference.encode_from_tokens(reference.tokenize("a fox"))
    path.unlink()
    assert relative_error(found, before) > 1e-3
    assert_close(found, expected, 1e-5, "text encoder with LoRA")
    patched.patcher.detach()
    again = clip.encode_from_tokens(clip.tokenize("a fox"))
    assert_close(again, before, 1e-6, "text encoder without it again")


def test_dynamic_vram(run, turbo, shapes, save, dynamic_patcher):
    """NVIDIA's default patcher copies a patch's tensors to the device and builds it anew there."""
    tensors, changes = low_rank([QUERY, DOWN], shapes)
    tensors[f"diffusion_model.{TABLE}.diff"] = random(*shapes[f"{TABLE}.weight"])
    changes[f"{TABLE}.weight"] = tensors[f"diffusion_model.{TABLE}.diff"]
    patched = run("K2LoraLoader", model=turbo, lora=save("dynamic", tensors), strength=0.4)[0]
    patcher = dynamic_patcher(turbo.model)
    patcher.patches, patcher.patches_uuid = patched.patches, patched.patches_uuid
    original = {name: t.clone() for name, t in turbo.model.diffusion_model.state_dict().items()}
    patcher.load(torch.device("cpu"))
    for name, change in changes.items():
        layer = patcher.model.diffusion_model.get_submodule(name.rpartition(".")[0])
        attached = getattr(layer, "weight_lowvram_function", None)
        weight = layer.weight
        if attached is not None:
            # As ops.cast_modules_with_vbar does it: one buffer for all of the patch's tensors.
            buffer = torch.empty(attached.memory_required(), dtype=torch.uint8)
            assert buffer.numel() > 0
            attached.prepare(buffer, None, copy=True)
            kept = [patch[1].weights[2] for patch in attached.prepared_patches]
            start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
            assert all(start <= tensor.data_ptr() < end for tensor in kept)
            weight = attached(original[name].clone())
            buffer.zero_()
            assert torch.equal(attached(original[name].clone()), original[name]), "uses the buffer"
            attached.clear_prepared()
        assert_close(weight, original[name] + 0.4 * change, 1e-6, name)
    patcher.restore_loaded_backups()


@pytest.mark.parametrize("kind", ["full_diff", "standard"])
def test_raw_to_turbo(run, models, raw, turbo, velocity, kind):
    """The difference of two checkpoints as core's extraction writes it turns Raw into Turbo."""
    from comfy_extras.nodes_lora_extract import LoraSave

    expected, before = velocity(turbo), velocity(raw)
    difference = run("ModelMergeSubtract", model1=turbo, model2=raw, multiplier=1.0)[0]
    LoraSave.execute(f"{kind}/lora", rank=256, lora_type=kind, bias_diff=True,
                     model_diff=difference)  # fmt: skip
    (file,) = (models.parent / "output" / kind).glob("lora*.safetensors")
    difference.detach()
    file = file.rename(models / "loras" / f"raw_to_turbo_{kind}.safetensors")
    patched, _, report = run("K2LoraLoader", model=raw, lora=file.name, strength=1.0)
    assert "left out" not in report
    found = velocity(patched)
    patched.detach()
    stock = run("LoraLoaderModelOnly", model=raw, lora_name=file.name, strength_model=1.0)[0]
    assert_close(found, velocity(stock), 1e-5, f"{kind} by core")
    stock.detach()
    assert relative_error(before, found) > 0.3
    if kind == "full_diff":  # of low ranks core clips the largest numbers, and keeps 16 bits
        assert relative_error(found, expected) < 5e-3
    file.unlink()


@pytest.mark.parametrize("strength, steps", [(1.0, 4), (0.5, 28)])
def test_a_few_step_lora_gives_preset_auto_its_steps(run, raw, shapes, save, strength, steps):
    name = save("krea2_distill_4step", low_rank([QUERY], shapes)[0])
    patched, _, report = run("K2LoraLoader", model=raw, lora=name, strength=strength)
    assert "4 steps without guidance" in report
    latent = run("K2EmptyLatent", aspect="custom", width=64, height=64)[0]
    sigmas = run("K2Sigmas", model=patched, latent=latent)[0]
    assert len(sigmas) == steps + 1
    assert len(run("K2Sigmas", model=raw, latent=latent)[0]) == 29


def test_a_file_for_another_model_is_an_error(run, turbo, save):
    name = save("flux", {
        f"lora_unet_double_blocks_0_img_attn_qkv.{part}": random(4, 4)
        for part in ("lora_down.weight", "lora_up.weight")
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"flux\.safetensors changes nothing"):
        run("K2LoraLoader", model=turbo, lora=name)


def test_a_partial_match_is_a_warning(run, turbo, shapes, save, caplog):
    tensors = low_rank([QUERY], shapes)[0]
    tensors |= low_rank([QUERY], shapes, prefix="diffusion_model.blocks.99.")[0]
    _, clip, report = run("K2LoraLoader", model=turbo, lora=save("partial", tensors))
    assert clip is None and "left out: diffusion_model.blocks.99." in report
    (record,) = [r for r in caplog.records if "Krea 2 LoRA" in r.getMessage()]
    assert record.levelname == "WARNING"
