"""Whole files of every kind for the fuzzer, and JSON values with places changed at random."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import tiny_checkpoints as tiny
from krea2_model.config import TransformerConfig
from krea2_model.transformer.model import Krea2Transformer

_TRANSFORMER = TransformerConfig(
    num_layers=1, attention_head_dim=32, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=64, text_num_attention_heads=2,
    text_num_key_value_heads=2, text_intermediate_size=64, axes_dims_rope=(8, 12, 12),
)  # fmt: skip
_ENCODER = replace(tiny.TEXT_ENCODER, vocab_size=64, num_hidden_layers=36)


class Sources:
    """Whole files of every kind, to be changed, in memory and in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = 0
        self.transformer = tiny.transformer_tensors(_TRANSFORMER)
        self.vae = tiny.vae_tensors(replace(tiny.VAE, base_dim=4))
        self.encoder = tiny.text_encoder_tensors(_ENCODER)
        self.quantised = quantised_tensors(self.transformer)
        self.model = Krea2Transformer(_TRANSFORMER).eval().requires_grad_(False)
        self.shapes = {n: tuple(w.shape) for n, w in self.model.named_parameters()}
        self.pipeline = folder / "pipeline"
        for part, tensors in (
            ("transformer", self.transformer), ("vae", self.vae), ("text_encoder", self.encoder),
        ):  # fmt: skip
            (self.pipeline / part).mkdir(parents=True)
            save_file(tensors, self.pipeline / part / "model.safetensors")

    def path(self, suffix: str) -> Path:
        return self.folder / f"case{suffix}"

    def safetensors(self, tensors: dict, metadata: dict | None = None) -> Path:
        path = self.path(".safetensors")
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
        return path


def quantised_tensors(tensors: dict) -> dict:
    """Two layers in fp8, one in int8 that is rotated."""
    stored = dict(tensors)
    for layer, settings in (
        ("blocks.0.attn.wq", {"format": "float8_e4m3fn"}),
        ("blocks.0.attn.wo", {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
        ("blocks.0.mlp.up",
         {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}),
    ):  # fmt: skip
        weight = tensors[f"{layer}.weight"]
        dtype = torch.int8 if "convrot" in settings else torch.float8_e4m3fn
        stored[f"{layer}.weight"] = (weight.float() * 50).to(dtype)
        stored[f"{layer}.weight_scale"] = torch.tensor(0.02)
        stored[f"{layer}.comfy_quant"] = text_tensor(json.dumps(settings))
    return stored


def text_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def strange_value(dice: random.Random) -> Any:
    """A value that nobody expects there."""
    return dice.choice((
        None, True, False, 0, 1, -1, 2, 3, 7, 16, 64, 255, 2**31, 2**62, 2**63, 2**70, 10**400,
        0.5, -0.0, 1e30, 1e-30, float("nan"), float("inf"), float("-inf"), "", "x", "0", "1e999",
        "nan", "false", "\x00", "\ud800", "é" * 50, "x" * 10_000, [], {}, [[]], [{}], {"": None},
        [0], [1, 1], [-1, 2], [2**40, 2**40], [1] * 10_000, {"format": "float8_e4m3fn"},
        _deep(dice.choice((50, 2000))), dice.randrange(-5, 300), dice.random(),
    ))  # fmt: skip


_KEYS = ("", "x", "\x00", "\ud800", "0", "layers", "format", "shape", "r", "x" * 1000, "a.b.c.d")


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def mutate(value: Any, dice: random.Random) -> Any:
    """A JSON value with a few of its places changed."""
    value = copy.deepcopy(value)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        value = _change_once(value, dice)
    return value


def _change_once(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        how = dice.randrange(8)
        if how == 0:
            del value[key]
        elif how == 1:
            value[dice.choice(_KEYS)] = value.pop(key)
        elif how == 2:
            value[str(dice.choice(list(value)))] = value[key]
        else:
            value[key] = _change_once(value[key], dice)
        return value
    if isinstance(value, list) and value and dice.random() < 0.7:
        place = dice.randrange(len(value))
        value[place] = _change_once(value[place], dice)
        return value
    return strange_value(dice)


def dumps(value: Any) -> str:
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):
        # Too deep, or too many digits, for the writer; readers see such files all the same.
        return '{"a":' + "[" * 50_000
