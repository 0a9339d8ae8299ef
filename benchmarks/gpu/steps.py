"""Sections "step", "fp8" and "formats": a step, in turns with core and diffusers."""

from __future__ import annotations

import gc

from . import measure, rooflines
from .machine import card

# Sizes of "step" that the quantised forms are measured at too.
FORMATS = ("int8", "Q8_0", "Q4_K")


def run_step(worker) -> None:
    for pixels, text in worker.sizes.steps:
        worker.attempt("step", lambda p=pixels, t=text: step(worker, "bf16", p, t),
                       form="bf16", pixels=pixels, text=text)  # fmt: skip


def run_fp8(worker) -> None:
    for pixels, text in worker.sizes.steps[:4]:
        worker.attempt("step", lambda p=pixels, t=text: step(worker, "fp8", p, t),
                       form="fp8", pixels=pixels, text=text)  # fmt: skip


def run_formats(worker) -> None:
    """Beside bf16, since core reads no GGUF files."""
    for form in FORMATS:
        for pixels, text in worker.sizes.steps[:2]:
            worker.attempt("step", lambda f=form, p=pixels, t=text: step(worker, f, p, t, True),
                           form=form, pixels=pixels, text=text)  # fmt: skip


def step(worker, form: str, pixels: int, text: int, beside_bf16: bool = False) -> None:
    inputs = worker.models.inputs(pixels, text)
    calls = worker.models.calls(form, inputs)
    if beside_bf16:
        calls["bf16"] = worker.models.calls("bf16", inputs, diffusers=False)["ours"]
    # A second and more a call differs little from turn to turn.
    pairs = worker.sizes.pairs if pixels <= worker.sizes.image else min(worker.sizes.pairs, 3)
    row = measure.compared(measure.in_turns(calls, pairs))
    row["card"] = {name: card().get(name) for name in ("clocks.sm", "power.draw")}
    config = worker.sizes.transformer
    floor = rooflines.step_floor_ms(worker.ceilings, config, pixels, text, form)
    tokens = rooflines.tokens_of(pixels, text)
    row["floor_ms"] = floor
    row["of_floor"] = row["ours_ms"] / floor if floor else None
    row["product_tflop"] = rooflines.product_flops(config, tokens) / 1e12
    row["attention_tflop"] = rooflines.attention_flops(config, tokens) / 1e12
    row["weights_gb"] = rooflines.block_bytes(config, form) / measure.GB
    for name, call in calls.items():
        if pixels <= worker.sizes.small_image:  # it does not grow with the size
            row[f"{name}_host_ms"] = measure.host_milliseconds(call)
        row[f"{name}_peak_gb"] = measure.peak_bytes(call) / measure.GB
    model = worker.models.in_form(form)["ours"].model
    estimate = model.memory_required([1, 16, pixels // 8, pixels // 8],
                                     {"c_crossattn": [(1, text, 1)]})  # fmt: skip
    row["estimate_gb"] = estimate / measure.GB
    worker.row(form=form, pixels=pixels, text=text, **row)
    del calls
    gc.collect()
