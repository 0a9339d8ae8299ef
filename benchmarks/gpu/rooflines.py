"""How long work takes at the least: its operations and bytes, counted, over rates measured here.

`Ceilings` holds what section "machine" measured: the copy bandwidth, and by number of tokens the
matrix products of one block and the attention of one block, by the fastest backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from krea2_model.vae.model import QwenImageVAE

# Passes over the hidden state a block cannot do without: read and written by both norms, and
# read, added to and written by both residuals; the rest could be fused into the products.
PASSES_A_BLOCK = 10
FORM_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "Q8_0": 34 / 32, "Q4_K": 144 / 256}


@dataclass
class Ceilings:
    bytes_a_ms: float = 0.0
    pinned_bytes_a_ms: float = 0.0
    flops_a_ms: float = 0.0
    # By (form, tokens): milliseconds of one block.
    products: dict[tuple[str, int], float] = field(default_factory=dict)
    attention: dict[int, float] = field(default_factory=dict)


def tokens_of(pixels: int, text: int) -> int:
    return (pixels // 16) ** 2 + text


def block_products(config) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of a block's matrices."""
    dim, inner = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.attention_head_dim
    return [(dim, dim, 3), (dim, key_value, 2), (dim, inner, 2), (inner, dim, 1)]


def product_flops(config, tokens: int) -> float:
    """Of all blocks' matrices."""
    values = sum(i * o * count for i, o, count in block_products(config))
    return 2.0 * tokens * values * config.num_layers


def attention_flops(config, tokens: int) -> float:
    return 4.0 * tokens**2 * config.hidden_size * config.num_layers


def block_bytes(config, form: str = "bf16") -> float:
    """Of the blocks' matrices as they are stored."""
    values = sum(i * o * count for i, o, count in block_products(config))
    return values * FORM_BYTES[form] * config.num_layers


def elementwise_bytes(config, tokens: int) -> float:
    return 2.0 * PASSES_A_BLOCK * tokens * config.hidden_size * config.num_layers


def step_floor_ms(ceilings: Ceilings, config, pixels: int, text: int, form: str) -> float | None:
    """A step of one image at the least: products, attention and element-wise work alone.

    Forms without a product of their own (int8, GGUF) are held against bf16's. None where the
    machine section has not measured this size.
    """
    tokens = tokens_of(pixels, text)
    products = ceilings.products.get((form, tokens)) or ceilings.products.get(("bf16", tokens))
    attention = ceilings.attention.get(tokens)
    if not (products and attention and ceilings.bytes_a_ms):
        return None
    moved = elementwise_bytes(config, tokens) / ceilings.bytes_a_ms
    return config.num_layers * (products + attention) + moved


def encoder_floor_ms(ceilings: Ceilings, config, tokens: int, itemsize: float) -> float | None:
    """An encoding of few tokens at the least: each weight of the tapped layers read once."""
    if not ceilings.bytes_a_ms:
        return None
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    values = config.hidden_size * config.head_dim * (heads + config.num_attention_heads)
    values += 3 * config.hidden_size * config.intermediate_size
    return values * config.num_tapped_layers * itemsize / ceilings.bytes_a_ms


def vae_floor_ms(ceilings: Ceilings, config, pixels: int, what: str) -> float | None:
    """Decoding or encoding an image at the least: its operations, at the rate of the products."""
    if not ceilings.flops_a_ms:
        return None
    module, side = QwenImageVAE(config, device="meta"), pixels // config.downscale
    shapes = {"decode": (1, config.z_dim, side, side), "encode": (1, 3, pixels, pixels)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        getattr(module, f"{what}_unnormalised")(torch.empty(shapes[what], device="meta"))
    return counter.get_total_flops() / ceilings.flops_a_ms


def ceilings_from(rows: list[dict]) -> Ceilings:
    """Of the rows that section "machine" wrote."""
    ceilings = Ceilings()
    for row in rows:
        if row.get("what") == "copy":
            ceilings.bytes_a_ms = row["tb_s"] * 1e9
        elif row.get("what") == "copy from pinned memory":
            ceilings.pinned_bytes_a_ms = row["tb_s"] * 1e9
        elif row.get("what") == "products" and "ms" in row:
            ceilings.products[row["form"], row["tokens"]] = row["ms"]
            if row["form"] == "bf16":
                ceilings.flops_a_ms = max(ceilings.flops_a_ms, row.get("tflops", 0.0) * 1e9)
        elif row.get("what") == "attention" and row.get("ms"):
            known = ceilings.attention.get(row["tokens"], float("inf"))
            ceilings.attention[row["tokens"]] = min(known, row["ms"])
    return ceilings
