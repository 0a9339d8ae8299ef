"""The text encoder of krea2-nano: 36 small Qwen3-VL layers with random weights.

Its weights are drawn, not learned, so instead of 65 MB in every download they are made on first
use. They have to come out the same to the last bit everywhere, since the transformer was trained on
what they give. So nothing here depends on a library's random numbers or on rounding: a counter
goes through SplitMix64 (Steele, Lea and Flood, 2014), four 16-bit pieces of the result add up to a
nearly normal integer, and scales are powers of two. Only the last step, to bfloat16, rounds.

Random layers would mix up the order of words. Three choices keep it: eight channels of every
embedding hold the same value and nothing writes to them, half of the heads look at little else
(with rotary positions this makes them prefer fixed, random distances: "two words back"), and norms
of queries and keys above 1 let heads choose rather than average.

The vision tower is drawn in the same way. What it has to keep is what each patch shows, so its
blocks write little, and a random projection carries colours and textures as they are. Its norms
would take the brightness of a flat patch away: eight channels at a constant and eight at minus that
hold them back. What it gives has the eight constant channels of an embedding, and its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..config import TextEncoderConfig, VisionConfig

CONFIG = TextEncoderConfig(
    hidden_size=160,
    intermediate_size=320,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=40,
)
VISION_CONFIG = VisionConfig(
    depth=4,
    hidden_size=64,
    intermediate_size=128,
    num_heads=1,
    out_hidden_size=CONFIG.hidden_size,
    num_position_embeddings=64,
    deepstack_visual_indexes=(0, 1, 2),
)
SEED = 2026
CONSTANT_CHANNELS = 8
CONSTANT = 4.0
QK_SCALE = 2.25

# Powers of two that follow the sum of four 16-bit pieces, of deviation 37837.
_EMBEDDING, _MATRIX, _HALF_MATRIX, _WRITE = 2.0**-15, 2.0**-18, 2.0**-19, 2.0**-21
_BIAS, _PATCH = 2.0**-16, 2.0**-20


def encoder_tensors() -> dict[str, Tensor]:
    """Every tensor of the encoder, by the names of a Qwen3-VL file, in bfloat16."""
    return {
        name: tensor.to(torch.bfloat16)
        for name, tensor in {**_language_tensors(), **_vision_tensors()}.items()
    }


def _language_tensors() -> dict[str, Tensor]:
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
    return tensors


def _vision_tensors() -> dict[str, Tensor]:
    config, held = VISION_CONFIG, 2 * CONSTANT_CHANNELS
    dim, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    tensors = {}

    def draw(name: str, rows: int, columns: int, scale: float) -> Tensor:
        weight = normal(f"visual.{name}", (rows, columns), scale)
        tensors[f"visual.{name}.weight"] = weight
        tensors[f"visual.{name}.bias"] = torch.zeros(rows)
        return weight

    def norm(name: str, width: int) -> None:
        tensors[f"visual.{name}.weight"] = torch.ones(width)
        tensors[f"visual.{name}.bias"] = torch.zeros(width)

    shape = (config.in_channels, config.temporal_patch_size, patch, patch)
    weight = draw("patch_embed.proj", dim, int(np.prod(shape)), _PATCH)
    weight[:held] = 0
    tensors["visual.patch_embed.proj.weight"] = weight.reshape(dim, *shape)
    bias = tensors["visual.patch_embed.proj.bias"]
    bias[:CONSTANT_CHANNELS], bias[CONSTANT_CHANNELS:held] = CONSTANT, -CONSTANT
    positions = normal("visual.pos_embed", (config.num_position_embeddings, dim), _MATRIX)
    positions[:, :held] = 0
    tensors["visual.pos_embed.weight"] = positions
    for index in range(config.depth):
        name = f"blocks.{index}"
        norm(f"{name}.norm1", dim)
        norm(f"{name}.norm2", dim)
        draw(f"{name}.attn.qkv", 3 * dim, dim, _MATRIX)[2 * dim :, :held] = 0
        draw(f"{name}.attn.proj", dim, dim, _WRITE)[:held] = 0
        draw(f"{name}.mlp.linear_fc1", inner, dim, _MATRIX)[:, :held] = 0
        draw(f"{name}.mlp.linear_fc2", dim, inner, _WRITE)[:held] = 0
    width = dim * config.spatial_merge_size**2
    count = len(config.deepstack_visual_indexes)
    for index, name in enumerate(["merger", *(f"deepstack_merger_list.{i}" for i in range(count))]):
        norm(f"{name}.norm", width if index else dim)
        first = draw(f"{name}.linear_fc1", width, width, _MATRIX)
        first.reshape(width, -1, dim)[:, :, :held] = 0
        tensors[f"visual.{name}.linear_fc1.bias"] = normal(
            f"visual.{name}.linear_fc1.bias", (1, width), _BIAS
        )[0]
        scale = _HALF_MATRIX if index else _MATRIX
        draw(f"{name}.linear_fc2", config.out_hidden_size, width, scale)[:CONSTANT_CHANNELS] = 0
    tensors["visual.merger.linear_fc2.bias"][:CONSTANT_CHANNELS] = CONSTANT
    return tensors


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
