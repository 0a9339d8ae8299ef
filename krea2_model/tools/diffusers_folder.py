"""Configuration files of a diffusers folder, written from the sizes of the parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.storage import Entry
from ..checkpoints.text_encoder import read_text_encoder
from ..config import TransformerConfig, VAEConfig
from ..text.tokenizer import find_tokenizer_folder
from ..text.vision import infer_vision_config, vision_keys


def transformer_config(config: TransformerConfig) -> dict[str, object]:
    fields = asdict(config)
    for ours_alone in ("out_channels", "patch_size"):
        del fields[ours_alone]
    return fields


SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 6400,
}


def vae_config(config: VAEConfig) -> dict[str, object]:
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": config.base_dim,
        "z_dim": config.z_dim,
        "dim_mult": config.dim_mult,
        "num_res_blocks": config.num_res_blocks,
        "latents_mean": config.latents_mean,
        "latents_std": config.latents_std,
    }


def encoder_config(checkpoint: Checkpoint, entries: Iterable[Entry]) -> dict[str, object]:
    """A configuration for transformers' Qwen3VLModel, from shapes and the released values."""
    state = read_text_encoder(checkpoint)
    shapes = {entry.name: entry.shape for entry in entries}
    layers = {
        int(name.split(".")[2]) for name in shapes if name.startswith("language_model.layers.")
    }
    size = state.config
    side = size.head_dim * 5 // 32
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "head_dim": size.head_dim,
        "rms_norm_eps": size.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": size.rope_theta,
            # Pairs of time, row and column: 24, 20 and 20 at head 128.
            "mrope_section": [size.head_dim // 2 - 2 * side, side, side],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
    }
    return {
        "architectures": ["Qwen3VLModel"],
        "model_type": "qwen3_vl",
        "text_config": text,
        **_vision_config(shapes),
    }


def _vision_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    keys = vision_keys(shapes)
    if not keys:
        return {}
    sizes = asdict(infer_vision_config({keys[name]: shapes[name] for name in keys}))
    return {"vision_config": {"model_type": "qwen3_vl", **sizes}}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the source's own tokenizer or ComfyUI's; nothing if there is neither."""
    folder = source if source.is_dir() else source.parent
    tokenizer = folder.parent / "tokenizer"
    try:
        if not (tokenizer / "tokenizer_config.json").is_file():
            tokenizer = find_tokenizer_folder()
    except FileNotFoundError:
        return
    shutil.copytree(tokenizer, target, dirs_exist_ok=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
