"""Files from files: one file from a diffusers folder and back, 8-bit files from 16-bit ones.

Everything goes through a tensor at a time, so memory holds the largest tensor and not the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.gguf import GGUFTensor
from ..checkpoints.identify import CheckpointError
from ..checkpoints.quantised import SETTINGS, is_quantised
from ..checkpoints.quantised_weight import eight_bits, hadamard_rotate
from ..checkpoints.storage import Entry, Progress, write_safetensors
from ..checkpoints.text_encoder import read_text_encoder
from ..checkpoints.transformer import preset_metadata, read_transformer
from ..checkpoints.transformer_keys import (
    is_norm_or_table,
    module_to_official,
    official_to_diffusers,
)
from ..checkpoints.vae import read_vae
from ..checkpoints.vae_keys import vae_key_map
from .diffusers_folder import (
    SCHEDULER,
    copy_tokenizer,
    encoder_config,
    transformer_config,
    vae_config,
    write_json,
)

PARTS = ("transformer", "text_encoder", "vae")
# Prefixes of the parts in an all-in-one file of ComfyUI.
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3vl_4b.transformer.",
    "vae": "vae.",
}
# Names of quantisations in a layer's settings.
STORED_FORMATS = {
    "fp8": "float8_e4m3fn",
    "int8": "int8_tensorwise",
    "int8_convrot": "int8_tensorwise",
}
QUANTISATIONS = tuple(STORED_FORMATS)


def convert(
    source: Path,
    target: Path,
    quantise: str | None = None,
    part: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Convert a file or diffusers folder into a file (`.safetensors`) or a diffusers folder.

    quantise: one of `QUANTISATIONS`, for the matrices of the transformer's blocks; None keeps what
        is stored, and turns GGUF blocks into bfloat16.
    part: only this one of `PARTS`; None is all that the source holds.
    progress: called with the bytes written so far and in all, of each file.
    Returns the files written. Raises CheckpointError for a source without any part, and
    ValueError for options that contradict each other.
    """
    if quantise not in (None, *QUANTISATIONS):
        raise ValueError(f"quantise is {quantise!r}; expected one of {', '.join(QUANTISATIONS)}.")
    if part not in (None, *PARTS):
        raise ValueError(f"part is {part!r}; expected one of {', '.join(PARTS)}.")
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself; name another target.")
    checkpoints = _open_parts(source, (part,) if part else PARTS)
    if target.suffix.lower() in (".safetensors", ".sft"):
        return [_write_file(checkpoints, target, quantise, progress)]
    if target.suffix:
        raise ValueError(
            f"{target.name} ends in {target.suffix}; expected a name that ends in .safetensors, or "
            "a folder."
        )
    if quantise:
        raise ValueError("diffusers folders are not quantised; name a .safetensors target.")
    return _write_new_folder(checkpoints, target, progress)


_READERS: dict[str, Callable[[Checkpoint], Any]] = {
    "transformer": read_transformer, "text_encoder": read_text_encoder, "vae": read_vae,
}  # fmt: skip


def _open_parts(source: Path, parts: Iterable[str]) -> dict[str, Checkpoint]:
    checkpoints, errors = {}, []
    for part in parts:
        is_pipeline = source.is_dir() and (source / "model_index.json").is_file()
        if is_pipeline and not (source / part).is_dir():
            continue
        checkpoint = open_checkpoint(source, part)
        try:
            _READERS[part](checkpoint)
        except CheckpointError as error:
            errors.append(error)
        else:
            checkpoints[part] = checkpoint
    if not checkpoints:
        raise errors[0] if errors else CheckpointError(f"{source} holds no part of Krea 2.")
    return checkpoints


def _write_file(
    checkpoints: Mapping[str, Checkpoint],
    target: Path,
    quantise: str | None,
    progress: Progress | None,
) -> Path:
    """One file: a part alone under bare names, several under ComfyUI's prefixes."""
    if quantise and "transformer" not in checkpoints:
        raise ValueError("quantise is for transformers, and the source holds none.")
    alone = len(checkpoints) == 1
    entries: list[Entry] = []
    metadata = {"format": "pt"}
    for part, checkpoint in checkpoints.items():
        _refuse_lost_settings(part, checkpoint)
        prefix = "" if alone else PREFIXES[part]
        if part == "transformer":
            state = read_transformer(checkpoint)
            metadata |= preset_metadata(state.variant, state.preset)
            entries += _transformer_entries(state.tensors, prefix, quantise)
        else:
            rename = _encoder_name if part == "text_encoder" else _vae_names(checkpoint, False)
            entries += _plain_entries(checkpoint, part, rename, prefix)
    write_safetensors(target, entries, metadata, progress)
    return target


