"""Krea 2 Regions: errors before expensive work, memory, other packs' attention, cancelled runs."""

import json

import pytest
import torch

from parity import assert_close, relative_error
from samples import image

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 0.5, 1]
TWO = [{"prompt": "a red circle", "box": LEFT}, {"prompt": "a blue star", "box": RIGHT}]
LATENT = {"samples": torch.zeros(1, 16, 1, 8, 8)}
LORA = {"prompt": "a red circle", "box": LEFT, "loras": [["krea2-nano notebook (built in)", 1.0]]}


@pytest.fixture(scope="module")
def nano(run):
    """MODEL and CLIP, and an encoded empty prompt."""
    model, clip = run("K2Loader", model="krea2-nano (built in)")[:2]
    positive, negative = run("K2TextEncode", clip=clip, prompt="", negative="")[:2]
    return {"model": model, "clip": clip, "positive": positive, "negative": negative}


@pytest.fixture(scope="module")
def with_regions(run, nano):
    def call(entries=TWO, **options):
        text = entries if isinstance(entries, str) else json.dumps(entries)
        return run("K2Regions", **{**nano, "regions": text, **options})

    return call


@pytest.fixture(scope="module")
def sample(run, nano):
    def call(positive, model=None, **options):
        latent = run("K2EmptyLatent", aspect="custom", width=64, height=64)[0]
        settings = {"preset": "custom", "steps": 2, "guidance": 0.0, "seed": 3, **options}
        inputs = {"model": model or nano["model"], "positive": positive, "latent": latent}
        return run("K2Sampler", **inputs, **settings)[0]["samples"]

    return call


@pytest.mark.parametrize(
    ("entries", "options", "words"),
    [
        ("{", {}, "regions cannot be read"),
        ("3", {}, "regions is 3; expected a JSON list"),
        ([], {}, "There are no regions; expected 1 to 8"),
        ([TWO[0]] * 9, {}, "There are 9 regions"),
        ([{"box": LEFT}], {}, "Region 1 has no prompt"),
        ([{"prompt": "a"}], {}, "Region 1 has neither a box nor a mask"),
        ([{"prompt": "a", "box": [0.6, 0, 0.6, 1]}], {}, "Region 1's box lies outside"),
        ([{"prompt": "a", "bx": LEFT}], {}, "Region 1 has 'bx'; expected only prompt, box"),
        ([{"prompt": "a", "mask": 1}], {}, "mask 1, but masks is not connected"),
        ([{"prompt": "a", "mask": 1}], {"masks": torch.zeros(1, 64, 64)}, "mask is empty"),
        (
            [{"prompt": "a", "mask": 1}],
            {"masks": torch.ones(1, 64, 32), "latent": LATENT},
            "expected the same aspect",
        ),
        ([{**TWO[0], "strength": -1}], {}, "strength is -1"),
        ([LORA], {"model": None}, "A region has LoRAs, which need the model"),
        ([{**LORA, "loras": ["a"]}], {}, r"expected a list of \[file, strength\]"),
        ([{**LORA, "loras": [["none.safetensors", 1]]}], {}, "There is no 'none.safetensors'"),
        (TWO, {"text_factor": 20.0}, "text_factor is 20.0"),
        (TWO, {"soft": 3.0}, "soft is 3.0"),
        ([{**TWO[0], "prompt": " "}], {}, "Region 1 has no prompt. Say what it shows"),
        ([TWO[0], {"prompt": "x", "box": [0, 0, 1, 1]}], {"latent": LATENT}, "1 lies below others"),
        ([{**TWO[0], "images": [1]}], {}, "image 1, but images is not connected"),
        ([{"prompt": "x", "mask": 2}], {"masks": torch.ones(1, 8, 8)}, "mask 2, but masks has 1"),
        (TWO, {"clip": None}, "clip is empty"),
        (TWO, {"prompt": "white"}, "Both positive and prompt"),
        (TWO, {"positive": None}, "Neither of the two"),
    ],
)
def test_bad_regions_are_refused_by_name(with_regions, entries, options, words):
    with pytest.raises(ValueError, match=words):
        with_regions(entries, **options)


def test_widgets_are_checked_before_a_run(pack):
    node = pack("nodes.regions").K2Regions
    assert "There are 9 regions" in node.validate_inputs(regions=json.dumps([TWO[0]] * 9))
    assert "outside" in node.validate_inputs(regions='[{"prompt": "a", "box": [0, 0, 2, 1]}]')
    assert node.validate_inputs(regions=json.dumps(TWO)) is True
    assert node.validate_inputs(regions=None) is True


def test_masks_are_checked_at_the_sampler_too(with_regions, sample):
    masks = torch.ones(1, 90, 30)
    with pytest.raises(ValueError, match="Region 1's mask is 30 x 90 px and the image 64 x 64"):
        sample(with_regions([{"prompt": "x", "mask": 1}], masks=masks, latent=None)[0])
    with pytest.raises(ValueError, match="has regions already"):
        with_regions(positive=with_regions()[0])


