"""SECURITY.md's claims about files: nothing that they hold is run.

ruff keeps calls that could do it, and modules for the network, out of the sources.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

import tiny_checkpoints as tiny
from krea2_model import CheckpointError, load_text_encoder, load_transformer
from krea2_model.text.tokenizer import Krea2Tokenizer, find_tokenizer_folder
from krea2_model.tools.describe import describe

HOSTILE = (
    "__import__('pathlib').Path('ran').touch()",
    "'; touch ran; '",
    "$(touch ran)",
    "{{ ''.__class__.__mro__ }}",
    "{0.__class__}%s%n",
    "../../../ran",
    "!!python/object/apply:os.system ['touch ran']",
    "\x1b]0;ran\x07\0",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_a_header_does_nothing(tmp_path, monkeypatch, text):
    """As metadata, as the name of a tensor and as sampling defaults."""
    monkeypatch.chdir(tmp_path)
    tensors = tiny.transformer_tensors()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"krea2.variant": text, "format": text, text: text})
    assert load_transformer(path).variant is None
    assert describe(path)
    save_file(tensors, path, {"krea2.steps": text})
    with pytest.raises(CheckpointError, match="unreadable sampling defaults"):
        load_transformer(path)
    save_file(tensors, path, {"_quantization_metadata": text})
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_transformer(path)
    save_file({**tensors, f"blocks.0.{text}": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="surplus"):
        load_transformer(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_a_gguf_file_does_nothing(tmp_path, monkeypatch, text):
    import gguf

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, text)
    for key in ("general.name", "tokenizer.chat_template", "krea2.variant"):
        writer.add_string(key, text)
    for name, tensor in tiny.transformer_tensors().items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_transformer(path).variant is None
    assert describe(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.gguf"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of parts by their names."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for part, tensors in (
        ("transformer", tiny.transformer_tensors),
        ("text_encoder", tiny.text_encoder_tensors),
    ):
        files[part] = folder / f"{part}.safetensors"
        save_file(tensors(), files[part])
    return files


@pytest.mark.parametrize("value", ["__import__('os')", {"a": 1}, [], None, 1e400, [-1, "x"]])
@pytest.mark.parametrize(
    "part, name",
    [
        ("transformer", "rope_theta"),
        ("transformer", "axes_dims_rope"),
        ("transformer", "norm_eps"),
        ("text_encoder", "text_config"),
        ("text_encoder", "rms_norm_eps"),
        ("text_encoder", "text_encoder_select_layers"),
    ],
)
def test_configurations_of_other_types_are_refused_or_do_nothing(
    tmp_path, weights, part, name, value
):
    folder = tmp_path / part
    folder.mkdir()
    load = {"transformer": load_transformer, "text_encoder": load_text_encoder}[part]
    (folder / "model.safetensors").symlink_to(weights[part])
    (folder / "config.json").write_text(json.dumps({name: value}))
    (tmp_path / "model_index.json").write_text(json.dumps({name: value}))
    try:
        load(folder)
    except CheckpointError as error:
        assert name in str(error) or "missing" in str(error)
    else:
        assert value in (None, [], {"a": 1}, 1e400)


@pytest.mark.parametrize("names", [["a"], 5, {"a": 5}, {"a": ["b"]}, {"a": None}, {}, "text"])
def test_an_index_of_another_shape_is_refused(tmp_path, names):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(tiny.transformer_tensors(), folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="index.json"):
        load_transformer(folder)


def test_a_tokenizer_with_code_is_not_run(tmp_path, monkeypatch):
    """A diffusers folder may bring a tokenizer, and that may name a Python file beside it."""
    monkeypatch.chdir(tmp_path)
    source = find_tokenizer_folder()
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    settings["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    # Whether it is read as another or refused, the code beside it is not run.
    try:
        Krea2Tokenizer(tmp_path)
    except (ValueError, OSError) as error:
        assert error
    assert not (tmp_path / "ran").exists()
