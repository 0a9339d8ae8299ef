"""The loaders' lists and every layout through them."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from krea2_model.transformer_keys import official_to_diffusers
from krea2_model.vae_keys import vae_key_map
from parity import assert_close

TURBO, ENCODER, VAE = (
    "diffusion_models/krea2_tiny_turbo.safetensors",
    "text_encoders/qwen3vl_tiny.safetensors",
    "vae/qwen_image_vae_tiny.safetensors",
)


@pytest.fixture(scope="module")
def folder_model(models):
    """A diffusers folder of the same weights, the transformer in two shards."""
    root = models / "diffusers" / "some" / "Krea-2-Turbo"
    transformer = {}
    for name, tensor in load_file(models / TURBO).items():
        if name.startswith("blocks.") and name.endswith(".mod.lin"):
            tensor = tensor.unflatten(0, (6, -1))
        transformer[official_to_diffusers(name)] = tensor
    names = sorted(transformer)
    index = {}
    for part in ("transformer", "text_encoder", "vae"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file(
            {name: transformer[name].contiguous() for name in half}, root / "transformer" / file
        )
        index |= dict.fromkeys(half, file)
    index_file = root / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    (root / "text_encoder" / "model.safetensors").symlink_to(models / ENCODER)
    keys = vae_key_map(tiny_checkpoints.VAE)
    vae = {keys[name]: tensor for name, tensor in load_file(models / VAE).items()}
    save_file(vae, root / "vae" / "diffusion_pytorch_model.safetensors")
    (root / "model_index.json").write_text('{"is_distilled": true}')
    return "some/Krea-2-Turbo"


@pytest.fixture(scope="module")
def all_in_one(models):
    prefixes = {
        "model.diffusion_model.": TURBO,
        "text_encoders.qwen3vl_4b.transformer.": ENCODER,
        "vae.": VAE,
    }
    tensors = {
        prefix + name: tensor
        for prefix, file in prefixes.items()
        for name, tensor in load_file(models / file).items()
    }
    path = models / "checkpoints" / "sub" / "krea2_turbo_all.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return os.path.join("sub", path.name)


def picture(run, parts, latent):
    model, clip, vae = parts
    text = run("K2TextEncode", clip=clip, prompt="a fox")[0]
    samples = run("K2Sampler", model=model, positive=text, latent=latent, seed=4)[0]
    return run("K2VAEDecode", samples=samples, vae=vae)[0]


@pytest.fixture(scope="module")
def expected(models, run):
    with torch.inference_mode():
        parts = run(
            "K2Loader",
            model=os.path.basename(TURBO),
            text_encoder=os.path.basename(ENCODER),
            vae=os.path.basename(VAE),
        )
        return picture(run, parts, {"samples": torch.zeros(1, 16, 1, 8, 8)})


def test_auto_finds_the_parts_of_one_file(run, models, expected):
    parts = run("K2Loader", model=os.path.basename(TURBO))
    assert torch.equal(picture(run, parts, {"samples": torch.zeros(1, 16, 1, 8, 8)}), expected)


@pytest.mark.parametrize("layout", ["folder", "all-in-one"])
def test_layouts_that_hold_all_parts(run, folder_model, all_in_one, expected, layout):
    name = folder_model if layout == "folder" else all_in_one
    parts = run("K2Loader", model=name)
    assert parts[0].model.preset.name == "turbo"
    image = picture(run, parts, {"samples": torch.zeros(1, 16, 1, 8, 8)})
    assert_close(image, expected, 1e-6, f"{layout} against single files")


def test_single_loaders_take_folders_and_checkpoints(run, folder_model, all_in_one, expected):
    parts = [
        run("K2ModelLoader", file=all_in_one)[0],
        run("K2TextEncoderLoader", file=folder_model)[0],
        run("K2VAELoader", file=all_in_one)[0],
    ]
    image = picture(run, parts, {"samples": torch.zeros(1, 16, 1, 8, 8)})
    assert_close(image, expected, 1e-6, "single loaders")


def test_lists_show_what_fits(pack, models, folder_model, all_in_one):
    files, kinds = pack("nodes.files"), pack("krea2_model.identify")
    (models / "vae" / "weights.pt").write_bytes(b"pickle")
    (models / "vae" / "broken.safetensors").write_bytes(b"cut off")
    lists = {
        part: files.list_models(part) for part in (kinds.TRANSFORMER, kinds.TEXT_ENCODER, kinds.VAE)
    }
    for part, file in zip(lists, (TURBO, ENCODER, VAE), strict=True):
        assert os.path.basename(file) in lists[part]
        assert all_in_one in lists[part] and folder_model in lists[part]
        others = {os.path.basename(f) for f in (TURBO, ENCODER, VAE)} - {os.path.basename(file)}
        assert not others & set(lists[part])
        assert not any(name.endswith(".pt") for name in lists[part])
    # Choosing a broken file is how its owner learns what is wrong with it.
    assert "broken.safetensors" in lists[kinds.VAE]


def test_shared_workflows_may_spell_paths_with_either_slash(run, pack, folder_model, all_in_one):
    files, kinds = pack("nodes.files"), pack("krea2_model.identify")
    for name in (all_in_one, folder_model):
        found = files.find_model(kinds.TRANSFORMER, name)
        assert files.find_model(kinds.TRANSFORMER, name.replace("/", "\\")) == found


def test_factories_make_fresh_copies(run, models, pack):
    """What TorchCompileModel, hooks and several GPUs ask for."""
    model, clip, vae = run("K2Loader", model=os.path.basename(TURBO))
    for patcher in (model, clip.patcher, vae.patcher):
        load, arguments = patcher.cached_patcher_init
        copy = load(*arguments, disable_dynamic=True)
        assert copy.model is not patcher.model
        first, second = patcher.model.state_dict(), copy.model.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
