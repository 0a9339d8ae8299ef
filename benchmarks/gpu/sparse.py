"""Section "sparse": a step with Krea 2 Sparse Attention, at a sigma where it acts, and without."""

from __future__ import annotations

import in_process

from . import measure
from .images import conditioning, our_run


def run_sparse(worker) -> None:
    model = worker.models.in_form("bf16")["ours"]
    sparse = in_process.run_node("K2SparseAttention", model=model)[0]
    text = worker.sizes.steps[0][1]
    texts = (conditioning(worker, text, 1), conditioning(worker, text, 2))
    pixels = max(size for size, _ in worker.sizes.steps)

    def compare() -> None:
        turns = {
            "ours": our_run(worker, sparse, pixels, 1, 0.0, texts),
            "exact": our_run(worker, model, pixels, 1, 0.0, texts),
        }
        row = measure.compared(measure.in_turns(turns, min(3, worker.sizes.pairs)))
        for name, run in turns.items():
            row[f"{name}_peak_gb"] = measure.peak_bytes(run) / measure.GB
        worker.row(what="a first step", pixels=pixels, **row)

    worker.attempt("a first step", compare)
