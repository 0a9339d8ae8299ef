"""Load the parts of a Qwen3-VL file: text encoder, vision tower, and the tail that writes text.

The encoder gets functions that load the other two when they are first used.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import nano
from ..config import VisionConfig
from ..text.encoder import (
    Qwen3VLTextEncoder,
    infer_text_encoder_config,
    language_prefix,
    text_encoder_keys,
)
from ..text.language_model import LanguageTail
from ..text.tokenizer import (
    Krea2Tokenizer,
    TokenizerNotFoundError,
    find_tokenizer_folder,
)
from ..text.vision import PATCHES, Qwen3VLVisionTower, infer_vision_config, vision_keys
from .checkpoint import Checkpoint, open_checkpoint, raise_wrong_kind
from .gguf import GGUFTensor
from .identify import TEXT_ENCODER, CheckpointError
from .loading import PartState, explain_bad_shapes, load_part, stored_dtype
from .settings import text_encoder_settings


def load_text_encoder(
    path: str | Path | Checkpoint,
    *,
    device="cpu",
    dtype: torch.dtype | str | None = None,
    layers=None,
    tokenizer: str | Path | None = None,
    keep_quantised: bool = False,
) -> Qwen3VLTextEncoder:
    """Load the language tower of Qwen3-VL from a file or a Hugging Face or diffusers folder.

    tokenizer: a folder with a Qwen tokenizer; None takes the one beside the weights, else the one
        every ComfyUI carries. Where none is found, encoding says what to do.
    dtype, keep_quantised: as `load_part` takes them; without a dtype the embedding's.
    Raises CheckpointError as `load_transformer` does.
    """
    state = read_text_encoder(open_checkpoint(path, "text_encoder"))
    build = partial(
        state.build,
        tokenizer=_tokenizer_for(state.path, tokenizer),
        path=state.path,
        load_tower=partial(load_vision_tower, state.path),
        load_tail=partial(load_language_tail, state.path),
    )
    return load_part(replace(state, build=build), device, dtype, layers, keep_quantised)


def find_tokenizer(path: Path, explicit: str | Path | None = None) -> Path:
    """The folder of the named tokenizer, of the one beside a text encoder, or of ComfyUI's.

    krea2-nano's where there is none of these and the encoder is its own. Raises
    TokenizerNotFoundError where there is none.
    """
    folder = path if path.is_dir() else path.parent
    if explicit is None:
        for candidate in (folder, folder.parent / "tokenizer", folder / "tokenizer"):
            if (candidate / "tokenizer_config.json").is_file():
                return candidate
    try:
        return find_tokenizer_folder(explicit)
    except TokenizerNotFoundError:
        if explicit is None and path.name == nano.TEXT_ENCODER_NAME:
            return nano.TOKENIZER
        raise


def _tokenizer_for(path: Path, explicit: str | Path | None) -> Krea2Tokenizer | None:
    """The tokenizer that `find_tokenizer` finds; None where none is found and none is named."""
    try:
        return Krea2Tokenizer(find_tokenizer(path, explicit))
    except TokenizerNotFoundError:
        if explicit is not None:
            raise
        return None


def read_text_encoder(checkpoint: Checkpoint) -> PartState:
    """Translate a text encoder's tensors to module names and read off its sizes."""
    settings = text_encoder_settings(
        checkpoint.config, checkpoint.model_index, (checkpoint.config_name, "model_index.json")
    )
    count = max(settings["tap_layers"])
    with explain_bad_shapes(checkpoint.path, TEXT_ENCODER):
        # The first layer tells the sizes, also where only the embedding is tapped.
        names = text_encoder_keys(checkpoint.tensors, num_layers=max(count, 1))
        if not names:
            raise_wrong_kind(checkpoint, TEXT_ENCODER)
        shapes = {module: tuple(checkpoint.tensors[name].shape) for name, module in names.items()}
        config = infer_text_encoder_config(shapes, **settings)
    tensors = {
        module: checkpoint.tensors[name]
        for name, module in names.items()
        if count or not module.startswith("layers.")
    }
    dtype = stored_dtype(tensors["embed_tokens.weight"])
    build = partial(Qwen3VLTextEncoder, config)
    return PartState(checkpoint.path, TEXT_ENCODER, config, tensors, build, dtype)


def read_vision_tower(checkpoint: Checkpoint) -> PartState:
    """Translate a vision tower's tensors to module names and read off its sizes.

    Raises CheckpointError where the file has no tower, or has it in blocks.
    """
    keys = vision_keys(checkpoint.tensors)
    if not keys:
        raise CheckpointError(
            f"{checkpoint.path.name} has no vision tower (no {PATCHES} under visual.), so it "
            "cannot see images, only text. Some programs leave it out, and GGUF files keep it "
            "apart: choose a whole file, for example qwen3vl_4b_bf16.safetensors, or take the "
            "images out of the prompt."
        )
    tensors = {ours: checkpoint.tensors[name] for name, ours in keys.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        config = infer_vision_config(shapes)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{checkpoint.path.name} has a vision tower whose sizes cannot be read ({error!r}). "
            "Download the file again, for example qwen3vl_4b_bf16.safetensors."
        ) from error
    patches = tensors[PATCHES]
    if isinstance(patches, GGUFTensor):
        patches = patches.dequantise()
    tensors[PATCHES] = patches.flatten(1)
    config = _apply_vision_settings(config, checkpoint)
    dtype = stored_dtype(tensors.get("merger.norm.weight"))
    build = partial(Qwen3VLVisionTower, config)
    return PartState(checkpoint.path, TEXT_ENCODER, config, tensors, build, dtype)


