"""What large images take at the released sizes, whole and in tiles of 1024 px, by counting.

    PYTHONPATH=ComfyUI python -P benchmarks/large.py     # prints JSON

Operations of a step and bytes beside the weights, of the transformer with 512 text tokens and of
the VAE's decoder, in bfloat16; also the operations of a step with sparse attention. The formulas
are those of `krea2_model.memory`, which tests/unit/test_forecast.py, test_sparse_attention.py,
test_memory_plan.py and test_vae.py hold against counted runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]

from krea2_model import (  # noqa: E402
    Krea2Transformer,
    SparseAttention,
    TileSettings,
    TransformerConfig,
    VAEConfig,
)
from krea2_model.features.tiles import tiles_at  # noqa: E402
from krea2_model.memory import activations  # noqa: E402
from krea2_model.memory.forecast import call_operations, pair_operations  # noqa: E402
from krea2_model.vae.model import tiled_bytes  # noqa: E402

SIZES = (1024, 2048, 4096, 8192)
TEXT = activations.TEXT_TOKENS


def counted(side: int) -> dict[str, dict[str, float]]:
    transformer = Krea2Transformer(TransformerConfig(), device="meta", dtype=torch.bfloat16)
    tokens, tiles, config = (side // 16) ** 2, TileSettings(), VAEConfig()
    cells, of_a_tile = (side // 8, side // 8), (tiles.size // 16) ** 2
    number = len(tiles_at((side // 16, side // 16), tiles, 1.0))
    states = activations._VAE_STATES

    def step(tokens: int) -> int:
        return activations._transformer_bytes(transformer, 1, tokens + TEXT, TEXT)

    return {
        "whole": {
            "calls": 1,
            "operations": call_operations(transformer.config, tokens, TEXT),
            "transformer": step(tokens),
            "vae": 2 * states * config.base_dim * side**2,
        },
        "sparse": {"operations": sparse_operations(transformer.config, side)},
        "tiles": {
            "calls": number,
            "operations": number * call_operations(transformer.config, of_a_tile, TEXT),
            "transformer": step(of_a_tile),
            "vae": tiled_bytes(config, cells, tiles.size, 2, states),
        },
    }


def sparse_operations(config: TransformerConfig, side: int) -> int:
    """Of a step above the sigma of sparse attention, with its defaults."""
    tokens = (side // 16) ** 2
    saved = tokens**2 - SparseAttention().pairs((side // 16, side // 16))
    return call_operations(config, tokens, TEXT) - pair_operations(config, saved)


if __name__ == "__main__":
    print(json.dumps({side: counted(side) for side in SIZES}))
