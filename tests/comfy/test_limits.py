"""What a schema says of a number holds for every input, also where a node checks inputs itself."""

import inspect
import math
import re

import pytest
import torch

from in_process import NODES


def named_numbers():
    """Node, and input with limits that its `validate_inputs` names: ComfyUI leaves them alone."""
    for node in NODES.values():
        if "validate_inputs" not in vars(node):
            continue
        named = inspect.getfullargspec(node.validate_inputs).args
        for entry in node.GET_SCHEMA().inputs:
            if entry.id in named and getattr(entry, "max", None) is not None:
                yield node, entry


def test_there_are_some():
    found = {(node.__name__, entry.id) for node, entry in named_numbers()}
    assert {("K2Sampler", "steps"), ("K2Sampler", "guidance"), ("K2Reference", "index")} <= found
    assert len(found) >= 18


@pytest.mark.parametrize(
    "node, entry", [pytest.param(n, e, id=f"{n.__name__}-{e.id}") for n, e in named_numbers()]
)
def test_limits_of_the_schema_hold(node, entry):
    step = 1 if isinstance(entry.default, int) else 0.01
    for value in (entry.min - step, entry.max + step, entry.max * 1000 + 1, -1e30, 1e30,
                  math.nan, math.inf):  # fmt: skip
        found = node.validate_inputs(**{entry.id: value})
        assert found is not True and entry.id in found, value
    for value in (entry.min, entry.default, entry.max):
        assert node.validate_inputs(**{entry.id: value}) is True, value


@pytest.mark.parametrize("options, message", [
    ({"steps": 10_000}, "steps is 10000; expected a whole number from 1 to 1000"),
    ({"guidance": 1000.0}, "guidance is 1000.0; expected a number from 0.0 to 100.0"),
    ({"guidance": 1e30}, "guidance is 1e[+]30; expected"),
    ({"seed": 2**64}, "seed is 18446744073709551616; expected a whole number from 0 to"),
    ({"seed": -1}, "seed is -1; expected"),
    ({"mu": 11.0}, "mu is 11.0; expected a number from -10.0 to 10.0"),
])  # fmt: skip
def test_values_of_links_are_checked_before_the_run(
    run, turbo, conditioning, latent, options, message
):
    """They are not known when ComfyUI validates."""
    with pytest.raises(ValueError, match=message):
        run("K2Sampler", model=turbo, positive=conditioning(6, 1), latent=latent, **options)


@pytest.mark.parametrize("sampler", ["euler", "er_sde", "dpmpp_sde", "ddim"])
def test_the_last_seed_is_one(run, turbo, conditioning, latent, sampler):
    for seeds in ("one for the batch", "one an image"):
        run("K2Sampler", model=turbo, positive=conditioning(6, 1), latent=latent, seed=2**64 - 1,
            sampler=sampler, seeds=seeds)  # fmt: skip


def test_comfyui_itself_refuses_them(models):
    """Through the validation of a posted graph."""
    import asyncio

    import execution

    import nodes

    graph = {
        "1": {"class_type": "K2ModelLoader", "inputs": {
            "file": "krea2_tiny_turbo.safetensors", "dtype": "auto"}},
        "2": {"class_type": "K2EmptyLatent", "inputs": {
            "aspect": "1:1", "megapixels": 1.0, "width": 64, "height": 64, "batch": 1}},
        "3": {"class_type": "K2Sigmas", "inputs": {
            "model": ["1", 0], "latent": ["2", 0], "preset": "custom", "steps": 10_000,
            "denoise": 1.0, "shift": "auto", "mu": 1.15}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }  # fmt: skip
    missing = {name: node for name, node in NODES.items() if name not in nodes.NODE_CLASS_MAPPINGS}
    nodes.NODE_CLASS_MAPPINGS.update(missing)
    from comfy_extras.nodes_preview_any import PreviewAny

    nodes.NODE_CLASS_MAPPINGS["PreviewAny"] = PreviewAny
    good, error, _, errors = asyncio.run(execution.validate_prompt("1", graph, None))
    assert not good, error
    assert "steps is 10000; expected a whole number from 1 to 1000" in str(errors)
    graph["3"]["inputs"]["steps"] = 1000
    assert asyncio.run(execution.validate_prompt("1", graph, None))[0]


# Inputs of other types than numbers, texts and choices, by node.
TYPED = {
    "K2Vary": {}, "K2Walk": {"start": []}, "K2PictureSettings": {},
    "K2SparseAttention": {"model": 0}, "K2TiledSampling": {"model": 0, "clip": 1},
    "K2RotaryScaling": {"model": 0}, "K2Styles": {"model": 0, "clip": 1, "vae": 2},
    "K2SaveStyle": {}, "K2Grid": {"model": 0, "clip": 1, "vae": 2},
    "K2Sampler": {"model": 0, "positive": []}, "K2Sigmas": {"model": 0},
    "K2TextEncode": {"clip": 1},
}  # fmt: skip
WRONG = {
    "INT": ["7", 2.5, [1], math.nan], "FLOAT": ["0.5", [1.0], math.nan],
    "STRING": [5, ["x"], 1.5], "COMBO": [5, ["x"], "no such"],
}  # fmt: skip
GOOD = {
    "K2Vary": {"seed": 1, "variation_seed": 2}, "K2SaveStyle": {"words": "x"},
    "K2Styles": {"styles": "Woodcut", "prompt": "a star"}, "K2TextEncode": {"prompt": "a star"},
}  # fmt: skip


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model="krea2-nano (built in)")


