"""A self-check as text: the machine, the model files, and problems with their remedies.

Made to be pasted into a bug report, so folders are named by their place in the models folder and
the home directory is "~". What only ComfyUI knows, the node K2SelfCheck adds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import __version__
from ..checkpoints.checkpoint import read_shapes
from ..checkpoints.identify import (
    LORA,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    WHERE,
    CheckpointError,
    identify,
)
from ..checks import counted
from ..nn import switches
from ..nn.attention import takes_grouped_heads
from .describe import PARTS, describe, size_text

# Folders of ComfyUI's models folder in which loaders look for each part.
FOLDERS = {
    TRANSFORMER: ("diffusion_models", "unet", "checkpoints", "diffusers"),
    TEXT_ENCODER: ("text_encoders", "clip", "checkpoints", "diffusers"),
    VAE: ("vae", "checkpoints", "diffusers"),
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_READ = (".safetensors", ".sft", ".gguf")
# Lines of `describe` that say what a file is, and those that say what is wrong with it.
_TOLD = ("variant", "size", "blocks", "layers", "low-rank branches", "decoder")
_FAULTS = ("broken", "missing", "surplus")


@dataclass
class Report:
    """Sections of lines, and problems (`wrong`) and hints (`notes`) with their remedies."""

    sections: list[tuple[str, list[str]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, title: str, read: Callable[[], Iterable[str]]) -> None:
        """Add a section. One that cannot be read says so: the others are wanted all the more."""
        try:
            lines = list(read())
        except Exception as error:
            lines = [f"could not be read: {type(error).__name__}: {error}"]
        self.sections.append((title, lines))

    def __str__(self) -> str:
        sections = [("What is wrong", self.wrong or ["nothing was found"])]
        if self.notes:
            sections.append(("Worth knowing", self.notes))
        blocks = [
            "\n".join((title, *(f"  {line}" for line in lines)))
            for title, lines in (*sections, *self.sections)
        ]
        return without_home("\n\n".join(("Krea 2 Kit self-check", *blocks)))


@dataclass(frozen=True)
class ModelFile:
    """A file or diffusers folder: the key of its models folder, its name there, its place."""

    folder: str
    name: str
    path: Path

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}".replace(os.sep, "/")


def check(models: Path | None = None) -> Report:
    """Check this Python, its devices and, where it is given, a models folder as ComfyUI's."""
    report = Report()
    report.add("Versions", versions)
    report.add("Devices", lambda: _devices(report))
    if models is not None:
        if not models.is_dir():
            raise CheckpointError(
                f"There is no folder {models}. Name ComfyUI's models folder, which holds "
                "diffusion_models, text_encoders and vae."
            )
        memory = sum(size for _, _, size in _accelerators())
        report.add("Model files", lambda: survey(_files_in(models), report, memory))
    return report


def versions() -> list[str]:
    """Versions of the pack, of Python, and of the packages that matter."""
    packages = ("transformers", "safetensors", "comfy-kitchen", "gguf")
    return [
        f"Krea 2 Kit: {__version__}",
        f"system: {platform.platform()}",
        f"Python: {platform.python_version()}",
        f"torch: {torch.__version__}",
        *(f"{name}: {package_version(name)}" for name in packages),
        *(f"{switches.VARIABLE}: {name}" for name in sorted(switches.active)),
    ]


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def kernel_note(device: torch.device, dtype: torch.dtype) -> str | None:
    """A note if torch lacks a fused kernel for Krea 2's grouped heads, else None."""
    if device.type != "cuda" or not torch.version.cuda:
        return None
    if takes_grouped_heads(torch.empty(1, 1, 1, 128, device=device, dtype=dtype)):
        return None
    return (
        f"torch {torch.__version__} has no flash attention for {dtype} on this GPU: keys and "
        "values are repeated for each query head, which is exact and takes more memory. It needs "
        "16 bits, a GPU of compute capability 8.0 or later, and a torch built with it."
    )


def survey(files: Iterable[ModelFile], report: Report, memory: int = 0) -> list[str]:
    """A line for each file of Krea 2, with problems added to `report`; others are counted.

    memory: bytes on all accelerators together, 0 where there is none; main memory is added.
    """
    lines: list[str] = []
    parts: dict[str, list[ModelFile]] = {part: [] for part in FOLDERS}
    loras = others = 0
    for file in files:
        try:
            kind = _kind(file)
            kinds = [part for part in FOLDERS if part in kind]
            if kinds:
                lines.append(f"{file}: {_summary(file, report)}")
        except (CheckpointError, OSError) as error:
            # Messages may name the whole path.
            text = str(error).replace(str(file.path), str(file))
            report.wrong.append(f"{file}: {text}")
            continue
        loras += LORA in kind
        others += not kinds and LORA not in kind
        for part in kinds:
            parts[part].append(file)
        if kinds and not any(file.folder in FOLDERS[part] for part in kinds):
            report.wrong.append(
                f"{file} is {kind}, and no loader looks for one in models/{file.folder}. Move it "
                f"to models/{FOLDERS[kinds[0]][0]}."
            )
    _check_parts(parts, report, memory)
    return [*lines, f"{counted(loras, 'LoRA')}, {counted(others, 'other file')}"]


