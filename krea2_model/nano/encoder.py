"""The text encoder of krea2-nano: 36 small Qwen3-VL layers that nobody trained.

Its weights are drawn, not learned, so instead of 65 MB in every download they are made on first
use. They have to come out the same to the last bit everywhere, since the transformer was trained on
what they give. So nothing here depends on a library's random numbers or on rounding: a counter
goes through SplitMix64 (Steele, Lea and Flood, 2014), four 16-bit pieces of the result add up to a
nearly normal integer, and scales are powers of two. Only the last step, to bfloat16, rounds.

Random layers would mix up the order of words. Three choices keep it: eight channels of every
embedding hold the same value and nothing writes to them, half of the heads look at little else
(with rotary positions this makes them prefer fixed, random distances: "two words back"), and norms
of queries and keys above 1 let heads choose rather than average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..config import TextEncoderConfig

CONFIG = TextEncoderConfig(
    hidden_size=160,
    intermediate_size=320,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=40,
)
SEED = 2026
CONSTANT_CHANNELS = 8
CONSTANT = 4.0
QK_SCALE = 2.25

# Powers of two that follow the sum of four 16-bit pieces, of deviation 37837.
_EMBEDDING, _MATRIX, _HALF_MATRIX, _WRITE = 2.0**-15, 2.0**-18, 2.0**-19, 2.0**-21


def encoder_tensors() -> dict[str, Tensor]:
    """Every tensor of the encoder, by the names of a Qwen3-VL file, in bfloat16."""
    dim, inner, head_dim = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.head_dim
    queries = CONFIG.num_attention_heads * head_dim
    keys = CONFIG.num_key_value_heads * head_dim
    tensors = {}

    embedding = normal("embed_tokens", (CONFIG.vocab_size, dim), _EMBEDDING)
    embedding[:, :CONSTANT_CHANNELS] = CONSTANT
    tensors["model.embed_tokens.weight"] = embedding
    for index in range(CONFIG.num_hidden_layers):
        name = f"model.layers.{index}"
        for which, rows in (("q", queries), ("k", keys)):
            weight = normal(f"{name}.{which}", (rows, dim), _MATRIX)
            weight[: rows // 2, :CONSTANT_CHANNELS] *= 4
            tensors[f"{name}.self_attn.{which}_proj.weight"] = weight
            tensors[f"{name}.self_attn.{which}_norm.weight"] = torch.full((head_dim,), QK_SCALE)
        value = normal(f"{name}.v", (keys, dim), _MATRIX)
        gate = normal(f"{name}.gate", (inner, dim), _HALF_MATRIX)
        up = normal(f"{name}.up", (inner, dim), _HALF_MATRIX)
        for weight in (value, gate, up):
            weight[:, :CONSTANT_CHANNELS] = 0
        out = normal(f"{name}.o", (dim, queries), _WRITE)
        down = normal(f"{name}.down", (dim, inner), _WRITE)
        for weight in (out, down):
            weight[:CONSTANT_CHANNELS] = 0
        tensors[f"{name}.self_attn.v_proj.weight"] = value
        tensors[f"{name}.self_attn.o_proj.weight"] = out
        tensors[f"{name}.mlp.gate_proj.weight"] = gate
        tensors[f"{name}.mlp.up_proj.weight"] = up
        tensors[f"{name}.mlp.down_proj.weight"] = down
        tensors[f"{name}.input_layernorm.weight"] = torch.ones(dim)
        tensors[f"{name}.post_attention_layernorm.weight"] = torch.ones(dim)
    tensors["model.norm.weight"] = torch.ones(dim)
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def normal(name: str, shape: tuple[int, int], scale: float) -> Tensor:
    """Nearly normal float32 numbers that depend on `name` alone; exact for a power of two."""
    digest = hashlib.sha256(f"{SEED} {name}".encode()).digest()
    start = np.uint64(int.from_bytes(digest[:8], "little"))
    counter = np.arange(1, shape[0] * shape[1] + 1, dtype=np.uint64)
    bits = counter * np.uint64(0x9E3779B97F4A7C15) + start
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    pieces = bits.view(np.uint16).reshape(-1, 4)
    total = pieces.sum(axis=1, dtype=np.int32) - 2 * 65535
    return torch.from_numpy(total.astype(np.float32).reshape(shape)) * scale


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
