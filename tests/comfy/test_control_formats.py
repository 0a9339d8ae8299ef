"""Control LoRAs in a graph with quantised files, Compile Krea 2 and Krea 2 Tiled Sampling."""

import comfy.ldm.modules.attention
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from safetensors.torch import load_file, save_file

import formats
from parity import assert_close

NANO = "krea2-nano outlines (built in)"
SHORT = {"preset": "custom", "steps": 1, "guidance": 0.0, "seed": 5}
# How far a control's effect may be from that on the numbers of the file: GGUF calculates with
# these, the others quantise activations.
FORMATS = {
    "fp8, settings as tensors": 0.2,
    "int8 convrot": 0.2,
    "nvfp4": 0.8,
    "mxfp8": 0.3,
    "convrot_w4a4, branches": 0.8,
    "Q8_0": 1e-4,
    "Q4_K": 1e-4,
}
_ALGORITHMS = {"fp8, settings as tensors": "float8_e4m3fn", "int8 convrot": "int8_tensorwise"}


def is_known(name):
    """False for what this ComfyUI has no layers for, which test_formats.py shows to be refused."""
    is_gguf = name.startswith("Q")
    return is_gguf or _ALGORITHMS.get(name, name.partition(",")[0]) in QUANT_ALGOS


@pytest.fixture(scope="module")
def nano(run):
    """MODEL, latent, and the prompt without and with a control on a part of the picture."""
    model, clip, vae = run("K2Loader", model="krea2-nano (built in)")
    positive, negative = run("K2TextEncode", clip=clip, prompt="a red star", negative="")[:2]
    latent = run("K2EmptyLatent", aspect="custom", width=112, height=80)[0]
    image, mask = torch.zeros(1, 80, 112, 3), torch.zeros(1, 80, 112)
    image[:, 16:48, 30:32] = image[:, 16:48, 60:62] = image[:, 16:18, 30:62] = 1
    mask[:, :, 20:] = 1
    controlled = run(
        "K2ControlLora", control=NANO, positive=positive, vae=vae, image=image, mask=mask
    )[0]
    return model, latent, positive, controlled


@pytest.fixture(scope="module")
def sample(run, nano):
    def sample(model, positive, **options):
        inputs = {"model": model, "positive": positive, "latent": nano[1], **SHORT}
        return run("K2Sampler", **inputs | options)[0]["samples"]

    return sample


@pytest.mark.parametrize("name", [name for name in FORMATS if is_known(name)])
def test_on_quantised_files_a_control_does_what_it_does_on_their_numbers(
    run, pack, nano, sample, models, name
):
    tensors = load_file(pack("krea2_model").nano.TRANSFORMERS["turbo"])
    folder = models / "diffusion_models"
    if name.startswith("Q"):
        file = folder / "controlled_turbo.gguf"
        values = formats.gguf_file(tensors, file, name)
    else:
        file = folder / "controlled_turbo.safetensors"
        stored, values, metadata = formats.WRITERS[name](tensors)
        save_file({n: part.contiguous() for n, part in stored.items()}, file, metadata)
    plain = folder / "controlled_values_turbo.safetensors"
    save_file({n: part.float().contiguous() for n, part in values.items()}, plain)
    try:
        found, expected = (
            sample(model, nano[3]) - sample(model, nano[2])
            for model in (
                run("K2ModelLoader", file=each.name, dtype="fp32")[0] for each in (file, plain)
            )
        )
    finally:
        file.unlink()
        plain.unlink()
    assert expected.abs().mean() > 0.05, "the control acts"
    assert_close(found, expected, FORMATS[name], name)


def test_with_compiled_blocks_a_control_acts_as_without(run, pack, nano, sample, monkeypatch):
    """Its hooks are inside of blocks, which then run as they were before compiling."""
    speed, attention = pack("nodes.speed"), comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    wrap = speed.set_torch_compile_wrapper

    def traced(model, backend, options=None, **others):
        # The same tracing without a C++ compiler, which not every machine has.
        wrap(model, backend="eager", **others)

    monkeypatch.setattr(speed, "set_torch_compile_wrapper", traced)
    torch._dynamo.reset()
    compiled = run("K2Compile", model=nano[0])[0]
    for positive in (nano[2], nano[3], nano[2]):
        assert_close(sample(compiled, positive), sample(nano[0], positive), 1e-4, "compiled")


def test_a_tile_gets_what_the_whole_gets_at_its_place(run, pack, nano, sample):
    seen = []
    network = nano[0].model.diffusion_model
    tiled = run("K2TiledSampling", model=nano[0], tile=64)[0]
    hook = network.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].clone())
    )
    try:
        sample(nano[0], nano[3])
        sample(tiled, nano[3])
    finally:
        hook.remove()
    whole, *parts = seen
    tiles = pack("krea2_model.features.tiles")
    expected = tiles.tiles_at((5, 7), tiles.TileSettings(64), 1.0)
    assert len(parts) == len(expected) > 1
    image = whole[:, -35:].movedim(1, 2)
    for (tile, _), part in zip(expected, parts, strict=True):
        own = tile.cut_tokens(image, (5, 7)).movedim(2, 1)
        assert_close(part[:, -own.shape[1] :], own, 1e-5, str(tile))


def test_a_batch_of_tiles_with_a_control_is_the_picture_of_single_ones(run, nano, sample):
    """With guidance; a control on a part of the picture makes them go one by one."""
    model, latent, positive, masked = nano
    image = torch.rand(2, 80, 112, 3, generator=torch.Generator().manual_seed(1))
    vae = run("K2VAELoader", file="krea2-nano (built in)")[0]
    controlled = run("K2ControlLora", control=NANO, positive=positive, vae=vae, image=image)[0]
    latent = {"samples": latent["samples"].repeat(2, 1, 1, 1, 1)}
    for chosen, together in ((controlled, True), (masked, False)):
        found, seen = [], []
        for batch in (1, 3):
            tiled = run("K2TiledSampling", model=model, tile=64, batch=batch)[0]
            hook = model.model.diffusion_model.first.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(len(inputs[0]))
            )
            options = {"latent": latent, "negative": chosen, "guidance": 2.0}
            found.append(sample(tiled, chosen, **options))
            hook.remove()
        assert_close(found[1], found[0], 1e-5, "batch")
        assert (max(seen) > min(seen)) == together
