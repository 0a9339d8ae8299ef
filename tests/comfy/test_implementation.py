"""Our files, presets and reports on ComfyUI's own implementation of the transformer."""

import dataclasses

import comfy.model_base
import comfy.quant_ops
import pytest
import torch
from safetensors.torch import save_file

import formats
import tiny_checkpoints
from in_process import NODES
from parity import assert_close, relative_error

OWN = "ComfyUI's own"
TURBO = "krea2_tiny_turbo.safetensors"


@pytest.fixture
def core_s(models, run):
    return lambda file=TURBO, **options: run(
        "K2ModelLoader", file=file, implementation=OWN, **options
    )[0]


def test_it_is_core_s(run, core_s, core_turbo, conditioning, latent):
    model = core_s()
    assert type(model.model.diffusion_model) is type(core_turbo.model.diffusion_model)
    assert isinstance(model.model, comfy.model_base.Krea2) and model.model.preset.name == "turbo"
    ours, theirs = (m.model.state_dict() for m in (model, core_turbo))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    inputs = {"positive": conditioning(6, 1), "latent": latent, "seed": 3, "preset": "turbo"}
    images = [run("K2Sampler", model=m, **inputs)[0]["samples"] for m in (model, core_turbo)]
    assert torch.equal(*images)
    loader, arguments = model.cached_patcher_init
    again = loader(*arguments, disable_dynamic=True)
    assert torch.equal(run("K2Sampler", model=again, **inputs)[0]["samples"], images[0])


# Older ones have no layers in 8-bit integers.
QUANTISED = ["fp8_scaled"] + ["int8"] * ("int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_it_quantises_as_it_loads(run, core_s, velocity, dtype):
    ours = run("K2ModelLoader", file=TURBO, dtype=dtype)[0]
    model = core_s(dtype=dtype)
    assert model.model_size() < 0.7 * core_s().model_size()
    # A last digit flips a step of 8-bit activations.
    limit = 1e-2 if dtype == "int8" else 1e-5
    assert_close(velocity(model), velocity(ours), 10 * limit, dtype)


@pytest.mark.parametrize("form", ["Q8_0", "fp8, low-rank branches"])
def test_files_that_core_s_loader_does_not_read(run, core_s, models, velocity, form):
    folder = models / "diffusion_models"
    tensors = tiny_checkpoints.transformer_tensors(dtype=torch.float32)
    path = folder / ("odd_turbo.gguf" if form == "Q8_0" else "odd_turbo.safetensors")
    if form == "Q8_0":
        formats.gguf_file(tensors, path, form)
    else:
        stored, _, metadata = formats.with_branches(formats.float8)(tensors)
        save_file(stored, path, metadata)
    expected = velocity(run("K2ModelLoader", file=path.name)[0])
    assert_close(velocity(core_s(path.name)), expected, 1e-4, form)
    path.unlink()


def test_loras_of_our_loader_reach_it(run, core_s, turbo, base, velocity):
    down, up = torch.randn(4, 256), torch.randn(256, 4)
    (base / "models" / "loras").mkdir(exist_ok=True)
    save_file({"lora_unet_blocks_0_attn_wq.lora_down.weight": down,
               "lora_unet_blocks_0_attn_wq.lora_up.weight": up,
               "diffusion_model.blocks.1.prenorm.scale.diff": torch.randn(256)},
              base / "models" / "loras" / "both.safetensors")  # fmt: skip
    found, expected = (
        velocity(run("K2LoraLoader", model=model, lora="both.safetensors")[0])
        for model in (core_s(), turbo)
    )
    assert relative_error(expected, velocity(turbo)) > 1e-3
    assert_close(found, expected, 1e-5, "a LoRA on core's implementation")


def test_what_has_no_effect_there_is_said(run, pack, core_s, turbo, conditioning, latent):
    settings = pack("krea2_model.transformer.references").ReferenceSettings(strength=2.0)
    model = core_s()
    with pytest.raises(ValueError, match="implementation this pack"):
        run("K2NegativeGuidance", model=model, negative=conditioning(4, 2))
    reference = {
        "reference_latents": [torch.zeros(1, 16, 1, 8, 8)],
        "reference_latents_method": "index",
        "krea2_references": [settings],
    }
    weights = {"krea2_token_weights": torch.full((1, 6), 2.0)}

    def report(model, **extra):
        output = NODES["K2Sampler"].execute(
            model=model, positive=conditioning(6, 1, **extra), latent=latent, preset="turbo"
        )
        return str(output.ui.as_dict() if hasattr(output.ui, "as_dict") else output.ui)

    assert "strength, start and end of references" in report(model, **reference)
    assert "prompt weights" in report(model, **weights)
    assert "own implementation" not in report(turbo, **weights) + report(model)


def test_sizes_that_core_cannot_have_are_refused(core_s, models):
    odd = dataclasses.replace(tiny_checkpoints.TRANSFORMER, intermediate_size=640)
    path = models / "diffusion_models" / "odd_turbo.safetensors"
    save_file(tiny_checkpoints.transformer_tensors(odd), path)
    with pytest.raises(ValueError, match="640 .* implementation of this pack"):
        core_s(path.name)
    path.unlink()


def test_unknown_choices_are_named(run, models):
    with pytest.raises(ValueError, match="implementation is 'core'"):
        run("K2ModelLoader", file=TURBO, implementation="core")