def _apply_vision_settings(config: VisionConfig, checkpoint: Checkpoint) -> VisionConfig:
    """Apply what tensors cannot tell and a Hugging Face folder's configuration does."""
    settings = checkpoint.config.get("vision_config")
    settings = settings if isinstance(settings, dict) else {}
    heads = settings.get("num_heads", config.num_heads)
    indexes = settings.get("deepstack_visual_indexes", config.deepstack_visual_indexes)
    if (
        not isinstance(heads, int)
        or heads < 1
        or config.hidden_size % (4 * heads)
        or not isinstance(indexes, (list, tuple))
        or len(indexes) != len(config.deepstack_visual_indexes)
        or not all(isinstance(index, int) and 0 <= index < config.depth for index in indexes)
    ):
        raise CheckpointError(
            f"{checkpoint.path.name} has num_heads {heads!r} and deepstack_visual_indexes "
            f"{indexes!r} in vision_config, which do not fit a tower of {config.depth} blocks of "
            f"width {config.hidden_size}. Take config.json and weights from one folder."
        )
    return replace(config, num_heads=heads, deepstack_visual_indexes=tuple(indexes))


def load_vision_tower(
    path: str | Path, *, device="cpu", dtype: torch.dtype | str | None = None
) -> Qwen3VLVisionTower:
    """Load the vision tower of a text encoder's file or folder.

    Raises CheckpointError, a ValueError, as `read_vision_tower` does.
    """
    return load_part(read_vision_tower(open_checkpoint(path, "text_encoder")), device, dtype)


def read_language_tail(checkpoint: Checkpoint) -> PartState:
    """Translate the tensors after the encoder's layers to module names.

    Raises CheckpointError where the file is no language model or ends with the encoder.
    """
    config = read_text_encoder(checkpoint).config
    first = config.num_tapped_layers
    prefix = language_prefix(checkpoint.tensors)
    assert prefix is not None, "read_text_encoder refuses these"
    tensors, indices = {}, set()
    for name, tensor in checkpoint.tensors.items():
        ours = name.removeprefix(prefix) if name.startswith(prefix) else ""
        layer = re.match(r"layers\.(\d+)\.", ours)
        if layer and int(layer[1]) >= first:
            indices.add(int(layer[1]))
            tensors[ours] = tensor
        elif ours.startswith("norm."):
            tensors[ours] = tensor
        elif _is_head(name, prefix) and not _is_tied(tensor, checkpoint, prefix):
            tensors["lm_head." + name.rpartition(".")[2]] = tensor
    last = max(indices, default=first - 1) + 1
    missing = [
        f"layer {index}" for index in range(first, max(last, first + 1)) if index not in indices
    ]
    if "norm.weight" not in tensors:
        missing.append("the final norm")
    if missing:
        raise CheckpointError(
            f"{checkpoint.path.name} cannot write text: it lacks {' and '.join(missing)}, which "
            "images do not need and some programs leave out. Choose a whole file, for example "
            "qwen3vl_4b_bf16.safetensors."
        )
    dtype = stored_dtype(tensors["norm.weight"])
    build = partial(LanguageTail, config, range(first, last), "lm_head.weight" in tensors)
    return PartState(checkpoint.path, TEXT_ENCODER, config, tensors, build, dtype)


def _is_head(name: str, prefix: str) -> bool:
    """True for the head of the model under a prefix: `lm_head.weight`, `model.norm.weight`."""
    before, head, _ = name.partition("lm_head.")
    return bool(head) and prefix.startswith(before)


def _is_tied(tensor, checkpoint: Checkpoint, prefix: str) -> bool:
    """True if a head is a copy of the embedding, which need not be held twice."""
    embedding = checkpoint.tensors[f"{prefix}embed_tokens.weight"]
    if isinstance(tensor, GGUFTensor) and isinstance(embedding, GGUFTensor):
        return tensor.format == embedding.format and torch.equal(tensor.data, embedding.data)
    if not isinstance(tensor, Tensor) or not isinstance(embedding, Tensor):
        return False
    return tensor.dtype == embedding.dtype and torch.equal(tensor, embedding)


def load_language_tail(
    path: str | Path, *, device="cpu", dtype: torch.dtype | str | None = None
) -> LanguageTail:
    """Load the layers, norm and head that `load_text_encoder` leaves out.

    Raises CheckpointError as `read_language_tail` does.
    """
    return load_part(read_language_tail(open_checkpoint(path, "text_encoder")), device, dtype)
