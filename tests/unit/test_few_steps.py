"""Few-step LoRAs by their names and metadata, and the settings that follow."""

import pytest
from safetensors.torch import load_file, save_file

from krea2_model import Krea2Pipeline, nano
from krea2_model.lora.few_steps import read_steps


@pytest.mark.parametrize(
    "name, steps",
    [
        ("Krea2-Turbo-Distill-4step-LoRA.safetensors", 4),
        ("krea2_turbo_distill_3-step_chk00133000.safetensors", 3),
        ("krea2_turbo_distill_8step_r64.safetensors", 8),
        ("krea2_lightning_4_steps_bf16.safetensors", 4),
        ("krea2_turbo_lora_rank_64_bf16.safetensors", 8),
        ("krea-2-turbo-lora-r64-kohya.safetensors", 8),
        # Styles, and snapshots of a training.
        ("dottrmstr-krea2t_c1-st6000.safetensors", None),
        ("krea2_turbo_style_step3000.safetensors", None),
        ("krea2_turbo_style_3000_steps.safetensors", None),
        ("krea2_turbo_style_10_steps500.safetensors", None),
        ("dance_2steps.safetensors", None),
        ("krea2_darkbrush.safetensors", None),
        ("retro_turbo_lora.safetensors", None),
        ("distilled_water_99step.safetensors", None),
    ],
)
def test_names(name, steps):
    assert read_steps(name) == steps


def test_metadata_wins():
    assert read_steps("fast_8step.safetensors", {"krea2.steps": "4"}) == 4
    assert read_steps("style.safetensors", {"krea2.steps": "many"}) is None


def test_the_pipeline_takes_its_steps(tmp_path):
    path = tmp_path / "krea2_turbo_lora_4step.safetensors"
    save_file(load_file(nano.LORA), path)
    pipeline = Krea2Pipeline.nano("raw")
    pipeline.load_lora(path, 0.5)
    assert pipeline.preset.steps == 28
    pipeline.unload_lora()
    report = pipeline.load_lora(path)
    assert "4 steps without guidance" in str(report)
    preset = pipeline.preset
    assert (preset.steps, preset.guidance, preset.mu, preset.size) == (4, 0.0, 1.15, 128)
    taken = []
    pipeline("a star", output_type="latent", callback=lambda step, *_: taken.append(step))
    assert taken == [1, 2, 3, 4]
    pipeline.unload_lora()
    assert pipeline.preset.steps == 28
