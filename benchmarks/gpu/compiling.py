"""Section "compile": runs with Compile Krea 2 on and off, and what the first one costs."""

from __future__ import annotations

import contextlib

import in_process
import torch

from . import measure, rooflines
from .images import conditioning, our_run

STEPS = 4


def run_compile(worker) -> None:
    # A CPU takes half a minute to compile, which tells nothing of a GPU.
    tried = torch._dynamo.config.patch(disable=True) if worker.tiny else contextlib.nullcontext()
    with tried:
        measure_compiled(worker)


def measure_compiled(worker) -> None:
    model = worker.models.in_form("bf16")["ours"]
    compiled = in_process.run_node("K2Compile", model=model)[0]
    text = worker.sizes.steps[0][1]
    texts = (conditioning(worker, text, 1), conditioning(worker, text, 2))
    # The second size runs by the graph of the first, which is why it comes second.
    for pixels in (worker.sizes.image, worker.sizes.small_image):
        runs = {name: our_run(worker, m, pixels, STEPS, 0.0, texts)
                for name, m in (("ours", compiled), ("eager", model))}  # fmt: skip
        first = measure.milliseconds(runs["ours"]) / 1e3
        pairs = min(3, worker.sizes.pairs)
        row = measure.compared(measure.in_turns(runs, pairs, warm=1))
        row["floor_ms"] = rooflines.step_floor_ms(
            worker.ceilings, worker.sizes.transformer, pixels, text, "bf16"
        )
        error = measure.error_of(runs["ours"](), runs["eager"]())
        worker.row(what="compiled", pixels=pixels, steps=STEPS, first_run_s=first, **row,
                   error=error, passed=error < 0.05)  # fmt: skip