def without_home(text: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:  # none, as in some containers
        return text
    return text.replace(home, "~") if len(home) > 1 else text


def _accelerators() -> list[tuple[torch.device, str, int]]:
    """Each accelerator with memory of its own: device, name, bytes."""
    accelerators = []
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            for index in range(backend.device_count()):
                memory = backend.get_device_properties(index).total_memory
                name = backend.get_device_name(index)
                accelerators.append((torch.device(kind, index), name, memory))
    return accelerators


def _devices(report: Report) -> Iterable[str]:
    for device, name, memory in _accelerators():
        yield f"{device} {name}: {size_text(memory)}"
        if note := kernel_note(device, torch.bfloat16):
            report.notes.append(note)
    if torch.backends.mps.is_available():
        yield "mps, which shares the processor's memory"
    yield f"cpu: {counted(os.cpu_count() or 1, 'core')}, {main_memory_text()}"


def main_memory() -> int:
    """Bytes of main memory; 0 where psutil, which ComfyUI brings, is not there to tell."""
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.virtual_memory().total


def main_memory_text() -> str:
    total = main_memory()
    return size_text(total) if total else "memory unknown"


def _files_in(models: Path) -> Iterable[ModelFile]:
    folders = dict.fromkeys(folder for several in FOLDERS.values() for folder in several)
    for folder in (*folders, "loras"):
        root, visited = models / folder, set()
        for current, children, names in os.walk(root, followlinks=True):
            real = os.path.realpath(current)
            if real in visited:  # a link back up
                children.clear()
                continue
            visited.add(real)
            here = Path(current)
            if "model_index.json" in names:
                children.clear()
                yield ModelFile(folder, str(here.relative_to(root)), here)
                continue
            if folder != "diffusers":
                for name in sorted(names):
                    yield ModelFile(folder, str((here / name).relative_to(root)), here / name)


def _kind(file: ModelFile) -> str:
    """The kind of a file, from its header, or of a folder, from the headers of its parts."""
    path = file.path
    if path.is_dir():
        return " with ".join(part for name, part in PARTS.items() if _holds(path / name, part))
    suffix = path.suffix.lower()
    if suffix in _PICKLES and "krea" in file.name.lower():
        raise CheckpointError(
            "this is a pickle, which can run code when loaded and is refused. Download the model "
            "as .safetensors or .gguf."
        )
    return identify(read_shapes(path)) if suffix in _READ else ""


def _holds(folder: Path, part: str) -> bool:
    shards = sorted(folder.glob("*.safetensors"))
    return any(part in identify(read_shapes(shard)) for shard in shards)


def _summary(file: ModelFile, report: Report) -> str:
    head, *rest = describe(file.path).splitlines()
    told = [line.strip() for line in rest]
    for line in told:
        if line.startswith(_FAULTS):
            report.wrong.append(f"{file}: {line}. Download it again.")
        if line.endswith("vision tower: no"):
            report.notes.append(
                f"{file} has no vision tower. That is fine for text, but Qwen3-4B (Z-Image's) "
                "has the same sizes and no vision tower either, and gives pictures that do not "
                f"follow the prompt. Where yours do not, use {WHERE[TEXT_ENCODER]}."
            )
    facts = [line for line in told if line.startswith(_TOLD)]
    return "; ".join((head.partition(": ")[2], *facts))


def _check_parts(parts: dict[str, list[ModelFile]], report: Report, memory: int) -> None:
    """Report missing parts, and a smallest transformer that is larger than all memory."""
    if not parts[TRANSFORMER]:
        report.notes.append(
            "There is no Krea 2 transformer: only the built-in krea2-nano can paint. Download "
            f"{WHERE[TRANSFORMER]}."
        )
        return
    for part in (TEXT_ENCODER, VAE):
        if not parts[part]:
            report.wrong.append(f"There is no file that is {part}. Download {WHERE[part]}.")
    files = [file for file in parts[TRANSFORMER] if file.path.is_file()]
    smallest = min(files, key=lambda file: file.path.stat().st_size, default=None)
    total = memory + main_memory()
    if smallest is not None and main_memory() and smallest.path.stat().st_size > total:
        report.wrong.append(
            f"{smallest}, the smallest transformer, has {size_text(smallest.path.stat().st_size)}; "
            f"this machine has {size_text(total)} of memory in all. Use one in 8 or 4 bits, such "
            "as krea2_turbo_fp8_scaled.safetensors or a GGUF."
        )