def test_the_report_and_the_preview(nano, with_regions):
    masks = torch.zeros(1, 32, 32)
    masks[:, :, 16:] = 1
    entries = [TWO[0], {"mask": 1, "loras": LORA["loras"]}]
    positive, negative, report, preview = with_regions(entries, masks=masks)
    assert report.splitlines()[:3] == [
        "Region 1: 50% of the image, 11 tokens",
        "Region 2: 50% of the image, no prompt",
        "Region 2: strength 1, krea2_nano_notebook_lora.safetensors: LoRA of ai-toolkit or "
        "ComfyUI, rank 8",
    ]
    assert preview.shape == (1, 512, 512, 3)
    assert preview[0, 20, 20, 0] > preview[0, 20, 20, 2] and preview[0, 20, 500, 2] > 0.9
    assert "krea2_regions" in positive[0][1] and "krea2_regions" in negative[0][1]
    # Without LoRAs there is nothing for it.
    assert with_regions()[1] is nano["negative"]


def test_a_prompt_of_its_own_gets_words_of_place(run, nano, with_regions):
    words = "white, a red circle on the left, a blue star on the right"
    expected = run("K2TextEncode", clip=nano["clip"], prompt=words)[0]
    found = with_regions(positive=None, prompt="white")[0]
    assert torch.equal(found[0][0], expected[0][0])


def test_images_of_regions(with_regions, sample):
    seen = [{**TWO[0], "images": [2]}, TWO[1]]
    images = torch.cat((image(64, 64, 1), image(64, 64, 2)))
    found = sample(with_regions(seen, images=images)[0])
    assert relative_error(found, sample(with_regions()[0])) > 1e-4
    alone = sample(with_regions([{**TWO[0], "images": [1]}, TWO[1]], images=images[1:])[0])
    assert_close(found, alone, 1e-6, "the second")


def test_core_s_own_model_is_refused_by_name(run, pack, nano, with_regions, models):
    core = run("K2ModelLoader", file="krea2_tiny_turbo.safetensors",
               implementation="ComfyUI's own")[0]  # fmt: skip
    with pytest.raises(ValueError, match="where regions have no effect"):
        with_regions(model=core)
    assert pack("nodes.managed.core_model").unknown_to(core, with_regions()[0]) == ["regions"]


def test_a_mask_is_the_box_that_it_paints(with_regions, sample):
    masks = torch.zeros(2, 64, 64)
    masks[0, :, :32], masks[1, :, 32:] = 1, 1
    painted = [{"prompt": e["prompt"], "mask": n} for n, e in enumerate(TWO, 1)]
    boxes, by_mask = (sample(with_regions(e, masks=masks)[0]) for e in (TWO, painted))
    assert torch.equal(boxes, by_mask)


def test_strength_0_and_an_empty_window_are_no_regions(nano, with_regions, sample):
    plain = sample(nano["positive"])
    for change in ({"strength": 0}, {"start": 0.5, "end": 0.5}):
        positive = with_regions([{**entry, **change} for entry in TWO])[0]
        assert torch.equal(sample(positive), plain)
    assert not torch.equal(sample(with_regions()[0]), plain)


def test_an_attention_function_of_another_pack_is_called(with_regions, sample, nano):
    """With masks, since it returns no sums: the same image."""
    from comfy.ldm.modules.attention import attention_pytorch

    calls = []

    def override(function, *args, **kwargs):
        calls.append(kwargs.get("mask") is not None)
        return attention_pytorch(*args, **kwargs)

    model = nano["model"].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    positive = with_regions([LORA, TWO[1]])[0]
    assert_close(sample(positive, model), sample(positive), 1e-4, "override")
    assert any(calls)


def test_regions_fused_in_the_run_are_those_fused_before(with_regions, sample, nano):
    """As where a wrapper of another pack may change the text at each step."""
    import comfy.patcher_extension

    def wrapper(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    model = nano["model"].clone()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper(kind, wrapper)
    positive = with_regions([LORA, TWO[1]])[0]
    assert_close(sample(positive, model), sample(positive), 1e-4, "fused at each step")


def test_a_cancelled_run_leaves_no_hooks(with_regions, sample, nano, monkeypatch):
    import comfy.model_management

    network = nano["model"].model.diffusion_model

    def cancel(*args):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(type(network.last), "forward", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(with_regions([LORA, TWO[1]])[0])
    assert not any(module._forward_hooks for module in network.modules())


def test_the_memory_of_regions_is_asked_for(nano, with_regions):
    model = nano["model"].model
    counted = model.memory_required([1, 16, 1, 16, 16], {"run_features": [(64,)]})
    plain = model.memory_required([1, 16, 1, 16, 16])
    config = model.diffusion_model.config
    width = 3 * config.hidden_size + 2 * config.intermediate_size
    assert counted - plain == pytest.approx(64 * width * 4 * 1.15)
