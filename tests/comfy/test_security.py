"""A test for each claim of SECURITY.md that needs ComfyUI; tests/unit has those of the code."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from headless import ROOT

TINY = {
    "diffusion_models": "krea2_tiny_turbo.safetensors",
    "text_encoders": "qwen3vl_tiny.safetensors",
    "vae": "qwen_image_vae_tiny.safetensors",
    "loras": "tiny.safetensors",
}
# Every input that names a file, and the folder it names it in.
FILE_INPUTS = {
    ("K2Loader", "model"): "diffusion_models",
    ("K2Loader", "text_encoder"): "text_encoders",
    ("K2Loader", "vae"): "vae",
    ("K2ModelLoader", "file"): "diffusion_models",
    ("K2TextEncoderLoader", "file"): "text_encoders",
    ("K2VAELoader", "file"): "vae",
    ("K2LoraLoader", "lora"): "loras",
    ("K2Grid", "lora"): "loras",
    ("K2StyleLora", "style"): "loras",
    ("K2ControlLora", "control"): "loras",
    ("K2SaveStyle", "lora"): "loras",
    ("K2Inspect", "file"): "diffusion_models",
}
IDS = [".".join(key) for key in FILE_INPUTS]
# A folder of pictures, below the input folder; test_training.py has its names.
FOLDER_INPUTS = {("K2TrainLora", "folder")}
# A picture there.
PICTURE_INPUTS = {("K2PictureSettings", "image")}
# Krea 2 Style LoRA knows its nine names alone.
ANY_NAME = [key for key in FILE_INPUTS if key != ("K2StyleLora", "style")]

opened: list[str] = []
watching: list[bool] = []


def note_opened(event, arguments):
    if event == "open" and watching:
        opened.append(
            os.path.realpath(arguments[0]) if isinstance(arguments[0], str | Path) else ""
        )


sys.addaudithook(note_opened)


@pytest.fixture(scope="module")
def outside(models, tmp_path_factory):
    """A folder beside ComfyUI's with files that would load, were they inside."""
    (models / "loras").mkdir(exist_ok=True)
    lora = {
        "blocks.0.attn.wq.lora_A.weight": torch.randn(2, 256),
        "blocks.0.attn.wq.lora_B.weight": torch.randn(256, 2),
    }
    save_file(lora, models / "loras" / TINY["loras"])
    folder = tmp_path_factory.mktemp("outside")
    for kind, name in TINY.items():
        (folder / kind).mkdir()
        shutil.copyfile(models / kind / name, folder / kind / "outside.safetensors")
    # Among ComfyUI's own folders too, but not a model's.
    for kind in ("custom_nodes", "input", "output"):
        shutil.copyfile(models / "vae" / TINY["vae"], models.parent / kind / "outside.safetensors")
    return folder


@pytest.fixture
def use(run, pack, models):
    """Give a name to a file input: what validation says, and what running does."""
    nodes = {node.GET_SCHEMA().node_id: node for node in pack("nodes").NODES}

    def call(node, name, value):
        verdict = nodes[node].validate_inputs(**{name: value})
        inputs = {
            "K2LoraLoader": {"model": None},
            "K2StyleLora": {"model": None, "prompt": ""},
            "K2ControlLora": {"form": "reference tokens (time 0)"},
            "K2Loader": {"model": TINY["diffusion_models"]},
            "K2Grid": dict.fromkeys(("model", "clip", "vae", "latent", "prompt")),
        }
        if (node, name) == ("K2LoraLoader", "lora") and verdict is True:
            inputs["K2LoraLoader"]["model"] = run("K2ModelLoader", file=TINY["diffusion_models"])[0]
        if node == "K2Grid" and verdict is True:
            loaded = run("K2Loader", **{**inputs["K2Loader"], "text_encoder": "auto"})
            latent = run("K2EmptyLatent", aspect="custom", width=64, height=64)[0]
            parts = dict(zip(("model", "clip", "vae"), loaded, strict=True))
            options = {"prompt": "a star", "x_axis": "steps", "x_values": "1"}
            inputs["K2Grid"] = {**parts, "latent": latent, **options}
        return verdict, lambda: run(node, **{**inputs.get(node, {}), name: value})

    return call


def test_the_list_of_file_inputs_is_complete(pack, models, outside):
    found = set()
    for node in pack("nodes").NODES:
        for each in node.GET_SCHEMA().inputs:
            options = [str(option) for option in getattr(each, "options", None) or ()]
            is_upload = getattr(each, "upload", None) is not None
            if is_upload or any("safetensors" in o or "built in" in o for o in options):
                found.add((node.GET_SCHEMA().node_id, each.id))
    assert found == set(FILE_INPUTS) | FOLDER_INPUTS | PICTURE_INPUTS


