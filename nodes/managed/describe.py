"""Descriptions of a MODEL, a CLIP and this ComfyUI, as lines of text for the self-check."""

import inspect
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, MethodType

import comfy.ldm.modules.attention
import comfy.model_management as management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.quant_ops
import comfyui_version
import folder_paths
import torch

from ...krea2_model.tools.describe import size_text
from ...krea2_model.tools.self_check import Report, kernel_note, main_memory_text, package_version
from .backend import OVERRIDE
from .gguf import LAYOUT
from .lora import LoraPatch

_OPTIONS = "transformer_options"

# Quantised formats; an older ComfyUI lacks the later ones.
_FORMATS = ("float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4")


def versions() -> Iterable[str]:
    yield f"ComfyUI: {comfyui_version.__version__}"
    yield f"frontend: {package_version('comfyui-frontend-package')}"
    yield f"comfy-aimdo: {package_version('comfy-aimdo')}"
    # Values may be paths or addresses; numbers are neither.
    flags = [word.partition("=")[0] for word in sys.argv[1:] if _is_flag_or_number(word)]
    yield f"flags: {' '.join(flags) or 'none'}"


def devices(report: Report) -> Iterable[str]:
    main = management.get_torch_device()
    listed = getattr(management, "get_all_torch_devices", lambda: [main])()
    for device in dict.fromkeys((main, *listed)):
        name = management.get_torch_device_name(device)
        total, free = management.get_total_memory(device), management.get_free_memory(device)
        yield f"{name}: {size_text(int(total))}, {size_text(int(free))} of it free"
    yield f"main memory: {main_memory_text()}"
    yield f"memory mode: {management.vram_state.name}"
    dtype = management.unet_dtype(weight_dtype=torch.bfloat16)
    yield f"a transformer in bfloat16 is held in {_name(dtype)}"
    if note := kernel_note(main, dtype):
        report.notes.append(note)


def accelerations(report: Report) -> Iterable[str]:
    attention = comfy.ldm.modules.attention.optimized_attention
    yield f"attention: {attention.__name__} of {attention.__module__}"
    plain = comfy.model_patcher.CoreModelPatcher is comfy.model_patcher.ModelPatcher
    yield f"dynamic VRAM: {'off' if plain else 'on'}"
    kernels = getattr(comfy.quant_ops, "ck", None)
    if kernels is None:
        yield "fused kernels: none, comfy-kitchen is not there"
        report.wrong.append(
            "comfy-kitchen cannot be imported: quantised files do not load. Install ComfyUI's "
            "requirements again: pip install -r requirements.txt."
        )
        return
    for name, state in sorted(kernels.list_backends().items()):
        usable = state["available"] and not state["disabled"]
        reason = "switched off" if state["available"] else state["unavailable_reason"]
        yield f"fused kernels, {name}: {'yes' if usable else f'no ({reason})'}"
    if management.is_nvidia() and not kernels.registry.is_available("cuda"):
        report.notes.append(
            f"ComfyUI's fused kernels are off: torch is built for CUDA {torch.version.cuda}, they "
            "need 13.0 or later. Sampling works and is slower; install a torch of index cu130."
        )


def capabilities(report: Report) -> Iterable[str]:
    """Features of this ComfyUI that older ones lack."""
    kernels = getattr(comfy.quant_ops, "ck", None)
    known = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    for name in _FORMATS:
        yield f"{name}: {'yes' if name in known else 'no'}"
    if missing := [name for name in _FORMATS if name not in known]:
        report.notes.append(
            f"This ComfyUI does not know weights in {', '.join(missing)}; files in them are "
            "refused. Update ComfyUI for them."
        )
    fused = hasattr(kernels, "rms_rope_") and hasattr(kernels, "rms_adaln")
    yield f"fused norm and rotation: {'yes' if fused else 'no, in plain torch instead'}"


def replaced() -> Iterable[str]:
    """Functions of ComfyUI that custom nodes have replaced."""
    roots = [Path(root) for root in folder_paths.get_folder_paths("custom_nodes")]
    count = 0
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] not in ("comfy", "execution", "folder_paths", "server"):
            continue
        for name, value in list(vars(module).items()):
            members = {name: value}
            if inspect.isclass(value) and value.__module__ == module_name:
                members = {f"{name}.{key}": member for key, member in vars(value).items()}
            for path, member in members.items():
                if pack := _custom_node_of(member, roots):
                    count += 1
                    yield f"{module_name}.{path} by {pack}"
    if not count:
        yield "nothing"