@pytest.mark.parametrize(
    "name, entry",
    [
        pytest.param(name, entry, id=f"{name}-{entry.id}")
        for name in TYPED
        for entry in NODES[name].GET_SCHEMA().inputs
        if entry.get_io_type() in WRONG
    ],
)
def test_linked_values_of_another_type_are_named(run, nano, latent, name, entry):
    """ComfyUI checks no type where an output is of any; not even that a choice is one."""
    options = {
        key: nano[part] if isinstance(part, int) else part for key, part in TYPED[name].items()
    } | GOOD.get(name, {})  # fmt: skip
    if name in ("K2Grid", "K2Sampler", "K2Sigmas"):
        options["latent"] = latent
    if name == "K2Grid":
        options |= {"prompt": "a red star", "x_axis": "seed", "x_values": "1"}
    for value in WRONG[entry.get_io_type()]:
        with pytest.raises(ValueError, match=rf"^{entry.id}\b|{re.escape(repr(value))}"):
            run(name, **options | {entry.id: value})


# Inputs that are images or latents, and the others that a call needs, by node.
BROKEN = {
    "K2FitImage": ("image", ""), "K2Outpaint": ("image", ""), "K2ContactSheet": ("images", ""),
    "K2CropForInpaint": ("image", "mask"), "K2Inpaint": ("image", "vae mask"),
    "K2Composite": ("original painted", "mask"), "K2Stitch": ("painted", "stitch"),
    "K2VAEEncode": ("pixels", "vae"), "K2VAEDecode": ("samples", "vae"),
    "K2Detailer": ("image", "model positive vae mask"),
    "K2Upscale": ("image latent", "model positive vae"),
    "K2TiledSampling": ("image", "model clip tile_prompt"),
    "K2StyleTransfer": ("image image_2", "model vae"), "K2StyleMix": ("image_1", "clip vae prompt"),
    "K2TextEncodeImages": ("image_1", "clip prompt"), "K2Reference": ("image", "positive vae"),
    "K2Edit": ("image_1 image_2", "model clip vae prompt family"),
    "K2ControlLora": ("image", "control positive vae"),
    "K2Regions": ("picture images", "clip positive regions"),
    "K2SaveStyle": ("images thumbnail", "words"), "K2Sampler": ("latent", "model positive"),
    "K2TwoStage": ("latent", "raw turbo positive negative"),
    "K2Grid": ("latent", "model clip vae prompt x_axis x_values"),
}  # fmt: skip
# K2Sigmas reads a size alone. The other two take pictures by the functions of those above, after
# an encoder that can write, and settings of training.
ELSEWHERE = {"K2Sigmas", "K2Describe", "K2TrainLora"}


@pytest.fixture(scope="module")
def pieces(run, nano):
    """Good values of inputs, by name."""
    model, clip, vae = nano
    raw = run("K2ModelLoader", file="krea2-nano Raw (built in)")[0]
    positive, negative = run("K2TextEncode", clip=clip, prompt="a red star")[:2]
    image, mask = torch.rand(1, 64, 64, 3), torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    images = {entry.id: image for _, entry in inputs_of("IMAGE")}
    stitch = run("K2CropForInpaint", image=image, mask=mask)[2]
    return images | {
        "model": model, "raw": raw, "turbo": model, "clip": clip, "vae": vae, "mask": mask,
        "positive": positive, "negative": negative, "prompt": "a star", "words": "soft",
        "samples": latent, "latent": latent, "stitch": stitch,
        "tile_prompt": "with the tile's picture", "control": "krea2-nano outlines (built in)",
        "family": "identity", "regions": '[{"prompt": "x", "box": [0, 0, 1, 1], "images": [1]}]',
        "x_axis": "seed", "x_values": "1",
    }  # fmt: skip


def inputs_of(*kinds):
    for node in NODES.values():
        for entry in node.GET_SCHEMA().inputs:
            if entry.get_io_type() in kinds:
                yield node.__name__, entry


def test_all_that_take_images_or_latents_are_listed():
    assert {name for name, _ in inputs_of("IMAGE", "LATENT")} == {*BROKEN, *ELSEWHERE}


@pytest.mark.parametrize("name", BROKEN)
def test_images_and_latents_with_nan_are_refused_before_a_run(run, pieces, name):
    """One pixel is enough for a black image, or for an error that blames the model."""
    broken, others = (names.split() for names in BROKEN[name])
    for one in broken:
        # Of an image and a latent a node takes one.
        used = [one] if "latent" in broken else broken
        options = {key: pieces[key] for key in (*used, *others)}
        if isinstance(options[one], dict):
            samples = options[one]["samples"].clone()
            samples[..., 3, 5] = -math.inf
            options[one] = {"samples": samples}
        else:
            options[one] = options[one].clone()
            options[one][..., 3, 5, 1] = math.nan
        if name == "K2ContactSheet":
            options[one] = [options[one]]
        with pytest.raises(ValueError, match="NaN or infinite values; expected"):
            run(name, **options)