@pytest.mark.parametrize("key", FILE_INPUTS, ids=IDS)
def test_names_that_lead_out_of_the_folder(use, outside, models, key):
    """Validation refuses them, running does, and no file is opened outside."""
    folder, target = FILE_INPUTS[key], outside / FILE_INPUTS[key] / "outside.safetensors"
    up = os.path.relpath(target, models / folder)
    names = [
        str(target), up, up.replace("/", "\\"), f"./{up}", f"x/../{up}", f"//{target}",
        f"file://{target}", "~/outside.safetensors", f"{target}\0", "", ".", "..", "/",
        f"{folder}/{up}", f"{folder}/{target}", f"diffusers/../{up}", "diffusers/..", "diffusers/",
        "custom_nodes/outside.safetensors", "../custom_nodes/outside.safetensors",
        "input/outside.safetensors", "output/outside.safetensors", "C:\\Windows\\win.ini",
        "\\\\host\\share\\outside.safetensors",
    ]  # fmt: skip
    opened.clear()
    watching.append(True)
    try:
        for name in names:
            verdict, execute = use(*key, name)
            assert verdict is not True, name
            with pytest.raises(ValueError, match="There is no|expected"):
                execute()
    finally:
        watching.clear()
    assert not [file for file in opened if file.startswith(str(outside))]


@pytest.mark.parametrize("key", PICTURE_INPUTS, ids=map(".".join, PICTURE_INPUTS))
def test_names_that_lead_out_of_the_input_folder(use, outside, models, key):
    """Also those of ComfyUI's other folders, which its page puts behind a name."""
    folder, target = models.parent / "input", outside / "picture.png"
    Image.new("RGB", (8, 8)).save(target)
    shutil.copyfile(target, models.parent / "output" / target.name)
    up = os.path.relpath(target, folder)
    names = [
        str(target), up, up.replace("/", "\\"), f"./{up}", f"x/../{up}", f"//{target}",
        f"file://{target}", "~/picture.png", f"{target}\0", "", ".", "..", "/",
        "../output/picture.png",
        "picture.png [output]", f"{up} [input]", "C:\\picture.png", "\\\\host\\share\\picture.png",
    ]  # fmt: skip
    opened.clear()
    watching.append(True)
    try:
        for name in [*names, 5, True, ["a"], {"a": 1}]:
            verdict, execute = use(*key, name)
            assert verdict is not True, name
            with pytest.raises(ValueError, match="There is no|expected"):
                execute()
    finally:
        watching.clear()
    assert not [file for file in opened if file.endswith(".png")]


@pytest.mark.parametrize("key", FILE_INPUTS, ids=IDS)
@pytest.mark.parametrize("value", [5, True, 1.5, ["a"], {"a": 1}])
def test_names_that_are_no_text(use, outside, key, value):
    verdict, execute = use(*key, value)
    said = f"The file is {value!r}; expected a name from the list."
    # Load Krea 2 has three, and says which it is.
    assert verdict in (said, f"{key[1]}: {said}")
    with pytest.raises(ValueError, match="expected a name"):
        execute()


@pytest.mark.parametrize("key", ANY_NAME, ids=map(".".join, ANY_NAME))
def test_symbolic_links_that_the_owner_made_are_followed(use, outside, models, key):
    """As everywhere in ComfyUI: whoever can make a link there can put the file there."""
    folder = FILE_INPUTS[key]
    link = models / folder / "link.safetensors"
    link.symlink_to(outside / folder / "outside.safetensors")
    try:
        prefix = f"{folder}/" if key[0] == "K2Inspect" else ""
        verdict, execute = use(*key, prefix + link.name)
        assert verdict is True
        assert execute()
    finally:
        link.unlink()


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return open, (self.witness, "w")


def pickles(folder: Path, witness: Path) -> dict[str, bytes]:
    """Pickles in each of PyTorch's containers."""
    weights = {"first.weight": torch.zeros(2), "payload": Payload(witness)}
    contents = {"bare": pickle.dumps(weights)}
    for name, modern in (("zip", True), ("legacy", False)):
        torch.save(weights, folder / name, _use_new_zipfile_serialization=modern)
        contents[name] = (folder / name).read_bytes()
    return contents


SUFFIXES = (".ckpt", ".pt", ".pt2", ".bin", ".pth", ".pkl", ".PT", "", ".safetensors", ".sft",
            ".SAFETENSORS", ".gguf")  # fmt: skip