# Settings that only a folder's configuration gives; the rest is inferred from tensors.
_SETTINGS = {
    "transformer": ("rope_theta", "norm_eps"),
    "text_encoder": ("tap_layers", "rope_theta", "rms_norm_eps"),
    "vae": ("latents_mean", "latents_std"),
}


def _refuse_lost_settings(part: str, checkpoint: Checkpoint) -> None:
    config = _READERS[part](checkpoint).config
    lost = [
        name for name in _SETTINGS[part] if getattr(config, name) != getattr(type(config), name)
    ]
    if lost:
        raise CheckpointError(
            f"{checkpoint.path.name} sets {', '.join(lost)} otherwise than the released model, "
            "which one file cannot carry. Name a folder as the target."
        )


def quantise_blocks(
    tensors: Mapping[str, Tensor],
    quantise: str,
    device: torch.device | str = "cpu",
    result_device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Quantise the matrices of a transformer's blocks to 8 bits, and add their settings.

    quantise: one of `QUANTISATIONS`. device: for the calculation. result_device: of quantised
        tensors; the CPU by default, since a card may not hold both.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _is_block_matrix(name, tensor):
            for entry in _quantised_entries(name, tensor.to(device), quantise):
                value = entry.make()
                # Settings are text, which readers want in main memory.
                is_text = entry.name.endswith(SETTINGS)
                result[entry.name] = value if is_text else value.to(result_device)
        else:
            result[name] = tensor
    return result


def _is_block_matrix(name: str, tensor) -> bool:
    matrix = name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2
    return matrix and not is_norm_or_table(name)


def _transformer_entries(
    tensors: Mapping[str, Tensor], prefix: str, quantise: str | None
) -> Iterator[Entry]:
    for name, tensor in tensors.items():
        official = prefix + module_to_official(name)
        if quantise and _is_block_matrix(name, tensor):
            if is_quantised(tensor) and not isinstance(tensor, GGUFTensor):
                raise CheckpointError(
                    f"{name} is stored as {tensor.dtype} already; quantise from the bf16 file."
                )
            yield from _quantised_entries(official, tensor, quantise)
        else:
            yield _entry(official, tensor)


def _entry(name: str, tensor, shape: tuple[int, ...] | None = None) -> Entry:
    shape = tuple(tensor.shape) if shape is None else shape
    if isinstance(tensor, GGUFTensor):
        dtype = torch.bfloat16
        return Entry(name, dtype, shape, lambda: tensor.dequantise(dtype).reshape(shape))
    return Entry(name, tensor.dtype, shape, lambda: tensor.reshape(shape))


def _quantised_entries(name: str, tensor, quantise: str) -> Iterator[Entry]:
    """A matrix in 8 bits, its scale and its settings, made when the first of them is written."""
    made: dict[str, Tensor] = {}
    rows, columns = tensor.shape
    layer = name.removesuffix(".weight")
    settings: dict[str, object] = {"format": STORED_FORMATS[quantise]}
    dtype = torch.int8
    scale_shape: tuple[int, ...] = (rows, 1)
    if quantise == "fp8":
        dtype, scale_shape = torch.float8_e4m3fn, ()
    group = next((size for size in (256, 64, 16, 4) if columns % size == 0), None)
    if quantise == "int8_convrot" and group:
        settings |= {"convrot": True, "convrot_groupsize": group}

    def make() -> Tensor:
        values = tensor.dequantise() if isinstance(tensor, GGUFTensor) else tensor.float()
        if group and "convrot" in settings:
            values = hadamard_rotate(values, group)
        stored, made["scale"] = eight_bits(values, quantise == "fp8")
        return stored

    text = json.dumps(settings).encode()
    yield Entry(name, dtype, (rows, columns), make)
    yield Entry(f"{layer}.weight_scale", torch.float32, scale_shape, lambda: made.pop("scale"))
    yield _entry(f"{layer}{SETTINGS}", torch.tensor(list(text), dtype=torch.uint8))


def _plain_entries(
    checkpoint: Checkpoint, part: str, rename: Callable[[str], str | None], prefix: str
) -> Iterator[Entry]:
    inside = _part_prefix(checkpoint, part)
    for name, tensor in checkpoint.tensors.items():
        renamed = rename(name.removeprefix(inside)) if name.startswith(inside) else None
        if renamed is not None:
            yield _entry(prefix + renamed, tensor)


def _part_prefix(checkpoint: Checkpoint, part: str) -> str:
    """The prefix of a part in an all-in-one file; empty where it is alone."""
    prefix = PREFIXES[part]
    return prefix if any(name.startswith(prefix) for name in checkpoint.tensors) else ""


def _encoder_name(name: str) -> str | None:
    """A text encoder's tensor as Hugging Face and ComfyUI name it in one file."""
    for tower in ("visual.", "layers.", "embed_tokens.", "norm."):
        before, found, rest = f".{name}".partition(f".{tower}")
        if found and not rest.startswith("."):
            return f"model.{tower}{rest}"
    return name if name.startswith("lm_head.") else None


def _folder_encoder_name(name: str) -> str | None:
    """The same as diffusers folders hold it: without a head, the language tower by its name."""
    name = _encoder_name(name) or ""
    if not name.startswith("model."):
        return None
    rest = name.removeprefix("model.")
    return rest if rest.startswith("visual.") else f"language_model.{rest}"


def _vae_names(checkpoint: Checkpoint, diffusers: bool) -> Callable[[str], str | None]:
    """Renames a VAE's tensors, with their time axes, into either layout; others are left out."""
    pairs = vae_key_map(read_vae(checkpoint).config)
    renamed = dict(pairs) if diffusers else {theirs: ours for ours, theirs in pairs.items()}
    unchanged = {name: name for name in renamed.values()}

    def rename(name: str) -> str | None:
        return unchanged.get(name) or renamed.get(name)

    return rename


def _write_new_folder(
    checkpoints: Mapping[str, Checkpoint], target: Path, progress: Progress | None
) -> list[Path]:
    """`_write_folder`; a folder that was not there is removed again where it fails."""
    is_new = not target.exists()
    try:
        return _write_folder(checkpoints, target, progress)
    except BaseException:
        if is_new:
            shutil.rmtree(target, ignore_errors=True)
        raise


def _write_folder(
    checkpoints: Mapping[str, Checkpoint], target: Path, progress: Progress | None
) -> list[Path]:
    """Write a diffusers folder with these parts."""
    files: list[Path] = []
    index: dict[str, object] = {"_class_name": "Krea2Pipeline"}
    for part, checkpoint in checkpoints.items():
        folder = target / part
        if part == "transformer":
            state = read_transformer(checkpoint)
            entries = list(_diffusers_entries(state.tensors, checkpoint))
            config = {"_class_name": "Krea2Transformer2DModel", **transformer_config(state.config)}
            index |= {
                "is_distilled": state.variant == "turbo",
                "transformer": ["diffusers", "Krea2Transformer2DModel"],
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            }
            write_json(target / "scheduler" / "scheduler_config.json", SCHEDULER)
        elif part == "text_encoder":
            entries = list(_plain_entries(checkpoint, part, _folder_encoder_name, ""))
            config = checkpoint.config or encoder_config(checkpoint, entries)
            index |= {
                "text_encoder_select_layers": list(read_text_encoder(checkpoint).config.tap_layers),
                "text_encoder": ["transformers", "Qwen3VLModel"],
                "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            }
            copy_tokenizer(checkpoint.path, target / "tokenizer")
        else:
            entries = list(_plain_entries(checkpoint, part, _vae_names(checkpoint, True), ""))
            config = vae_config(read_vae(checkpoint).config)
            index["vae"] = ["diffusers", "AutoencoderKLQwenImage"]
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        files.append(folder / f"{name}.safetensors")
        write_safetensors(files[-1], entries, {"format": "pt"}, progress)
        write_json(folder / "config.json", config)
    write_json(target / "model_index.json", index)
    return files


def _diffusers_entries(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> Iterator[Entry]:
    for name, tensor in tensors.items():
        if is_quantised(tensor) and not isinstance(tensor, GGUFTensor):
            raise CheckpointError(
                f"{checkpoint.path.name} is quantised ({name} is {tensor.dtype}), which diffusers "
                "does not read. Convert the bf16 file."
            )
        official = module_to_official(name)
        shape = (6, tensor.numel() // 6) if official.endswith(".mod.lin") else None
        yield _entry(official_to_diffusers(official), tensor, shape)
