"""Files of `krea2 train` in ComfyUI: core's loader on core's Krea 2, and ours, give one result."""

import pytest
import torch
from safetensors.torch import save_file

from parity import assert_close, relative_error

# Core knows no lengths (DoRA) in diffusers' names.
CASES = [
    (method, style)
    for method in ("lora", "dora", "lokr")
    for style in ("ai-toolkit", "kohya", "diffusers")
    if (method, style) != ("dora", "diffusers")
]


@pytest.mark.parametrize("method, style", CASES)
def test_core_and_our_loader_give_what_was_trained(
    run, models, turbo, core_turbo, velocity, method, style
):
    # Importable once `models` has put the repository on the path.
    from krea2_model import load_transformer
    from krea2_training.settings.sections import KEY_STYLES, Adapter
    from krea2_training.weights.adapters import adapters_of, file_tensors
    from trained_adapters import trained

    assert {style for _, style in CASES} == set(KEY_STYLES)
    with torch.inference_mode(False):
        file = models / "diffusion_models" / "krea2_tiny_turbo.safetensors"
        model = load_transformer(file, dtype=torch.float32)
        settings = Adapter(method, rank=4, alpha=6.0, targets="blocks+text")
        tensors = file_tensors(adapters_of(trained(model, settings)), style)
    name = f"trained_{method}_{style}.safetensors"
    (models / "loras").mkdir(exist_ok=True)
    save_file(tensors, models / "loras" / name)
    before = velocity(turbo)
    core = run("LoraLoaderModelOnly", model=core_turbo, lora_name=name, strength_model=1.0)[0]
    expected = velocity(core)
    core.detach()
    stock = run("LoraLoaderModelOnly", model=turbo, lora_name=name, strength_model=1.0)[0]
    assert_close(velocity(stock), expected, 1e-4, "core's loader on our model")
    stock.detach()
    ours, _, report = run("K2LoraLoader", model=turbo, lora=name, strength=1.0)
    assert "left out" not in report
    found = velocity(ours)
    ours.detach()
    assert relative_error(found, before) > 1e-3
    assert_close(found, expected, 1e-4, "beside core's model and loader")


@pytest.mark.parametrize("style", ["ai-toolkit", "kohya"])
def test_an_extracted_file_makes_one_model_the_other(
    run, models, raw, turbo, core_turbo, velocity, style
):
    """Norms and tables too, by core's loader on core's Krea 2 and by ours on ours."""
    from krea2_model import extract_lora

    folder, name = models / "diffusion_models", f"extracted_{style}.safetensors"
    with torch.inference_mode(False):
        extract_lora(
            folder / "krea2_tiny_raw.safetensors", folder / "krea2_tiny_turbo.safetensors",
            models / "loras" / name, rank=4096, dtype="fp32", key_style=style, differences=True,
        )  # fmt: skip
    expected, before = velocity(raw), velocity(turbo)
    for node, base in (("LoraLoaderModelOnly", core_turbo), ("LoraLoaderModelOnly", turbo)):
        stock = run(node, model=base, lora_name=name, strength_model=1.0)[0]
        found = velocity(stock)
        stock.detach()
        assert relative_error(found, before) > 0.1
        assert relative_error(found, expected) < 1e-3, node
    ours, _, report = run("K2LoraLoader", model=turbo, lora=name, strength=1.0)
    assert "left out" not in report
    found = velocity(ours)
    ours.detach()
    assert relative_error(found, expected) < 1e-3
