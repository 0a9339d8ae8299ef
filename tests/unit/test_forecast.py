"""The forecast of a run beside counted ones: operations on meta at full width, live bytes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from krea2_model import (
    Control,
    Krea2Pipeline,
    Krea2Transformer,
    PromptBlend,
    Region,
    StyleTransfer,
    TileSettings,
    TransformerConfig,
    Upscale,
)
from krea2_model.features.tiles import tiles_at
from krea2_model.memory.forecast import call_operations
from krea2_model.memory.machine import GB
from krea2_model.memory.plan import TRANSFORMER, VAE
from krea2_model.nn import partial_attention
from krea2_model.text.prompt_tokens import tokenize_prompt
from krea2_model.transformer import backend
from live_bytes import LiveBytes
from samples import picture

META = torch.device("meta")


@pytest.fixture(scope="module")
def turbo():
    return Krea2Pipeline.nano()


@pytest.mark.parametrize(
    "pixels, text, references, batch", [(1024, 128, 0, 1), (2048, 300, 0, 2), (1024, 77, 512, 1)]
)
def test_operations_are_those_of_a_counted_call(pixels, text, references, batch):
    """At full width, within 1 %."""
    config = TransformerConfig()
    model = Krea2Transformer(config, device=META)
    latents = torch.empty(batch, 16, pixels // 8, pixels // 8, device=META)
    images = [torch.empty(batch, 16, references // 8, references // 8, device=META)]
    options = {"references": images} if references else {}
    states = torch.empty(batch, text, config.hidden_size, device=META)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(latents, torch.empty(batch, device=META), states, **options)
    tokens = (pixels // 16) ** 2, text, (references // 16) ** 2
    expected = counter.get_total_flops()
    assert call_operations(config, *tokens, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("size, batch", [(128, 1), (256, 2)])
def test_the_peak_bounds_a_counted_run(turbo, size, batch):
    """Live bytes of whole runs of krea2-nano beside its weights: never more, at least a third."""
    forecast = turbo.forecast(size, size, num_images=batch, text_tokens=40)
    with LiveBytes() as counted:
        turbo("a red star on white", width=size, height=size, num_images=batch, output_type="pt")
    expected = max(forecast.activations.values())
    assert expected / 3 < counted.peak <= expected
    parts = (turbo.transformer, turbo.text_encoder, turbo.vae)
    weights = sum(t.nbytes for part in parts for t in part.state_dict().values())
    assert forecast.peak == pytest.approx(weights + expected, rel=0.05)
    assert forecast.free is None and forecast.fits and not forecast.warning


def test_calls_follow_steps_guidance_and_tiles(turbo):
    plain = turbo.forecast()
    assert (plain.width, plain.steps, plain.calls, plain.image) == (128, 8, 8, 64)
    guided = turbo.forecast(steps=10, guidance=2.0)
    assert (guided.calls, guided.operations) == (20, 10 * guided.step_operations)
    assert guided.step_operations == 2 * plain.step_operations
    tiled = turbo.forecast(256, 256, tiles=TileSettings(128))
    assert (tiled.tiles, tiled.calls) == (9, 72)
    assert tiled.activations[TRANSFORMER] == plain.activations[TRANSFORMER]
    assert tiled.activations[VAE] == pytest.approx(4 * plain.activations[VAE])
    batch = turbo.forecast(256, 256, tiles=TileSettings(128, batch=2))
    assert batch.activations[TRANSFORMER] > 1.5 * plain.activations[TRANSFORMER]
    both = turbo.forecast(references=[(128, 64)])
    assert both.references == 32 and both.operations > plain.operations
    text = str(turbo.forecast(num_images=2, references=[(128, 64)]))
    for words in ("2 images of 128 x 128 px", "64 of the image", "32 of references", "8 steps"):
        assert words in text


@pytest.mark.parametrize(
    "options, calls",
    [
        ({"blend": PromptBlend("a blue circle", 0.4)}, 4),
        ({"blend": PromptBlend("a blue circle", 0.4), "guidance": 2.0}, 6),
        ({"blend": PromptBlend("a blue circle", 1.0)}, 2),
        ({"blend": PromptBlend("a blue circle", 0.0)}, 2),
        ({"blend": PromptBlend("a blue circle", 0.4), "upscale": Upscale(2, parts="whole")}, 12),
    ],
)
def test_calls_for_the_other_prompt_of_a_blend_are_counted(turbo, options, calls):
    made = []
    hook = turbo.transformer.register_forward_hook(lambda *_: made.append(1))
    try:
        turbo("a red star", width=64, height=64, steps=2, output_type="pt", **options)
    finally:
        hook.remove()
    found = turbo.forecast(64, 64, steps=2, text_tokens=4, **options)
    assert len(made) == calls == found.calls + (found.second.calls if found.second else 0)


def test_a_blend_takes_the_operations_of_both_texts_and_the_memory_of_the_longer(turbo):
    options = {"text_tokens": 9}
    long = "a red star, " * 40
    one, other = (turbo.forecast(blend=PromptBlend(long, share), **options) for share in (0, 1))
    both = turbo.forecast(blend=PromptBlend(long, 0.5), **options)
    assert one.operations == turbo.forecast(**options).operations
    assert both.operations == one.operations + other.operations
    assert both.activations == other.activations and other.text > 9 == both.text
    with pytest.raises(ValueError, match="expected a PromptBlend"):
        turbo.forecast(blend="a star")


def test_a_run_that_will_not_fit_says_what_to_change(turbo, monkeypatch):
    monkeypatch.setattr("krea2_model.memory.offload.free_device_bytes", lambda device: GB // 50)
    forecast = turbo.forecast(4096, 4096, num_images=4)
    assert not forecast.fits and forecast.free > GB // 50
    assert forecast.plan.lacking == forecast.peak + 400_000_000 - forecast.free
    for words in ("GB more than the device has", "one image at a time", "smaller size, or tiles"):
        assert words in forecast.warning
    assert "warning: The run needs" in str(forecast)


def test_a_second_stage_in_tiles_has_a_forecast_of_its_own(turbo):
    forecast = turbo.forecast(text_tokens=40, upscale=4)
    second = forecast.second
    assert (second.width, second.image, second.steps) == (512, 1024, 4)
    settings = Upscale(4).tiles(512, 512, turbo.preset)
    assert second.tiles == len(tiles_at((32, 32), settings, 0.4)) > 16
    assert second.activations[TRANSFORMER] == forecast.activations[TRANSFORMER]
    assert "then 512 x 512 px in" in str(forecast)


def test_texts_of_regions_and_control_references_are_counted(turbo):
    plain = turbo.forecast(text_tokens=40, guidance=2.0)
    regions = [Region("a red star", (0, 0, 0.5, 1)), Region("a blue box", (0.5, 0, 0.5, 1))]
    divided = turbo.forecast(text_tokens=40, guidance=2.0, regions=regions)
    assert 46 < divided.text < 80 and plain.text == 40
    # The negative text has none.
    added = divided.step_operations - plain.step_operations
    alone = turbo.forecast(text_tokens=divided.text, guidance=0).step_operations
    assert added == alone - turbo.forecast(text_tokens=40, guidance=0).step_operations
    lines = Control("krea2_nano_control_lora.safetensors", torch.zeros(3, 128, 128))
    assert turbo.forecast(text_tokens=40, control=lines).references == 0  # channels


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 2.0, "end": 0.6},
        {"weights": [1, 0], "first_block": 0.4, "start": 0.3},
        {"tiles": TileSettings(64)},
        {"upscale": Upscale(1.5, 0.5, tile=128), "denoise": 0.7},
    ],
)
def test_style_pictures_are_counted(turbo, options, monkeypatch):
    """Calls and operations of a whole run, with its inversion, to the last one."""
    monkeypatch.setattr(backend, "attend_partially", partial_attention._attend_in_chunks)
    names = ("end", "weights", "first_block", "start")
    own = {name: options[name] for name in names if name in options}
    run = {name: value for name, value in options.items() if name not in names}
    run |= {"width": 96, "height": 64, "steps": 3, "num_images": 2}
    run["style"] = StyleTransfer([picture(64, 64), picture(48, 80)], **own)
    calls = []
    hook = turbo.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    start = {"start_image": picture(64, 96)} if "denoise" in run else {}
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            turbo("a red star", "a red star", **run, **start)
    finally:
        hook.remove()
    expected = sum(counter.get_flop_counts()["Krea2Transformer"].values())
    prompt = tokenize_prompt(turbo.text_encoder.get_tokenizer(), "a red star")
    found = turbo.forecast(**run, text_tokens=len(prompt.weight_row))
    stages = [found] if found.second is None else [found, found.second]
    assert sum(stage.calls for stage in stages) == len(calls)
    assert sum(stage.operations for stage in stages) == pytest.approx(expected, rel=1e-4)
    plain = turbo.forecast(**{**run, "style": None}, text_tokens=len(prompt.weight_row))
    assert found.operations > 1.2 * plain.operations
    assert "of them of style pictures" in str(found) and "of style pictures" not in str(plain)
    assert found.activations[TRANSFORMER] > plain.activations[TRANSFORMER]


def test_the_second_stage_may_be_the_only_one(turbo):
    both = turbo.forecast(upscale=2)
    assert turbo.forecast(upscale=2, denoise=0) == both.second


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 0}, "width is 0"),
        ({"num_images": 0}, "num_images is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": -1}, "guidance is -1"),
        ({"text_tokens": 0}, "text_tokens is 0"),
        ({"tiles": 64}, "tiles is 64"),
        ({"upscale": 1}, "scale is 1"),
        ({"style": "a.png"}, "style is"),
        ({"denoise": 0}, "denoise is 0"),
    ],
)
def test_bad_arguments_are_named(turbo, options, message):
    with pytest.raises(ValueError, match=message):
        turbo.forecast(**options)


def test_dry_run_says_what_a_picture_takes_and_makes_none(krea2, nano_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ("--width", 256, "--height", 128, "--steps", 5, "--guidance", 2)
    lines = krea2("a red star on white", "--model", "nano", *size, "--dry-run")
    out = " ".join(map(str, lines))
    for words in ("256 x 128 px", "128 of the image, 10 of text", "10 in 5 steps", "GFLOP", "GB"):
        assert words in out
    assert not list(tmp_path.iterdir())
