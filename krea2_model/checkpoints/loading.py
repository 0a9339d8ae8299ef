"""Load and save the three parts of Krea 2.

A path is a safetensors file (a part alone, with or without a prefix, or all-in-one) or a diffusers
folder (the pipeline's or one part's, sharded or not); a `Checkpoint` of tensors in memory stands
for one too. Tensors are mapped from the file and become
the module's weights without a copy; modules are built on the meta device and loaded strictly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .. import nano
from ..config import PRESETS, Preset, TextEncoderConfig, TransformerConfig, VAEConfig
from ..nn.layers import TorchLayers
from ..text.encoder import infer_text_encoder_config, llama_cpp_to_hugging_face, text_encoder_keys
from ..transformer.model import Krea2Transformer
from ..vae.model import QwenImageVAE
from .gguf import GGUFTensor, is_gguf, read_gguf
from .gguf_header import read_gguf_header
from .identify import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    WHERE,
    CheckpointError,
    CheckpointNotFoundError,
    identify,
    read_header,
)
from .quantised import normalise_metadata, refuse_integers
from .quantised_layers import stored_entries, stored_names
from .readable import PLAIN, most_common_dtype, readable
from .settings import distilled, text_encoder_settings, transformer_settings, vae_settings
from .storage import read_json, read_safetensors, weight_files, without_compile, write_safetensors
from .transformer_keys import (
    DIFFUSERS_MARKER,
    OFFICIAL_MARKER,
    diffusers_to_official,
    infer_transformer_config,
    is_norm_or_table,
    module_to_official,
    official_to_module,
)
from .vae_keys import infer_vae_config, slice_temporal, vae_key_map

# Metadata keys of a safetensors file that says more about itself than its tensors do.
VARIANT_KEY, STEPS_KEY, GUIDANCE_KEY, MU_KEY, SIZE_KEY = (
    "krea2.variant", "krea2.steps", "krea2.guidance", "krea2.mu", "krea2.size",
)  # fmt: skip

# Left over from training in some files, and used by no one.
TRAINING_LEFTOVERS = frozenset(("last.down.weight", "last.up.weight"))

_VAE_MARKERS = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")

ReadFile = Callable[[Path], tuple[Mapping[str, Tensor], Mapping[str, str] | None]]
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Checkpoint:
    """Tensors by the names their file uses, and what else the file or its folder says."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model_index: dict[str, Any] = field(default_factory=dict)

    @property
    def config_name(self) -> str:
        """What messages call the configuration, `vae/config.json` for example."""
        return f"{self.path.name}/config.json" if self.path.is_dir() else "config.json"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


class TransformerState(NamedTuple):
    """A transformer's weights by module name, with its sizes and sampling defaults."""

    config: TransformerConfig
    tensors: dict[str, Any]
    variant: str | None
    preset: Preset | None

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of most weights; some files keep a few matrices in another."""
        return most_common_dtype(self.tensors)


class TextEncoderState(NamedTuple):
    """A text encoder's weights by module name, without what text conditioning does not need."""

    config: TextEncoderConfig
    tensors: dict[str, Tensor]


class VAEState(NamedTuple):
    """A VAE's weights by module name, kernels sliced to two dimensions."""

    config: VAEConfig
    tensors: dict[str, Tensor]


def load_transformer(
    path: str | Path | Checkpoint,
    *,
    device="cpu",
    dtype: torch.dtype | None = None,
    layers=None,
    keep_quantised: bool = False,
) -> Krea2Transformer:
    """Load a Krea 2 transformer from a file or a diffusers folder.

    dtype: of matrices and biases, None keeps the file's. Norm scales and modulation tables keep
        the precision they are stored in.
    keep_quantised: let linear layers hold what a quantised file holds, see `quantised_layers`;
        else all weights are plain. Without a meaning where layers are given.
    The result has `variant` ("raw", "turbo" or None) and `preset` (its sampling defaults or None).
    Raises CheckpointError, a ValueError, that says what the file is and what was expected.
    """
    checkpoint = open_checkpoint(path, "transformer")
    state = read_transformer(checkpoint)
    transformer = Krea2Transformer(state.config, layers or TorchLayers, device="meta")
    transformer.variant, transformer.preset = state.variant, state.preset
    usual = most_common_dtype(state.tensors, PLAIN)
    dtypes = (dtype or PLAIN, dtype or usual)
    keep = keep_quantised and layers is None
    tensors = readable(transformer, state.tensors, checkpoint.path, dtypes, keep)
    return assign(transformer, tensors, checkpoint.path, TRANSFORMER, device)


