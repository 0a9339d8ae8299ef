"""LoRAs in regions: on weights of every kind of format, offloaded, and with compiled blocks."""

import json

import comfy.model_management
import gguf  # noqa: F401 - a test writes such a file
import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
from parity import assert_close, relative_error

NOTEBOOK = "krea2-nano notebook (built in)"
LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 0.5, 1]
SHORT = {"preset": "custom", "steps": 2, "guidance": 0.0, "seed": 5}


QUANTISED = {
    "fp8, settings as tensors": 0.2, "int8 convrot": 0.2, "Q8_0": 1e-4, "Q4_K": 1e-4,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_lora(models):
    """A LoRA and a LoKr of the small model, on two of its layers."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    folder = models / "loras"
    folder.mkdir(exist_ok=True)
    query, output = ("diffusion_model.blocks.0.attn." + name for name in ("wq", "wo"))
    save_file(
        {f"{query}.lora_A.weight": random(4, 256), f"{query}.lora_B.weight": random(256, 4),
         f"{output}.lokr_w1": random(4, 4), f"{output}.lokr_w2": random(64, 64)},
        folder / "tiny.safetensors",
    )  # fmt: skip
    return "tiny.safetensors"


@pytest.fixture(scope="module")
def tiny(run, models, tiny_lora):
    """Latents of a small model with a region and its LoRA: `tiny(model, strength)`."""
    clip = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    positive = run("K2TextEncode", clip=clip, prompt="white")[0]
    latent = {"samples": torch.zeros(1, 16, 1, 16, 24)}

    def call(model, strength=0.8):
        entries = [{"prompt": "x", "box": LEFT, "loras": [[tiny_lora, strength]]}]
        made = run(
            "K2Regions", clip=clip, positive=positive, model=model, regions=json.dumps(entries),
        )[0]  # fmt: skip
        return run("K2Sampler", model=model, positive=made, latent=latent, **SHORT)[0]["samples"]

    return call


@pytest.mark.parametrize("name", QUANTISED)
def test_loras_of_regions_on_quantised_weights(run, models, tiny, name):
    """As on the same numbers in float32, and the effect too."""
    folder = models / "diffusion_models"
    tensors = load_file(folder / "krea2_tiny_turbo.safetensors")
    stem = name.replace(" ", "_").replace(",", "")
    if name in formats.WRITERS:
        file = folder / f"krea2_turbo_{stem}.safetensors"
        stored, values, metadata = formats.WRITERS[name](tensors)
        save_file(stored, file, metadata)
    else:
        file = folder / f"krea2_turbo_{stem}.gguf"
        values = formats.gguf_file(tensors, file, name)
    plain = folder / "krea2_turbo_numbers.safetensors"
    save_file({n: t.float().contiguous() for n, t in values.items()}, plain)
    found = {
        (path, strength): tiny(run("K2ModelLoader", file=path.name)[0], strength)
        for path in (file, plain)
        for strength in (0.8, 0.0)
    }
    file.unlink()
    assert relative_error(found[file, 0.8], found[plain, 0.8]) < QUANTISED[name]
    effect = [found[path, 0.8] - found[path, 0.0] for path in (file, plain)]
    assert torch.cosine_similarity(*(e.flatten() for e in effect), dim=0) > 0.9


def test_loras_of_regions_where_weights_are_offloaded(run, turbo, tiny, monkeypatch):
    """In part on the device, and by NVIDIA's default patcher: the same image."""
    expected = tiny(turbo)
    comfy.model_management.unload_all_models()
    load = type(turbo).load
    sizes = []

    def partly(self, *args, **options):
        options["lowvram_model_memory"] = self.model_size() // 2
        result = load(self, *args, **options | {"full_load": False})
        sizes.append(self.model.model_lowvram)
        return result

    monkeypatch.setattr(type(turbo), "load", partly)
    assert_close(tiny(turbo), expected, 1e-5, "offloaded")
    assert any(sizes)
    comfy.model_management.unload_all_models()


def test_compiled_blocks_have_loras_of_regions(run, monkeypatch):
    """Compile Krea 2: blocks with hooks run uncompiled, so that LoRAs act as without it."""
    model, clip, _ = run("K2Loader", model="krea2-nano (built in)")
    positive = run("K2TextEncode", clip=clip, prompt="white")[0]
    entries = [{"prompt": "a red circle", "box": LEFT, "loras": [[NOTEBOOK, 1]]}]
    options = {"clip": clip, "positive": positive, "model": model}
    positive = run("K2Regions", regions=json.dumps(entries), **options)[0]
    latent = {"samples": torch.zeros(1, 16, 1, 8, 12)}

    def sample(model):
        return run("K2Sampler", model=model, positive=positive, latent=latent, **SHORT)[0][
            "samples"
        ]

    compiled = run("K2Compile", model=model)[0]
    monkeypatch.setattr(torch, "compile", lambda module, **options: _Traced(module))
    assert_close(sample(compiled), sample(model), 1e-5, "compiled")


class _Traced(torch.nn.Module):
    """As torch.compile returns it: a module in another, without hooks on its layers."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args, **options):
        raise AssertionError("a compiled block was called, which has no hooks")
