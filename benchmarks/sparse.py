"""Time of sparse attention beside exact, of attention alone.

    PYTHONPATH=ComfyUI python -P benchmarks/sparse.py     # prints JSON

Time is the processor's for two heads of the released model, on one core, in turns. large.py counts
the operations of whole steps, and nano_large.py shows what it does to pictures of krea2-nano.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]

from krea2_model import SparseAttention  # noqa: E402
from krea2_model.nn.attention import attend  # noqa: E402
from krea2_model.nn.partial_attention import attend_partially  # noqa: E402
from krea2_model.transformer.token_groups import TokenGroups  # noqa: E402

SIZES = (1024, 2048)
TEXT, HEADS, DIM, TURNS = 128, 2, 128, 3


@torch.no_grad()
def seconds(pixels: int) -> dict[str, list[float]]:
    """Processor times of attention, exact and sparse."""
    side = pixels // 16
    query = torch.randn(1, HEADS, TEXT + side**2, DIM)
    key = torch.randn(1, 1, TEXT + side**2, DIM)
    groups = SparseAttention().at((side, side), 1.0, query.device)
    sparse = TokenGroups(side**2).with_sparse(groups or ())
    times: dict[str, list[float]] = {"exact": [], "sparse": []}
    for turn in range(TURNS + 1):
        for name, found in times.items():
            started = time.process_time()
            if name == "exact":
                attend(query, key, key)
            else:
                inputs = query, key, key, None, False
                sparse.attend(attend, attend_partially, TEXT, *inputs)
            if turn:  # the first is for warming up
                found.append(time.process_time() - started)
    return times


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({size: seconds(size) for size in SIZES}))