def load_vae(
    path: str | Path | Checkpoint, *, device="cpu", dtype: torch.dtype | None = None, layers=None
) -> QwenImageVAE:
    """Load the Qwen-Image VAE from a file (original or diffusers names) or a diffusers folder.

    Raises CheckpointError as `load_transformer` does.
    """
    checkpoint = open_checkpoint(path, "vae")
    state = read_vae(checkpoint)
    dtype = dtype or state.tensors["conv2.weight"].dtype
    tensors = {name: tensor.to(dtype) for name, tensor in state.tensors.items()}
    vae = QwenImageVAE(state.config, layers or TorchLayers, device="meta")
    return assign(vae, tensors, checkpoint.path, VAE, device)


def save_transformer(transformer: Krea2Transformer, path: str | Path) -> None:
    """Save a transformer as one safetensors file in official names, with its sampling defaults.

    Quantised layers keep the format of safetensors files; blocks of a GGUF file, and layers with
    LoRAs, become plain. An existing file is replaced only once the new one is whole.
    """
    metadata = {"format": "pt", **preset_metadata(transformer.variant, transformer.preset)}
    entries = [
        replace(entry, name=module_to_official(entry.name)) for entry in stored_entries(transformer)
    ]
    write_safetensors(Path(path), entries, metadata)


def preset_metadata(variant: str | None, preset: Preset | None) -> dict[str, str]:
    """What a file has to carry for its variant and sampling defaults to be known again."""
    metadata = {VARIANT_KEY: variant} if variant else {}
    if preset and preset != PRESETS.get(variant or ""):
        metadata |= {STEPS_KEY: str(preset.steps), GUIDANCE_KEY: str(preset.guidance)}
        metadata |= {} if preset.mu is None else {MU_KEY: str(preset.mu)}
        metadata |= {SIZE_KEY: str(preset.size)}
    return metadata


def read_transformer(checkpoint: Checkpoint) -> TransformerState:
    """Translate a transformer's tensors to module names and read off its sizes and variant."""
    found = {}
    for marker, translate in (
        (OFFICIAL_MARKER, lambda name: name),
        (DIFFUSERS_MARKER, diffusers_to_official),
    ):
        prefix = prefix_of(checkpoint, (marker,))
        if prefix is not None:
            found = {translate(n): t for n, t in strip_prefix(checkpoint.tensors, prefix).items()}
            break
    else:
        _raise_wrong_kind(checkpoint, TRANSFORMER)
    for stray in TRAINING_LEFTOVERS & found.keys():
        del found[stray]
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    settings = transformer_settings(checkpoint.config, checkpoint.config_name)
    with _misshapen(checkpoint.path, TRANSFORMER):
        config = infer_transformer_config(shapes, **settings)
    tensors = {
        # diffusers stores a block's table as (6, F), the official files as (6 F).
        official_to_module(name): tensor.flatten() if name.endswith(".mod.lin") else tensor
        for name, tensor in _plain_norms_and_tables(found).items()
    }
    variant, _ = variant_of(checkpoint)
    return TransformerState(config, tensors, variant, _preset(checkpoint, variant))


def read_text_encoder(checkpoint: Checkpoint) -> TextEncoderState:
    """Translate a text encoder's tensors to module names and read off its sizes."""
    settings = text_encoder_settings(
        checkpoint.config, checkpoint.model_index, (checkpoint.config_name, "model_index.json")
    )
    count = max(settings["tap_layers"])
    with _misshapen(checkpoint.path, TEXT_ENCODER):
        # The first layer tells the sizes, also where only the embedding is tapped.
        names = text_encoder_keys(checkpoint.tensors, num_layers=max(count, 1))
        if not names:
            _raise_wrong_kind(checkpoint, TEXT_ENCODER)
        shapes = {module: tuple(checkpoint.tensors[name].shape) for name, module in names.items()}
        config = infer_text_encoder_config(shapes, **settings)
    tensors = {
        module: checkpoint.tensors[name]
        for name, module in names.items()
        if count or not module.startswith("layers.")
    }
    return TextEncoderState(config, tensors)


