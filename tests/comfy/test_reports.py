"""What the nodes show after a run, and the size that swap turns."""

import shutil

import pytest

from in_process import NODES


def shown(node_id: str, **inputs) -> list[str]:
    """The lines that a node puts under its inputs, short enough not to widen it."""
    (text,) = NODES[node_id].execute(**inputs).ui.as_dict()["text"]
    lines = text.split("\n")
    assert max(map(len, lines)) <= 40
    return lines


@pytest.mark.parametrize(
    "inputs, lines",
    [
        (dict(aspect="16:9"), ["1360 x 768 px, 1.00 megapixels"]),
        (dict(aspect="16:9", swap=True), ["768 x 1360 px, 1.00 megapixels"]),
        (
            dict(aspect="custom", width=1000, height=500, swap=True),
            ["512 x 1008 px, 0.49 megapixels,", "rounded up from 500 x 1000"],
        ),
    ],
)
def test_size_tells_what_it_made(run, inputs, lines):
    assert shown("K2EmptyLatent", **inputs) == lines
    latent, width, height = run("K2EmptyLatent", **inputs)
    assert latent["samples"].shape == (1, 16, 1, height // 8, width // 8)
    assert lines[0].startswith(f"{width} x {height} px")


def test_prompt_tells_its_tokens(run, models):
    clip = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    assert shown("K2TextEncode", clip=clip, prompt="a fox") == ["prompt: 2 tokens of 507"]
    assert shown("K2TextEncode", clip=clip, prompt="fox", negative="a blurry fox") == [
        "prompt: 1 token of 507",
        "negative: 3 tokens of 507",
    ]
    long = "fox " * 599 + "fox"
    assert shown("K2TextEncode", clip=clip, prompt=long) == [
        "prompt: 600 tokens of 507,",
        "more than the model was trained on",
    ]
    assert shown("K2TextEncode", clip=clip, prompt=long, official_length=True) == [
        "prompt: 507 tokens of 507"
    ]


@pytest.fixture
def conditions(conditioning):
    return {"positive": conditioning(6, 1), "negative": conditioning(5, 2)}


def test_sampler_tells_what_it_took(turbo, raw, latent, conditions):
    assert shown("K2Sampler", model=turbo, latent=latent, **conditions) == [
        "auto: turbo, 8 steps, mu 1.15",
        "guidance 0 (cfg 1)",
        "192 x 128 px, 96 tokens",
    ]
    inputs = dict(model=raw, latent=latent, **conditions)
    assert shown("K2Sampler", **inputs, steps=12, guidance=2.0) == [
        "auto: raw, 28 steps, mu 0.4831",
        "guidance 4.5 (cfg 5.5)",
        "192 x 128 px, 96 tokens",
        "not used: steps 12, guidance 2",
        "(needs preset custom)",
    ]
    custom = dict(preset="custom", steps=2, guidance=1.5, denoise=0.5)
    assert shown("K2Sampler", **inputs, **custom) == [
        "custom, 2 steps, mu 0.4831",
        "guidance 1.5 (cfg 2.5)",
        "starts at sigma 0.618",
        "192 x 128 px, 96 tokens",
    ]


def test_schedule_and_shift_tell_what_they_took(turbo, raw, latent):
    batch = {"samples": latent["samples"].expand(3, -1, -1, -1, -1)}
    assert shown("K2Sigmas", model=turbo, latent=batch, preset="turbo") == [
        "turbo, 8 steps, mu 1.15",
        "3 images, each 192 x 128 px, 96 tokens",
    ]
    assert shown("K2ModelSampling", model=raw, width=1024, height=1024) == [
        "mu 0.9062",
        "1024 x 1024 px, 4096 tokens",
    ]


def test_loaders_tell_the_settings_of_their_files(models, pack):
    """Before a run, from headers alone; the page shows them on the sampler."""
    key = pack("nodes.inputs").SETTINGS
    for node_id, name in (("K2Loader", "model"), ("K2ModelLoader", "file")):
        inputs = {entry.id: entry.as_dict() for entry in NODES[node_id].define_schema().inputs}
        settings = inputs[name][key]
        assert settings["krea2-nano (built in)"] == ("turbo, 8 steps, mu 1.15\nguidance 0 (cfg 1)")
        assert settings["krea2-nano Raw (built in)"] == (
            "raw, 28 steps, mu by size\nguidance 3.5 (cfg 4.5)"
        )
        assert settings["krea2_tiny_raw.safetensors"].startswith("raw, 28 steps")


def test_a_file_without_settings_is_left_out(models, pack):
    """A name without raw or turbo, and no metadata: nothing is guessed."""
    file = models / "diffusion_models" / "someone.safetensors"
    shutil.copy(models / "diffusion_models" / "krea2_tiny_raw.safetensors", file)
    try:
        settings = pack("nodes.model_files").settings_of_models()
    finally:
        file.unlink()
    assert "someone.safetensors" not in settings and "krea2_tiny_turbo.safetensors" in settings
