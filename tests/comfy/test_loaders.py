"""The loaders' lists and every layout through them."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from in_process import NODES
from krea2_model.checkpoints.transformer_keys import official_to_diffusers
from krea2_model.checkpoints.vae_keys import vae_key_map
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
    return str(Path("sub", path.name))


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
            model=Path(TURBO).name,
            text_encoder=Path(ENCODER).name,
            vae=Path(VAE).name,
        )
        return picture(run, parts, {"samples": torch.zeros(1, 16, 1, 8, 8)})


def test_auto_finds_the_parts_of_one_file(run, models, expected):
    parts = run("K2Loader", model=Path(TURBO).name)
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
    files, kinds = pack("nodes.model_files"), pack("krea2_model.checkpoints.identify")
    (models / "vae" / "weights.pt").write_bytes(b"pickle")
    (models / "vae" / "broken.safetensors").write_bytes(b"cut off")
    lists = {
        part: files.list_models(part) for part in (kinds.TRANSFORMER, kinds.TEXT_ENCODER, kinds.VAE)
    }
    for part, file in zip(lists, (TURBO, ENCODER, VAE), strict=True):
        assert Path(file).name in lists[part]
        assert all_in_one in lists[part] and folder_model in lists[part]
        others = {Path(f).name for f in (TURBO, ENCODER, VAE)} - {Path(file).name}
        assert not others & set(lists[part])
        assert not any(name.endswith(".pt") for name in lists[part])
    # Choosing a broken file is how its owner learns what is wrong with it.
    assert "broken.safetensors" in lists[kinds.VAE]


def test_loras_of_nano_are_listed(pack):
    files = pack("nodes.model_files")
    names = ["krea2-nano notebook (built in)", "krea2-nano reference (built in)"]
    assert files.list_loras()[-2:] == names
    found = [files.find_lora(name) for name in names]
    assert all(file.is_file() for file in found) and found[0] != found[1]


def test_shared_workflows_may_spell_paths_with_either_slash(run, pack, folder_model, all_in_one):
    files, kinds = pack("nodes.model_files"), pack("krea2_model.checkpoints.identify")
    for name in (all_in_one, folder_model):
        found = files.find_model(kinds.TRANSFORMER, name)
        assert files.find_model(kinds.TRANSFORMER, name.replace("/", "\\")) == found


@pytest.mark.parametrize("name", ["krea2/v1/a.safetensors", "krea2\\v1/a.safetensors"])
def test_windows_opens_workflows_of_linux(pack, monkeypatch, models, name):
    """As ComfyUI names files there: by backslashes, in its lists and where it looks them up."""
    files, kinds = pack("nodes.model_files"), pack("krea2_model.checkpoints.identify")
    known = {"krea2\\v1\\a.safetensors": str(models / TURBO)}
    monkeypatch.setattr(files, "os", SimpleNamespace(sep="\\", walk=os.walk))
    monkeypatch.setattr(files.folder_paths, "get_full_path", lambda key, name: known.get(name))
    assert files.problem(files.find_model, kinds.TRANSFORMER, name) is True
    assert files.find_model(kinds.TRANSFORMER, name) == models / TURBO
    assert files.find_lora(name) == models / TURBO
    assert files.find_anything(f"loras/{name}") == models / TURBO


def test_factories_make_fresh_copies(run, models, pack):
    """What TorchCompileModel, hooks and several GPUs ask for."""
    model, clip, vae = run("K2Loader", model=Path(TURBO).name)
    for patcher in (model, clip.patcher, vae.patcher):
        load, arguments = patcher.cached_patcher_init
        copy = load(*arguments, disable_dynamic=True)
        assert copy.model is not patcher.model
        first, second = patcher.model.state_dict(), copy.model.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_saved_checkpoint_holds_all_parts(run, base, models, expected):
    """CheckpointSave writes an all-in-one file that every loader here takes again."""
    model, clip, vae = run("K2Loader", model=Path(TURBO).name)
    run("CheckpointSave", model=model, clip=clip, vae=vae, filename_prefix="saved_all/krea2_turbo")
    (saved,) = (base / "output" / "saved_all").glob("*.safetensors")
    (models / "checkpoints").mkdir(exist_ok=True)
    saved.rename(models / "checkpoints" / "krea2_turbo_saved.safetensors")
    parts = run("K2Loader", model="krea2_turbo_saved.safetensors")
    image = picture(run, parts, {"samples": torch.zeros(1, 16, 1, 8, 8)})
    assert_close(image, expected, 1e-6, "CheckpointSave and back")


def test_auto_takes_each_part_from_where_it_is(pack, models, all_in_one):
    """An all-in-one file without a text encoder still brings its VAE."""
    pairing, kinds = pack("nodes.pairing"), pack("krea2_model.checkpoints.identify")
    tensors = load_file(models / "checkpoints" / all_in_one)
    partial = models / "checkpoints" / "with_vae_only.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith("text_encoders.")}, partial)
    assert pairing.find_fitting(kinds.VAE, partial) == partial
    assert pairing.find_fitting(kinds.TEXT_ENCODER, partial).name == Path(ENCODER).name


def test_the_node_shows_what_auto_took(models, all_in_one):
    node_output = NODES["K2Loader"].execute
    shown = node_output(model=Path(TURBO).name).ui.as_dict()["text"]
    assert shown == (f"text encoder: {Path(ENCODER).name}\nVAE: {Path(VAE).name}",)
    encoder = {"text_encoder": Path(ENCODER).name}
    assert node_output(model=Path(TURBO).name, **encoder).ui.as_dict()["text"] == (
        f"VAE: {Path(VAE).name}",
    )
    # A file or a model of which all parts are used says nothing new.
    for model in (all_in_one, "krea2-nano (built in)"):
        assert node_output(model=model).ui is None


def test_auto_prefers_an_encoder_that_is_qwen3_vl_for_sure(pack, models, monkeypatch):
    """A vision tower tells it from Qwen3-4B, which comes first in this list."""
    files, pairing = pack("nodes.model_files"), pack("nodes.pairing")
    kinds = pack("krea2_model.checkpoints.identify")
    bare, seeing = (
        (models / ENCODER).with_name(f"{name}.safetensors") for name in ("bare", "seeing")
    )
    tensors = {n: t for n, t in load_file(models / ENCODER).items() if "visual." not in n}
    save_file(tensors, bare)
    save_file({**tensors, "model.visual.patch_embed.proj.weight": torch.zeros(2)}, seeing)
    for listed, expected in (([bare, seeing], seeing), ([bare], bare)):
        monkeypatch.setattr(
            files, "list_user_models", lambda part, x=listed: [path.name for path in x]
        )
        assert pairing.find_fitting(kinds.TEXT_ENCODER, models / TURBO) == expected
    bare.unlink()
    seeing.unlink()


def test_auto_with_a_folder_that_lacks_the_encoder(pack, models, folder_model, tmp_path):
    pairing, kinds = pack("nodes.pairing"), pack("krea2_model.checkpoints.identify")
    for part in ("transformer", "vae"):
        (tmp_path / part).symlink_to(models / "diffusers" / folder_model / part)
    assert pairing.find_fitting(kinds.VAE, tmp_path) == tmp_path
    assert pairing.find_fitting(kinds.TEXT_ENCODER, tmp_path).name == Path(ENCODER).name


def test_auto_passes_over_relatives_of_other_sizes(pack, models):
    """First by name: a VAE for images with transparency, encoders of another width and depth."""
    from dataclasses import replace

    pairing, kinds = pack("nodes.pairing"), pack("krea2_model.checkpoints.identify")
    layered = tiny_checkpoints.vae_tensors(replace(tiny_checkpoints.VAE, image_channels=4))
    save_file(layered, models / "vae" / "a_layered_vae.safetensors")
    wide = replace(tiny_checkpoints.TEXT_ENCODER, hidden_size=80, vocab_size=100)
    encoder = tiny_checkpoints.text_encoder_tensors(wide)
    save_file(encoder, models / "text_encoders" / "a_narrow_encoder.safetensors")
    short = replace(tiny_checkpoints.TEXT_ENCODER, num_hidden_layers=20, vocab_size=100)
    encoder = tiny_checkpoints.text_encoder_tensors(short)
    save_file(encoder, models / "text_encoders" / "a_short_encoder.safetensors")
    model = models / TURBO
    assert pairing.find_fitting(kinds.VAE, model).name == Path(VAE).name
    assert pairing.find_fitting(kinds.TEXT_ENCODER, model).name == Path(ENCODER).name


def test_folders_of_other_models_are_not_listed(pack, models, folder_model):
    files, kinds = pack("nodes.model_files"), pack("krea2_model.checkpoints.identify")
    foreign = models / "diffusers" / "Flux"
    (foreign / "transformer").mkdir(parents=True)
    tensors = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}
    save_file(tensors, foreign / "transformer" / "model.safetensors")
    (foreign / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "Flux" not in files.list_models(kinds.TRANSFORMER)
    assert folder_model in files.list_models(kinds.TRANSFORMER)
    with pytest.raises(ValueError, match="There is no 'Flux'"):
        files.find_model(kinds.TRANSFORMER, "Flux")


def test_nothing_that_fits_says_what_to_get(pack, monkeypatch, models):
    files, pairing = pack("nodes.model_files"), pack("nodes.pairing")
    kinds = pack("krea2_model.checkpoints.identify")
    monkeypatch.setattr(files, "list_user_models", lambda part: [])
    with pytest.raises(ValueError, match="Nothing that fits .*qwen3vl_4b_bf16.safetensors"):
        pairing.find_fitting(kinds.TEXT_ENCODER, models / TURBO)


def test_norms_stay_float32_in_files_of_bfloat16(run, models):
    tensors = {k: v.bfloat16() for k, v in load_file(models / TURBO).items()}
    save_file(tensors, models / "diffusion_models" / "all_bf16_turbo.safetensors")
    model = run("K2ModelLoader", file="all_bf16_turbo.safetensors", dtype="bf16")[0]
    weights = model.model.diffusion_model.state_dict()
    assert weights["blocks.0.prenorm.scale.weight"].dtype == torch.float32
    assert weights["first.weight"].dtype == torch.bfloat16


def test_fingerprints_change_with_the_files(pack, models, folder_model):
    """ComfyUI gives every input by name, linked ones as None."""
    loaders, loras = pack("nodes.loaders"), pack("nodes.loras")
    tiny = TURBO.split("/")[1]
    whole = {"model": folder_model, "text_encoder": "auto", "vae": "auto", "dtype": "auto"}
    shard = next((models / "diffusers" / folder_model / "transformer").glob("*-00002-*"))
    replaced = {
        models / TURBO: lambda: loaders.K2ModelLoader.fingerprint_inputs(file=tiny, dtype="auto"),
        shard: lambda: loaders.K2Loader.fingerprint_inputs(**whole),
    }
    for file, fingerprint in replaced.items():
        before = fingerprint()
        assert fingerprint() == before
        assert str(models) not in str(before), "it is written into pictures"
        copy, times = file.with_suffix(".part"), file.stat()
        copy.write_bytes(file.read_bytes())
        os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
        copy.replace(file)
        assert fingerprint() != before, file
    lora = {"model": None, "lora": "krea2-nano notebook (built in)", "strength": 1.0, "clip": None}
    assert loras.K2LoraLoader.fingerprint_inputs(**lora)
    for linked in (
        loaders.K2Loader.fingerprint_inputs(**whole | {"model": None}),
        loaders.K2VAELoader.fingerprint_inputs(file=None, dtype="auto"),
        loras.K2LoraLoader.fingerprint_inputs(**lora | {"lora": None}),
    ):
        assert linked is None