def read_vae(checkpoint: Checkpoint) -> VAEState:
    """Translate a VAE's tensors to module names, slice its kernels and read off its sizes."""
    prefix = prefix_of(checkpoint, _VAE_MARKERS)
    if prefix is None:
        _raise_wrong_kind(checkpoint, VAE)
    tensors = strip_prefix(checkpoint.tensors, prefix)
    with _misshapen(checkpoint.path, VAE):
        config = infer_vae_config({name: tuple(t.shape) for name, t in tensors.items()})
        settings = vae_settings(checkpoint.config, config.z_dim, checkpoint.config_name)
        config = replace(config, **settings)
        if _VAE_MARKERS[0] not in tensors:
            original = {theirs: ours for ours, theirs in vae_key_map(config).items()}
            tensors = {original.get(name, name): tensor for name, tensor in tensors.items()}
        refuse_integers(tensors, checkpoint.path.name)
        return VAEState(config, slice_temporal(tensors, config))


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors by the names that `open_checkpoint` gives them, from its header.

    Raises CheckpointError where the file is broken or of another format.
    """
    if path.is_file() and is_gguf(path):
        stored = read_gguf_header(path).tensors
        return {llama_cpp_to_hugging_face(n): entry.shape for n, entry in stored.items()}
    return {without_compile(n): shape for n, shape in read_header(path).shapes.items()}


def open_checkpoint(
    path: str | Path | Checkpoint, component: str, read_file: ReadFile | None = None
) -> Checkpoint:
    """Open a file, or the part `component` of a diffusers folder; a Checkpoint is open already.

    component: "transformer", "text_encoder" or "vae": the subfolder to take where there is one.
    read_file: reads one safetensors file to tensors and metadata; a host may bring its own.
    """
    if isinstance(path, Checkpoint):
        return path
    path = Path(path)
    read_file = read_file or read_safetensors
    if path == nano.TEXT_ENCODER:
        return Checkpoint(path, nano.text_encoder_tensors())
    if path.is_file() and is_gguf(path):
        stored, texts = read_gguf(path)
        return Checkpoint(path, {llama_cpp_to_hugging_face(n): t for n, t in stored.items()}, texts)
    if path.is_file():
        read_header(path)
        tensors, metadata = read_file(path)
        metadata = dict(metadata or {})
        return Checkpoint(path, _spelled(tensors, metadata, path.name), metadata)
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"There is no file or folder {path}. Check the name and the folder."
        )
    folder = path / component if (path / component).is_dir() else path
    checkpoint = Checkpoint(folder, {})
    for file in weight_files(folder):
        read_header(file)
        tensors, metadata = read_file(file)
        checkpoint.tensors.update(_spelled(tensors, metadata or {}, file.name))
        checkpoint.metadata.update(metadata or {})
    checkpoint.config = read_json(folder / "config.json")
    for parent in (path, path.parent):
        checkpoint.model_index = checkpoint.model_index or read_json(parent / "model_index.json")
    return checkpoint


def _spelled(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str):
    return normalise_metadata({without_compile(n): t for n, t in tensors.items()}, metadata, name)


def _plain_norms_and_tables(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """With norm scales and tables as numbers; some GGUF files quantise the last table."""
    return {
        name: tensor.dequantise()
        if isinstance(tensor, GGUFTensor) and is_norm_or_table(name)
        else tensor
        for name, tensor in tensors.items()
    }


def assign(
    module: Module, tensors: dict[str, Tensor], path: Path, what: str, device="cpu"
) -> Module:
    """Make tensors a meta module's weights, strictly and without a copy, in evaluation mode.

    Raises CheckpointError naming missing, surplus and misshapen tensors, and any vector (norm,
    table, bias) that holds NaN or infinity.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_tensors(wanted, tensors, path, what, stored_names(module))
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.requires_grad_(False).eval().to(device)


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    path: Path,
    what: str,
    quantised: Collection[str] = (),
) -> None:
    """Raise CheckpointError unless `tensors` are those wanted and their vectors are finite.

    quantised: names of those that may be integers.
    """
    missing = sorted(wanted.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - wanted.keys())
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = [
        f"{len(found)} {word} (such as {', '.join(found[:3])})"
        for word, found in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if found
    ]
    if problems:
        _refuse_parts(path, what, f"its tensors do not fit: {'; '.join(problems)}")
    refuse_integers({n: t for n, t in tensors.items() if n not in quantised}, path.name)
    for name, tensor in tensors.items():
        vector = tensor.ndim == 1 and tensor.is_floating_point() and tensor.element_size() > 1
        if vector and not torch.isfinite(tensor).all():
            _refuse_parts(path, what, f"{name} holds NaN or infinity")


