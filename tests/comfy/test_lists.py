"""Lists of the loaders: cheap, never raising, and leading to what they list."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity import same_weights

TURBO, ENCODER, VAE = (
    "diffusion_models/krea2_tiny_turbo.safetensors",
    "text_encoders/qwen3vl_tiny.safetensors",
    "vae/qwen_image_vae_tiny.safetensors",
)


@pytest.fixture
def files(pack):
    return pack("nodes.model_files")


@pytest.fixture
def kinds(pack):
    return pack("krea2_model.checkpoints.identify")


@pytest.fixture
def place(models):
    """Put a file or folder into the models folder for one test: `place("vae/a.safetensors")`."""
    made = []

    def call(name):
        path = models / name
        top = models / "/".join(path.relative_to(models).parts[:2])
        made.append(top)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    yield call
    for path in made:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def everything(pack):
    """All lists that the nodes make for /object_info."""
    loaders, loras, diagnostics = (
        pack(f"nodes.{name}") for name in ("loaders", "loras", "diagnostics")
    )
    for node in (loaders.K2Loader, loaders.K2ModelLoader, loaders.K2TextEncoderLoader,
                 loaders.K2VAELoader, loras.K2LoraLoader, diagnostics.K2Inspect):  # fmt: skip
        node.define_schema()
        assert node.GET_NODE_INFO_V1()


INDEXES = ["[]", "null", "5", '"x"', '{"_class_name": null}', '{"_class_name": 5}', "{", "",
           '{"_class_name": ["Krea2Pipeline"]}', "[" * 100_000, "\ufeff{}", "{}"]  # fmt: skip


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_of_any_content_takes_no_node_away(pack, place, index):
    place("diffusers/Odd/model_index.json").write_text(index, encoding="utf-8")
    everything(pack)


def test_an_index_without_a_class_is_judged_by_its_weights(files, kinds, place, models):
    shutil.copy(models / TURBO, place("diffusers/Odd/transformer/model.safetensors"))
    index = place("diffusers/Odd/model_index.json")
    for text, listed in (('{"_class_name": null}', True), ("{}", True), ("[]", False),
                         ('{"_class_name": "FluxPipeline"}', False)):  # fmt: skip
        index.write_text(text)
        assert ("Odd" in files.list_models(kinds.TRANSFORMER)) == listed, text


HEADERS = {
    "a shape of 1e999": b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
    "a name of lone surrogates": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "deeply nested": b'{"a":' + b"[" * 100_000,
    "metadata of numbers": b'{"__metadata__":{"a":1}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_any_content_takes_no_node_away(pack, files, kinds, place, name):
    header = HEADERS[name]
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    for folder in ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras"):
        place(f"{folder}/odd.safetensors").write_bytes(content)
        place(f"{folder}/odd.gguf").write_bytes(b"GGUF" + content)
    everything(pack)
    if name != "a name of lone surrogates":  # which is a file of another kind
        # Shown, since choosing it is how its owner learns why.
        assert "odd.safetensors" in files.list_models(kinds.VAE)
        assert "odd.safetensors" in files.problem(files.find_model, kinds.VAE, "odd.safetensors")


def test_places_that_are_no_files(pack, files, kinds, place, models):
    """Links that lead nowhere or in circles, folders called like files, and unreadable ones."""
    place("vae/gone.safetensors").symlink_to(models / "nowhere.safetensors")
    place("vae/self.safetensors").symlink_to(models / "vae" / "self.safetensors")
    place("vae/folder.safetensors/inside.txt").write_text("x")
    place("diffusers/folder/transformer/x.safetensors/y").write_text("x")
    place("diffusers/folder/model_index.json").write_text("{}")
    place("diffusers/loop").symlink_to(models / "diffusers")
    place("diffusers/index/model_index.json/x").write_text("x")
    closed = place("vae/closed/model.safetensors")
    closed.write_bytes(b"x")
    closed.parent.chmod(0)
    everything(pack)
    names = files.list_models(kinds.VAE)
    assert not {"gone.safetensors", "self.safetensors", "folder.safetensors"} & set(names)
    closed.parent.chmod(0o755)


def test_links_in_circles_are_walked_once(pack, tmp_path):
    walk = pack("nodes.file_kinds").walk
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.gguf").touch()
    for name in ("one", "two", "three"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert [files for _, _, files in walk(tmp_path)] == [[], ["model.gguf"]]


def test_upper_case_suffixes(run, files, kinds, place, models):
    for folder, source, part in (("diffusion_models", TURBO, kinds.TRANSFORMER),
                                 ("vae", VAE, kinds.VAE)):  # fmt: skip
        shutil.copy(models / source, place(f"{folder}/LOUD.SAFETENSORS"))
        assert "LOUD.SAFETENSORS" in files.list_models(part)
    assert run("K2ModelLoader", file="LOUD.SAFETENSORS")[0].model.diffusion_model.config
    shutil.copy(models / VAE, place("diffusers/Loud/vae/MODEL.SAFETENSORS"))
    place("diffusers/Loud/model_index.json").write_text("{}")
    assert run("K2VAELoader", file="Loud")[0]


@pytest.mark.parametrize("other", [VAE, "broken", "missing"])
def test_one_name_in_two_folders_leads_to_what_is_listed(files, kinds, place, models, other):
    """diffusion_models comes first; the model is under checkpoints."""
    right = place("checkpoints/sub/same.safetensors")
    shutil.copy(models / TURBO, right)
    wrong = place("diffusion_models/sub/same.safetensors")
    if other == "broken":
        wrong.write_bytes(b"cut off")
    elif other != "missing":
        shutil.copy(models / other, wrong)
    name = str(Path("sub", "same.safetensors"))
    assert files.list_models(kinds.TRANSFORMER).count(name) == 1
    assert files.find_model(kinds.TRANSFORMER, name) == right
    # Where no one holds it, the first says what it is.
    right.unlink()
    if other == VAE:
        assert name not in files.list_models(kinds.TRANSFORMER)
        message = files.problem(files.find_model, kinds.TRANSFORMER, name)
        assert "is a Qwen-Image VAE; expected a Krea 2 transformer" in message


def test_one_name_in_two_roots_of_one_key(run, files, kinds, place, models, tmp_path, monkeypatch):
    import folder_paths

    shutil.copy(models / TURBO, place("vae/same.safetensors"))
    shutil.copy(models / VAE, tmp_path / "same.safetensors")
    paths, suffixes = folder_paths.folder_names_and_paths["vae"]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "vae", ([*paths, str(tmp_path)], suffixes)
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert "same.safetensors" in files.list_models(kinds.VAE)
    assert files.find_model(kinds.VAE, "same.safetensors") == tmp_path / "same.safetensors"
    assert same_weights(
        run("K2VAELoader", file="same.safetensors")[0].first_stage_model,
        run("K2VAELoader", file=Path(VAE).name)[0].first_stage_model,
    )
    for outside in ("../same.safetensors", str(tmp_path / "same.safetensors")):
        with pytest.raises(ValueError, match="There is no"):
            files.find_model(kinds.TEXT_ENCODER, outside)


def test_files_are_read_once(files, kinds, place, models, pack, monkeypatch):
    """Each costs a look at its stamp from then on; one that changes is read again."""
    file_kinds, headers = pack("nodes.file_kinds"), []
    read = file_kinds.read_shapes
    monkeypatch.setattr(file_kinds, "read_shapes", lambda path: headers.append(path) or read(path))
    first = place("diffusion_models/many/000.safetensors")
    save_file({"blocks.0.cross_attn.q.weight": torch.zeros(1)}, first)
    for number in range(1, 50):
        os.link(first, first.with_name(f"{number:03}.safetensors"))
    place("diffusion_models/many/words.gguf").write_bytes(b"GGUF")
    files.list_models(kinds.TRANSFORMER)
    assert len([path for path in headers if path.parent == first.parent]) == 51
    headers.clear()
    names = files.list_models(kinds.TRANSFORMER)
    assert not any(name.startswith("many") and name.endswith("safetensors") for name in names)
    assert not headers
    shutil.copy(models / TURBO, first.with_name("new.safetensors"))
    first.with_name("new.safetensors").replace(first)
    assert str(Path("many", "000.safetensors")) in files.list_models(kinds.TRANSFORMER)
    assert first in headers


def test_a_part_in_shards(place, run, models, files, kinds, pack, monkeypatch):
    """What tells a VAE may lie in any of them; lists read each once."""
    folder = place("diffusers/Indexed/vae/model.safetensors.index.json").parent
    tensors = load_file(models / VAE)
    half = dict(list(tensors.items())[::2])
    save_file(half, folder / "a.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in half}, folder / "b.safetensors")
    index = {n: "a.safetensors" if n in half else "b.safetensors" for n in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    place("diffusers/Indexed/model_index.json").write_text('{"_class_name": "Krea2Pipeline"}')
    assert run("K2VAELoader", file="Indexed")[0]
    assert "Indexed" in files.list_models(kinds.VAE)
    file_kinds, headers = pack("nodes.file_kinds"), []
    monkeypatch.setattr(file_kinds, "read_shapes", headers.append)
    assert "Indexed" in files.list_models(kinds.VAE)
    assert not headers