def model(patcher) -> Iterable[str]:
    """The kind of a MODEL, its storage, and its patches."""
    inner = patcher.model
    yield f"kind: {type(inner).__module__.rpartition('.')[2]}.{type(inner).__name__}"
    if preset := getattr(inner, "preset", None):
        mu = "by size" if preset.mu is None else preset.mu
        yield f"settings: {preset.steps} steps, guidance {preset.guidance}, mu {mu}"
    yield f"calculates in: {_name(inner.get_dtype_inference())}"
    yield from _memory(patcher)
    yield f"weights: {_formats(inner.diffusion_model)}"
    yield f"LoRAs and merges: {_weight_patches(patcher)}"
    options = patcher.model_options.get(_OPTIONS, {})
    compiled = patcher.model_options.get("torch_compile_kwargs")
    yield f"torch.compile: {compiled['backend'] if compiled else 'no'}"
    override = options.get(OVERRIDE)
    yield f"attention override: {_origin(override) if override else 'none'}"
    yield f"other patches: {', '.join(_other_patches(patcher, options)) or 'none'}"


def clip(encoder) -> Iterable[str]:
    """The kind of a CLIP, its storage, and its patches."""
    inner = encoder.cond_stage_model
    yield f"kind: {type(inner).__module__.rpartition('.')[2]}.{type(inner).__name__}"
    yield from _memory(encoder.patcher)
    yield f"weights: {_formats(inner)}"
    yield f"LoRAs and merges: {_weight_patches(encoder.patcher)}"


def _memory(patcher) -> Iterable[str]:
    dynamic = getattr(patcher, "is_dynamic", bool)()
    yield (
        f"memory: {size_text(patcher.model_size())}, {size_text(int(patcher.loaded_size()))} of it "
        f"on {patcher.load_device}, dynamic: {'yes' if dynamic else 'no'}"
    )


def _formats(module) -> str:
    """Storage formats of the matrices, the most frequent first."""
    formats = Counter(_format(w) for w in module.parameters() if w.ndim > 1)
    return ", ".join(f"{count} x {name}" for name, count in formats.most_common())


def _format(weight) -> str:
    layout = getattr(weight, "_layout_cls", None)
    if layout is None:
        return _name(weight.dtype)
    return f"GGUF {weight._params.format}" if layout == LAYOUT else layout.removesuffix("Layout")


def _weight_patches(patcher) -> str:
    kinds: Counter = Counter()
    for patches in patcher.patches.values():
        for strength, patch, *_ in patches:
            if isinstance(patch, LoraPatch):
                kind = patch.weights[0].kind
            else:
                kind = getattr(patch, "name", None) or patch[0]
            kinds[f"{kind} at {strength:g}"] += 1
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()) or "none"


def _other_patches(patcher, options) -> Iterable[str]:
    yield from sorted(patcher.object_patches)
    for kind, patches in options.get("patches", {}).items():
        yield from (f"{kind} ({_origin(patch)})" for patch in patches)
    for kind, places in options.get("patches_replace", {}).items():
        yield from (f"{kind} {place} ({_origin(patch)})" for place, patch in places.items())
    for kind, by_key in patcher.wrappers.items():
        yield from (f"{kind} wrapper {key}" for key, several in by_key.items() if several)
    for name, value in patcher.model_options.items():
        for function in value if isinstance(value, list) else [value]:
            if callable(function):
                yield f"{name} ({_origin(function)})"


def _origin(function) -> str:
    """The module of a function, by its last two names: the first ones of a pack are its path."""
    module = getattr(function, "__module__", None) or type(function).__module__
    return ".".join(Path(module).name.split(".")[-2:])


def _custom_node_of(member, roots: list[Path]) -> str | None:
    if isinstance(member, (staticmethod, classmethod, MethodType)):
        member = member.__func__
    if isinstance(member, FunctionType):
        file = member.__code__.co_filename
    elif isinstance(member, type):
        file = getattr(sys.modules.get(member.__module__), "__file__", None) or ""
    else:
        return None
    return next((Path(file).relative_to(r).parts[0] for r in roots if _is_in(file, r)), None)


def _is_in(file: str, folder: Path) -> bool:
    return Path(file).is_relative_to(folder)


def _is_flag_or_number(word: str) -> bool:
    return word.startswith("-") or word.replace(".", "", 1).isdigit()


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
