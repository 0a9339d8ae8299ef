"""The self-check node: what it says of this ComfyUI, of files, and of a MODEL and a CLIP."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def check(models, run):
    def call(**inputs):
        return run("K2SelfCheck", **inputs)[0]

    return call


def section(text, title):
    """The lines of a section, without their indent."""
    return [
        line.strip() for line in text.partition(f"\n\n{title}\n")[2].split("\n\n")[0].split("\n")
    ]


def test_every_section_can_be_read(check, turbo, run):
    clip = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    text = check(model=turbo, clip=clip)
    assert "could not be read" not in text
    for title in ("What is wrong", "Versions", "Devices", "Acceleration", "Model files", "CLIP"):
        assert section(text, title) != [""], title


def test_versions_and_devices_are_comfyui_s(check):
    import comfyui_version

    text = check()
    assert f"ComfyUI: {comfyui_version.__version__}" in section(text, "Versions")
    assert f"torch: {torch.__version__}" in section(text, "Versions")
    assert section(text, "Devices")[0].startswith("cpu: ")


def test_flags_keep_paths_and_addresses_to_themselves(check, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["main.py", "--lowvram", "--reserve-vram", "1.5", "--listen", "10.1.2.3",
         "--base-directory=/srv/secret", "--output-directory", "/srv/secret"],
    )  # fmt: skip
    text = check()
    flags = "flags: --lowvram --reserve-vram 1.5 --listen --base-directory --output-directory"
    assert flags in section(text, "Versions")
    assert "secret" not in text and "10.1.2.3" not in text


def test_files_are_named_by_their_place_alone(check, models):
    text = check()
    assert any(
        line.startswith("diffusion_models/krea2_tiny_turbo.safetensors: a Krea 2 transformer")
        for line in section(text, "Model files")
    )
    assert str(models) not in text and str(Path.home()) not in text


def test_wrong_files_are_told(check, models):
    misplaced = models / "loras" / "krea2_tiny_raw.safetensors"
    misplaced.parent.mkdir(exist_ok=True)
    shutil.copy(models / "diffusion_models" / misplaced.name, misplaced)
    nowhere = models / "vae" / "nowhere.safetensors"
    nowhere.symlink_to(models / "gone.safetensors")
    try:
        wrong = "\n".join(section(check(), "What is wrong"))
    finally:
        misplaced.unlink()
        nowhere.unlink()
    assert "Move it to models/diffusion_models" in wrong
    assert "There is no file vae/nowhere.safetensors" in wrong


def test_what_a_model_carries(check, turbo, run, models):
    turbo = run("K2ModelSampling", model=turbo, width=1024, height=1024)[0]
    turbo = turbo.clone()
    turbo.add_patches({"diffusion_model.first.weight": ("diff", (torch.zeros(256, 64),))}, 0.5)
    turbo.set_model_attn1_patch(lambda query, key, value, **_: {})
    turbo.model_options["transformer_options"]["optimized_attention_override"] = print
    lines = section(check(model=turbo), "MODEL")
    assert "settings: 8 steps, guidance 0.0, mu 1.15" in lines
    assert "LoRAs and merges: 1 x diff at 0.5" in lines
    assert "attention override: builtins" in lines
    other = next(line for line in lines if line.startswith("other patches"))
    assert "model_sampling" in other and "attn1_patch (test_self_check)" in other
    assert "torch.compile: no" in lines


def test_what_an_untouched_model_carries(check, turbo):
    lines = section(check(model=turbo), "MODEL")
    assert lines[-4:] == [
        "LoRAs and merges: none",
        "torch.compile: no",
        "attention override: none",
        "other patches: none",
    ]


def test_a_compiled_model_and_our_lora(check, run):
    model, clip, _ = run("K2Loader", model="krea2-nano (built in)")
    lora = "krea2-nano notebook (built in)"
    model = run("K2LoraLoader", model=model, lora=lora, strength=0.8)[0]
    lines = section(check(model=run("K2Compile", model=model)[0]), "MODEL")
    assert "LoRAs and merges: 48 x lora at 0.8" in lines
    assert "torch.compile: inductor" in lines


def test_quantised_weights_are_counted(check, models, run, tmp_path, pack):
    convert = pack("krea2_model.tools.convert").convert
    source = models / "diffusion_models" / "krea2_tiny_turbo.safetensors"
    target = source.with_name("krea2_tiny_fp8.safetensors")
    convert(source, target, "fp8")
    try:
        model = run("K2ModelLoader", file=target.name)[0]
        weights = next(x for x in section(check(model=model), "MODEL") if x.startswith("weights"))
        assert "x TensorCoreFP8E4M3" in weights
    finally:
        target.unlink()


def test_core_s_model_is_described_too(check, core_turbo):
    text = check(model=core_turbo)
    assert "kind: model_base.Krea2" in section(text, "MODEL")


def test_functions_replaced_by_custom_nodes_are_found(check, base, monkeypatch):
    import comfy.samplers

    assert section(check(), "Replaced by custom nodes") == ["nothing"]
    file = base / "custom_nodes" / "speedy" / "patch.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("def sampling_function(*args):\n    pass\n\n\nclass KSampler:\n    pass\n")
    spec = importlib.util.spec_from_file_location("speedy_patch", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "speedy_patch", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(comfy.samplers, "sampling_function", module.sampling_function)
    monkeypatch.setattr(comfy.samplers, "CFGGuider", module.KSampler)
    monkeypatch.setattr(comfy.samplers.KSampler, "sample", module.sampling_function)
    found = section(check(), "Replaced by custom nodes")
    assert "comfy.samplers.sampling_function by speedy" in found
    assert "comfy.samplers.KSampler.sample by speedy" in found
    assert "comfy.samplers.CFGGuider by speedy" in found


def test_what_an_older_comfyui_lacks_is_told(check, monkeypatch):
    import comfy.quant_ops

    known = {k: v for k, v in comfy.quant_ops.QUANT_ALGOS.items() if k != "convrot_w4a4"}
    monkeypatch.setattr(comfy.quant_ops, "QUANT_ALGOS", known)
    notes = "\n".join(section(check(), "Worth knowing"))
    assert "convrot_w4a4; files in them are refused. Update ComfyUI" in notes


def test_a_part_that_cannot_be_read_leaves_the_rest(check, monkeypatch):
    import comfy.model_management

    def fail(*_):
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(comfy.model_management, "get_torch_device_name", fail)
    text = check()
    assert "could not be read: RuntimeError: the driver is gone" in section(text, "Devices")
    assert section(text, "Versions") != [""]


def test_it_runs_anew_each_time():
    from in_process import NODES

    first = NODES["K2SelfCheck"].fingerprint_inputs()
    assert first != NODES["K2SelfCheck"].fingerprint_inputs() and first != first