def prefix_of(checkpoint: Checkpoint, markers: tuple[str, ...]) -> str | None:
    """What stands before the name of a part's marker tensor, or None where none is there."""
    for name in checkpoint.tensors:
        for marker in markers:
            if name == marker or name.endswith(f".{marker}"):
                return name[: -len(marker)]
    return None


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: tensor for n, tensor in tensors.items() if n.startswith(prefix)}


def variant_of(checkpoint: Checkpoint) -> tuple[str | None, str]:
    """Raw or Turbo, or None, and how it is known: the folder's index, metadata, or the name."""
    is_distilled = distilled(checkpoint.model_index, "model_index.json")
    if is_distilled is not None:
        return "turbo" if is_distilled else "raw", "is_distilled in model_index.json"
    if checkpoint.metadata.get(VARIANT_KEY) in PRESETS:
        return checkpoint.metadata[VARIANT_KEY], f"{VARIANT_KEY} in the file's metadata"
    # As words of their own: a "drawing" is not "raw".
    names = [checkpoint.path.name]
    if checkpoint.path.is_dir():
        # A part of a diffusers folder; it is the folder that has a name.
        names.append(checkpoint.path.parent.name)
    words = re.split(r"[^a-z]+", " ".join(names).lower())
    named = next((name for name in ("turbo", "raw") if name in words), None)
    return named, "its name" if named else "nothing says so"


def _preset(checkpoint: Checkpoint, variant: str | None) -> Preset | None:
    """Sampling defaults: the file's own where its metadata carries them, else the variant's."""
    metadata = checkpoint.metadata
    if STEPS_KEY not in metadata:
        return PRESETS.get(variant or "")
    try:
        mu = float(metadata[MU_KEY]) if MU_KEY in metadata else None
        guidance = float(metadata.get(GUIDANCE_KEY, 0))
        size, steps = int(metadata.get(SIZE_KEY, Preset.size)), int(metadata[STEPS_KEY])
        for name, value, least, most in (
            (STEPS_KEY, steps, 1, 10_000), (GUIDANCE_KEY, guidance, 0, 1_000),
            (MU_KEY, 0.0 if mu is None else mu, -100, 100), (SIZE_KEY, size, 16, 16_384),
        ):  # fmt: skip
            if not least <= value <= most:
                raise ValueError(f"{name} is {value:g}; expected {least} to {most}")
        return Preset(variant or "custom", steps, guidance, mu, size)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path.name} carries unreadable sampling defaults ({error})."
        ) from error


@contextmanager
def _misshapen(path: Path, what: str) -> Iterator[None]:
    """Turn errors of reading sizes off tensors' shapes into the refusal of a file.

    Shapes of any kind come from files, and the arithmetic on them fails in as many ways.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        _refuse_parts(path, what, str(error))
    except (IndexError, KeyError, TypeError, ZeroDivisionError, OverflowError, RuntimeError):
        _refuse_parts(path, what, "its tensors have shapes that do not belong together")


def _raise_wrong_kind(checkpoint: Checkpoint, expected: str) -> NoReturn:
    found = identify(checkpoint.tensors)
    raise CheckpointError(
        f"{checkpoint.path.name} is {found}; expected {expected}, for example {WHERE[expected]}."
    )


def _refuse_parts(path: Path, what: str, problem: str) -> NoReturn:
    raise CheckpointError(
        f"{path.name} cannot be used as {what}: {problem.rstrip('.')}. "
        f"Download it again, for example {WHERE[what]}."
    )
