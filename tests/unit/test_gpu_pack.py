"""The archive for a machine with a GPU: enough, not too much, no code for other GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest

import gpu_pack
from benchmarks.__main__ import ROOT, comfyui

# What would make the archive large.
MOST_BYTES = 20_000_000


def chosen():
    folder = comfyui()
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if gpu_pack.belongs(name, path.stat().st_size):
                yield name, path


def test_files_of_comfyui():
    files = dict(chosen())
    for needed in ("nodes.py", "cuda_malloc.py", "folder_paths.py", "comfyui_version.py",
                   "comfy/ldm/krea2/model.py", "comfy/text_encoders/qwen25_tokenizer/vocab.json",
                   "comfy/sd1_clip_config.json", "comfy_api/latest/__init__.py",
                   "comfy_extras/nodes_custom_sampler.py", "latent_preview.py"):  # fmt: skip
        assert needed in files, needed
    unused = ("models/", "tests", "blueprints", "custom_nodes", "input/")
    assert not [name for name in files if name.startswith(unused) or "__pycache__" in name]
    assert not [name for name in files if "t5_tokenizer" in name]
    assert sum(path.stat().st_size for path in files.values()) < MOST_BYTES


def test_the_stub_has_every_module_of_av_that_comfyui_imports():
    wanted = set()
    for name, path in chosen():
        if name.endswith(".py"):
            wanted |= set(re.findall(r"^\s*(?:from|import) (av(?:\.\w+)*)", path.read_text(), re.M))
    modules = {("av/" + m).removesuffix("/__init__").replace("/", ".") for m in gpu_pack.AV_MODULES}
    assert wanted and wanted <= modules


def test_the_stub_gives_names_and_refuses_their_use(tmp_path):
    file = tmp_path / "av.py"
    file.write_text(gpu_pack.AV_STUB)
    spec = importlib.util.spec_from_file_location("av_stub", file)
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    assert isinstance(stub.VideoFrame, type) and (stub.VideoFrame | None)
    with pytest.raises(RuntimeError, match="stub of av"):
        stub.VideoFrame()


def test_files_of_packages():
    belongs = gpu_pack.belongs_in_package
    assert belongs("comfy_kitchen/backends/cuda/_C.abi3.so") and belongs("comfy_aimdo/aimdo.so")
    assert belongs("diffusers-0.42.1.dist-info/METADATA")
    assert not belongs("comfy_kitchen/backends/hip/_C.abi3.so")
    assert not belongs("comfy_aimdo/aimdo_rocm.so")


def fat_binary(*entries):
    """A container of (architecture, code); entries have headers of 64 bytes."""
    body = b""
    for architecture, code in entries:
        header = struct.pack("<HHIQ", 2, 1, 64, len(code)).ljust(28, b"\1")
        body += (header + struct.pack("<I", architecture)).ljust(64, b"\1") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_only_the_code_of_one_architecture_stays():
    code = {80: b"ampere" * 9, 90: b"hopper" * 7, 120: b"blackwell" * 5}
    library = (b"\x7fELF head" + fat_binary(*code.items()) + b"host code"
               + fat_binary((90, b"second"), (75, b"turing")) + b"tail")  # fmt: skip
    data = bytearray(library)
    sizes = gpu_pack.keep_one_architecture(data)
    assert sizes == {80: 54, 90: 48, 120: 45, 75: 6}
    expected = library
    for other in (code[80], code[120], b"turing"):
        expected = expected.replace(other, bytes(len(other)))
    assert bytes(data) == expected
    with pytest.raises(ValueError, match="none for 90"):
        gpu_pack.keep_one_architecture(bytearray(fat_binary((80, b"x"))))


def test_a_cut_off_container_is_left_alone():
    library = bytearray(fat_binary((80, b"code" * 10))[:-8])
    before = bytes(library)
    gpu_pack.keep_one_architecture(library)
    assert bytes(library) == before


def test_the_archive_holds_comfyui_and_packages(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    (source / "comfy").mkdir(parents=True)
    (source / "nodes.py").write_text("x = 1\n")
    (source / "comfy" / "sd.py").write_text("y = 1\n")
    (source / "openapi.yaml").write_text("z: 1\n")
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "thing-1.whl", "w") as wheel:
        wheel.writestr("thing/_C.so", b"ELF" + fat_binary((80, b"old"), (90, b"new")))
        wheel.writestr("thing/__init__.py", "")
    gpu_pack.write(source, wheels, tmp_path / "out" / "pack.tar.xz")
    with tarfile.open(tmp_path / "out" / "pack.tar.xz") as archive:
        names = archive.getnames()
        library = archive.extractfile("packages/thing/_C.so").read()
    assert {"comfyui/nodes.py", "comfyui/comfy/sd.py", "packages/thing/__init__.py"} <= {*names}
    assert "comfyui/openapi.yaml" not in names and "packages/av/__init__.py" in names
    assert b"new" in library and b"old" not in library


def test_the_folder_is_ignored_by_git_and_by_the_registry():
    for file in (".gitignore", ".comfyignore"):
        assert ".gpu/" in (ROOT / file).read_text().splitlines()


@pytest.mark.parametrize("has_pack, given", [(True, ""), (False, ""), (False, "/a/comfyui")])
def test_nano_is_trained_with_the_pack_and_without(tmp_path, has_pack, given):
    """The pack's ComfyUI while the run lasts, one that is named, or none."""
    (tmp_path / "scripts").mkdir()
    for name in ("gpu_train_nano.sh", "gpu_environment.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    if has_pack:
        (tmp_path / ".gpu").mkdir()
        (tmp_path / "main.py").write_text("")
        with tarfile.open(tmp_path / ".gpu" / "pack.tar.xz", "w:xz") as file:
            file.add(tmp_path / "main.py", "comfyui/main.py")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in *train_nano_256.py) mkdir -p "$3"; cd "$COMFYUI_PATH" 2>&1\n'
        f'echo "$COMFYUI_PATH" >"$3/place"; ls >"$3/files";; *) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("COMFYUI_PATH", "OUT")}
    environment |= {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path)}
    environment |= {"COMFYUI_PATH": given} if given else {}
    script = ["bash", str(tmp_path / "scripts" / "gpu_train_nano.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    place = (tmp_path / "out" / "place").read_text().strip()
    assert done.returncode == 0, done.stderr
    assert place.endswith("/comfyui") == (has_pack or bool(given)) and (place or not given)
    assert ("main.py" in (tmp_path / "out" / "files").read_text()) == has_pack
    assert not list(tmp_path.glob("tmp.*")), "what was unpacked is gone"
