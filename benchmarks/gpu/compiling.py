"""Section "compile": runs with Compile Krea 2 on and off, and what the first one costs."""

from __future__ import annotations

import contextlib

import torch

import in_process

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
    run_node = in_process.run_node
    models = {"compiled": run_node("K2Compile", model=model)[0]}
    if worker.device.type == "cuda":
        for mode in ("CUDA graph", "compile and CUDA graph"):
            models[mode] = run_node("K2Compile", model=model, mode=mode)[0]
    text = worker.sizes.steps[0][1]
    texts = (conditioning(worker, text, 1), conditioning(worker, text, 2))
    # The second size runs by the graph of the first, which is why it comes second.
    for pixels in (worker.sizes.image, worker.sizes.small_image):
        eager = our_run(worker, model, pixels, STEPS, 0.0, texts)
        for what, faster in models.items():
            run = our_run(worker, faster, pixels, STEPS, 0.0, texts)
            worker.attempt(
                what, lambda w=what, p=pixels, r=run, e=eager: compare(worker, w, p, text, r, e)
            )


def compare(worker, what: str, pixels: int, text: int, run, eager) -> None:
    first = measure.milliseconds(run) / 1e3
    turns = {"ours": run, "eager": eager}
    row = measure.compared(measure.in_turns(turns, min(3, worker.sizes.pairs), warm=1))
    row["floor_ms"] = rooflines.step_floor_ms(
        worker.ceilings, worker.sizes.transformer, pixels, text, "bf16"
    )
    error = measure.error_of(run(), eager())
    worker.row(what=what, pixels=pixels, steps=STEPS, first_run_s=first, **row,
               error=error, passed=error < 0.05)  # fmt: skip
