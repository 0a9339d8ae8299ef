"""The archive that lets a bare machine with a GPU run the check: ComfyUI, and packages it lacks.

    python scripts/gpu_pack.py COMFYUI WHEELS OUT.tar.xz

`gpu_pack.sh` calls it. Files go in at `comfyui/` and `packages/`. Only the device code of one GPU
generation stays in CUDA libraries: the code of the others is overwritten with zeros, which take
no room in the archive.
"""

from __future__ import annotations

import io
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# sm_90, that is H100 and H200; their own variant (90a) has the same number.
ARCHITECTURE = 90
FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)

# ComfyUI's own files that nothing in the check imports or reads.
UNUSED = ("api_server", "blueprints", "comfy_api_nodes", "custom_nodes", "input", "models",
          "output", "script_examples", "tests", "tests-unit", "openapi.yaml")  # fmt: skip
# What is not code and yet read: the tokenizer of Krea 2's text encoder, and small configurations.
TOKENIZER = "comfy/text_encoders/qwen25_tokenizer/"
DATA = (".json", ".yaml", ".txt")
LARGEST_DATA = 100_000

# ComfyUI imports av for its video nodes, which the check has none of.
AV_STUB = '''"""Stands in for PyAV: names that are imported, of which none can be used."""


class _Missing:
    def __init__(self, *arguments, **options):
        raise RuntimeError("This is a stub of av. Install av for audio and video.")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing
'''
AV_MODULES = ("__init__", "container", "subtitles/__init__", "subtitles/stream", "video/__init__",
              "video/reformatter")  # fmt: skip


def belongs(path: str, size: int) -> bool:
    """True for a file of ComfyUI's, by its path in its folder, that the archive holds."""
    parts = path.split("/")
    if parts[0] in UNUSED or "__pycache__" in parts or parts[-1].startswith("."):
        return False
    if path.startswith(TOKENIZER):
        return True
    if path.endswith(".py"):
        return True
    is_data = path.endswith(DATA) and "_tokenizer/" not in path
    return parts[0] == "comfy" and is_data and size <= LARGEST_DATA


def belongs_in_package(path: str) -> bool:
    """True for a wheel's file that the archive holds: all but types and other devices' code."""
    return not (
        "/backends/hip/" in path
        or path.endswith((".pyi", "RECORD", "aimdo_rocm.so", ".dll", ".cuh", ".h"))
        or "/licenses/" in path
    )


def keep_one_architecture(data: bytearray, architecture: int = ARCHITECTURE) -> dict[int, int]:
    """Overwrite the device code of other GPUs in a shared library with zeros, in place.

    A fat binary is a header (magic, version, its own length, length of what follows) and then
    entries, each with a header of its own that names the architecture. Returns the bytes of
    device code by architecture, as they were. Raises ValueError where none is for `architecture`.
    """
    sizes: dict[int, int] = {}
    at = data.find(FATBIN_MAGIC)
    while at >= 0:
        _, _, header, length = struct.unpack_from("<IHHQ", data, at)
        entry, end = at + header, at + header + length
        while entry + 32 <= min(end, len(data)):
            _, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (found,) = struct.unpack_from("<I", data, entry + 28)
            if not entry_header or entry + entry_header + payload > len(data):
                break
            sizes[found] = sizes.get(found, 0) + payload
            if found != architecture:
                start = entry + entry_header
                data[start : start + payload] = bytes(payload)
            entry += entry_header + payload
        at = data.find(FATBIN_MAGIC, max(end, at + 4))
    if sizes and architecture not in sizes:
        raise ValueError(
            f"The library has device code for {sorted(sizes)} and none for {architecture}; take a "
            "build that has it."
        )
    return sizes


def comfyui_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if belongs(name, path.stat().st_size):
                yield f"comfyui/{name}", path.read_bytes()


def package_files(wheels: Path) -> Iterator[tuple[str, bytes]]:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith("/") or not belongs_in_package(name):
                    continue
                content = archive.read(name)
                if name.endswith(".so") and FATBIN_MAGIC in content:
                    data = bytearray(content)
                    sizes = keep_one_architecture(data)
                    print(f"{name}: device code {sum(sizes.values()) / 1e6:.0f} MB, of it "
                          f"{sizes[ARCHITECTURE] / 1e6:.1f} MB stays")  # fmt: skip
                    content = bytes(data)
                yield f"packages/{name}", content
    for module in AV_MODULES:
        yield f"packages/av/{module}.py", AV_STUB.encode()


def write(comfyui: Path, wheels: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[str, int] = {}
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for files in (comfyui_files(comfyui), package_files(wheels)):
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
                group = "/".join(name.split("/")[: 1 if name.startswith("comfyui") else 2])
                groups[group] = groups.get(group, 0) + len(content)
    for group, size in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"{group}: {size / 1e6:.1f} MB unpacked")


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:4]))