@pytest.mark.parametrize("key", FILE_INPUTS, ids=IDS)
def test_pickles_are_refused_by_any_name(use, outside, models, tmp_path, key, monkeypatch):
    folder, witness = FILE_INPUTS[key], tmp_path / "ran"
    prefix = f"{folder}/" if key[0] == "K2Inspect" else ""
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: loads.append(arguments))
    for kind, content in pickles(tmp_path, witness).items():
        for suffix in SUFFIXES:
            file = models / folder / f"pickle_{kind}{suffix}"
            file.write_bytes(content)
            try:
                verdict, execute = use(*key, prefix + file.name)
                # Inspect takes any file, and says what it is.
                assert verdict is not True or key[0] == "K2Inspect"
                with pytest.raises(ValueError, match="pickle|expected|other kind|broken"):
                    execute()
            finally:
                file.unlink()
    assert not loads and not witness.exists()
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path / "zip", weights_only=True)
    pickle.loads(pickle.dumps(Payload(witness)))
    assert witness.exists(), "The payload would not have run anyway."


def test_pickles_are_not_listed(pack, models, outside):
    files = pack("nodes.model_files")
    kinds = pack("krea2_model.checkpoints.identify")
    names = [f"old{suffix}" for suffix in (".ckpt", ".pt", ".bin", ".pth", ".pkl")]
    try:
        for folder in (*TINY, "checkpoints"):
            (models / folder).mkdir(exist_ok=True)
            for name in names:
                (models / folder / name).write_bytes(b"\x80")
        for part in (kinds.TRANSFORMER, kinds.TEXT_ENCODER, kinds.VAE):
            assert not set(names) & set(files.list_models(part))
        assert not set(names) & set(files.list_loras())
    finally:
        for file in models.rglob("old.*"):
            file.unlink()


@pytest.mark.parametrize("kind", ["diffusion_models", "text_encoders", "vae"])
def test_safetensors_by_another_name_never_reach_a_reader_of_pickles(
    run, models, kind, monkeypatch
):
    """ComfyUI's reader takes a file for a pickle unless its name says that it is none."""

    def fail(*arguments, **options):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", fail)
    file = models / kind / "disguised.gguf"
    shutil.copyfile(models / kind / TINY[kind], file)
    node = {"diffusion_models": "K2ModelLoader", "text_encoders": "K2TextEncoderLoader",
            "vae": "K2VAELoader"}[kind]  # fmt: skip
    try:
        with pytest.raises(ValueError, match="Rename it to end in .safetensors"):
            run(node, file=file.name)
    finally:
        file.unlink()


def test_every_node_without_network_code_or_writing(tmp_path):
    """In a process of its own, with nothing set that keeps libraries off the network."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))
    }
    cache = environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    script = ROOT / "tests" / "support" / "audited_run.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # torch.compile's own, for Compile Krea 2, and what two nodes are there to write.
    output = str(tmp_path / "output")
    kept = [event for event in found["written"] if output in event]
    names = ("loras", "krea2_training", "krea2_training_cache", "krea2_grid")
    allowed = [f"{output}/{name}" for name in names]
    assert kept and all(any(each in event for each in allowed) for event in kept), kept
    # And its curve, which ComfyUI shows from its temporary folder.
    # Save a Krea 2 Style writes to the user's styles.
    saved = str(tmp_path / "user" / "krea2_styles")
    assert any(saved in event for event in found["written"])
    ours = (cache, output, saved, str(tmp_path / "temp"))
    found["written"] = [e for e in found["written"] if not any(path in e for path in ours)]
    assert found == {"network": [], "code": [], "written": [], "unused": []}


def test_the_page_s_script_stays_on_the_page():
    for file in (ROOT / "web").rglob("*.js"):
        text = file.read_text(encoding="utf-8")
        for word in ("http:", "https:", "fetch(", "XMLHttpRequest", "WebSocket", "eval(",
                     "Function(", "innerHTML", "outerHTML", "insertAdjacentHTML",
                     "document.write"):  # fmt: skip
            assert word not in text, f"{file.name}: {word}"


def test_a_diffusers_folder_that_names_files_elsewhere(run, models, outside):
    folder = models / "diffusers" / "escape"
    (folder / "transformer").mkdir(parents=True)
    target = outside / "diffusion_models" / "outside.safetensors"
    try:
        (folder / "model_index.json").write_text("{}")
        up = os.path.relpath(target, folder / "transformer")
        for name in (str(target), up, up.replace("/", "\\"), f"./{up}"):
            index = {"weight_map": dict.fromkeys(load_file(target), name)}
            file = folder / "transformer" / "model.safetensors.index.json"
            file.write_text(json.dumps(index))
            with pytest.raises(ValueError, match="not in that folder"):
                run("K2ModelLoader", file="escape")
    finally:
        shutil.rmtree(folder)
