"""Section "candidates": each switch of the pack's `switches.py` on and off, in turns.

First its own work alone, in bytes over time beside the copy's, then a step. A switch that only
changes how work is laid out has to give the same bits; one that rounds elsewhere may be no further
from float32 than without it. Its verdict is "on" where every turn was faster.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import in_process
from benchmarks.interpreter import interpreted
from krea2_model.checkpoints.gguf import FORMATS

from . import measure, models, weights

# Of a switch, the forms of weights whose step it changes; the first ones are there already.
STEPS = (("quantise_once", "fp8"), ("cudnn", "bf16"), ("swiglu", "bf16"), ("gate", "bf16"),
         ("gguf", "Q4_K"), ("gguf", "Q8_0"))  # fmt: skip
SAME_BITS = ("quantise_once", "gguf")
# Of a whole step that is rounded elsewhere, in bf16.
STEP_LIMIT = 0.05
PAIRS = 5
# So much of a matrix of the model that a CPU interprets it in a moment.
TINY_VALUES = 2**16


def run_candidates(worker) -> None:
    with kernels_on_this_device(worker) as without_triton:
        for switch, form in STEPS:
            reason = reason_against(worker, switch, without_triton)
            if reason:
                worker.row(what=f"{switch}, {form}", switch=switch, not_here=reason)
                continue
            if switch in ALONE:
                worker.attempt(f"{switch} alone", partial(ALONE[switch], worker, switch, form))
            for pixels in sizes_of(worker, switch):
                what = f"{switch}, a step in {form}"
                worker.attempt(what, partial(step, worker, switch, form, pixels))
            gc.collect()
        if not without_triton:
            for name in FORMATS:
                worker.attempt(f"gguf, {name}", partial(same_bits, worker, name))


def sizes_of(worker, switch: str) -> list[int]:
    """In pixels; attention counts for more at the largest."""
    sizes = [worker.sizes.small_image, worker.sizes.image]
    if switch == "cudnn":
        sizes.append(max(pixels for pixels, _ in worker.sizes.steps))
    return list(dict.fromkeys(sizes))


@contextlib.contextmanager
def kernels_on_this_device(worker) -> Iterator[str]:
    """Gives why Triton's kernels do not run here, or nothing; a CPU interprets them."""
    package = in_process.pack_module("krea2_model.nn.triton_kernels")
    if importlib.util.find_spec("triton") is None:
        yield "triton is not installed"
    elif worker.device.type == "cpu":
        with interpreted(package):
            for name in ("gates", "gguf"):
                importlib.import_module(f"{package.__name__}.{name}").TILE = TINY_VALUES
            yield ""
    else:
        works = package.takes(torch.empty(1, device=worker.device))
        yield "" if works else "Triton does not work on this card"


def reason_against(worker, switch: str, without_triton: str) -> str:
    if switch in ("gguf", "swiglu", "gate"):
        return without_triton
    if switch == "cudnn":
        if worker.device.type != "cuda":
            return "there is no NVIDIA card"
        backends = in_process.pack_module("krea2_model.nn.attention_backends")
        config = worker.sizes.transformer
        query, key = (
            torch.empty(1, heads, 1024, config.attention_head_dim, device=worker.device,
                        dtype=worker.models.dtype)
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )  # fmt: skip
        with on(worker, switch):
            if backends.preferred(query, key, key, None) is None:
                return "the table of attention backends does not choose cuDNN"
    return ""


@contextlib.contextmanager
def on(worker, switch: str) -> Iterator[None]:
    """The switch on; cuDNN at every length, so that the table learns where it begins to pay."""
    switches = in_process.pack_module("krea2_model.nn.switches")
    with switches.switched(*switches.DEFAULT, switch):
        if switch != "cudnn":
            yield
            return
        backends = in_process.pack_module("krea2_model.nn.attention_backends")
        table = backends.TABLE
        always = (backends.Lengths(0, backends.SDPBackend.CUDNN_ATTENTION),)
        capability = torch.cuda.get_device_capability(worker.device)
        backends.TABLE = {(capability, worker.models.dtype): always}
        try:
            yield
        finally:
            backends.TABLE = table


def off(switch: str):
    """The switch off, and the others as users have them."""
    switches = in_process.pack_module("krea2_model.nn.switches")
    return switches.switched(*switches.DEFAULT - {switch})


def step(worker, switch: str, form: str, pixels: int) -> None:
    text = worker.sizes.steps[0][1]
    inputs = worker.models.inputs(pixels, text)
    call = models.our_call(worker.models.in_form(form)["ours"], inputs)
    results: dict[str, Tensor] = {}

    def without() -> None:
        with off(switch):
            results["off"] = call()

    def with_it() -> None:
        with on(worker, switch):
            results["on"] = call()

    row = in_turns(worker, {"off": without, "on": with_it})
    if pixels <= worker.sizes.small_image:  # it does not grow with the size
        for name, turn in (("off", without), ("on", with_it)):
            row[f"{name}_host_ms"] = measure.host_milliseconds(turn, 1 if worker.tiny else 3)
    error = measure.error_of(results["on"], results["off"])
    limit = 0.0 if switch in SAME_BITS else STEP_LIMIT
    record(worker, switch, f"a step in {form}", row, error, limit, pixels=pixels)


def dequantised(worker, switch: str, form: str) -> None:
    """The widest matrix of a block, to the dtype of the model."""
    config, device = worker.sizes.transformer, worker.device
    shape = (config.intermediate_size, config.hidden_size)
    generator = torch.Generator(device).manual_seed(7)
    stored = weights.gguf_tensor(shape, form, device, generator)
    dequantise = in_process.pack_module("krea2_model.checkpoints.gguf").dequantise

    def call() -> Tensor:
        return dequantise(stored.data, form, shape, torch.bfloat16)

    moved = stored.data.numel() + 2 * shape[0] * shape[1]
    compare(worker, switch, f"{form} to bf16", call, moved, same=True)


def gated(worker, switch: str, form: str) -> None:
    """The gated product of a block at the larger size."""
    config, device = worker.sizes.transformer, worker.device
    tokens = (worker.sizes.image // 16) ** 2 + worker.sizes.steps[0][1]
    width = config.intermediate_size if switch == "swiglu" else config.hidden_size
    kernels = in_process.pack_module("krea2_model.nn.kernels")
    generator = torch.Generator(device).manual_seed(8)
    gate, values = (
        torch.randn(1, tokens, width, device=device, generator=generator).to(torch.bfloat16)
        for _ in range(2)
    )
    wide = gate.float()
    exact = wide.sigmoid() * values.float() * (wide if switch == "swiglu" else 1)
    first = (gate, values) if switch == "swiglu" else (values, gate)
    function = kernels.silu_gated if switch == "swiglu" else kernels.sigmoid_gated

    def call() -> Tensor:  # in the place of its inputs, whose numbers make no difference
        return function(*first)

    def product() -> Tensor:
        with kernels.keeping_inputs():
            return function(*first)

    compare(worker, switch, "the product", call, 3 * 2 * gate.numel(), same=False,
            check=product, exact=exact)  # fmt: skip


# Switches whose work is measured by itself too; attention is in section "machine".
ALONE = {"gguf": dequantised, "swiglu": gated, "gate": gated}


def compare(worker, switch: str, what: str, call: Callable[[], Tensor], moved: int, *,
            same: bool, check: Callable[[], Tensor] | None = None,
            exact: Tensor | None = None) -> None:  # fmt: skip
    """A kernel alone: its numbers first, then 20 launches a turn."""
    check = check or call
    with off(switch):
        plain = check()
    with on(worker, switch):
        result = check()
    error, limit = measure.error_of(result, plain), 0.0
    if not same:
        assert exact is not None
        error, limit = measure.error_of(result, exact), measure.error_of(plain, exact)
    del plain, result, exact
    launches = 1 if worker.tiny else 20

    def repeated(switched) -> None:
        with switched:
            for _ in range(launches):
                call()

    turns = {"off": lambda: repeated(off(switch)), "on": lambda: repeated(on(worker, switch))}
    row = in_turns(worker, turns)
    row |= {name: row[name] / launches for name in ("off_ms", "on_ms")}
    for name in ("off", "on"):
        row[f"{name}_gb_s"] = moved / row[f"{name}_ms"] / 1e6
    copied = worker.ceilings.bytes_a_ms
    row["of_copy"] = row["on_gb_s"] * 1e6 / copied if copied else None
    record(worker, switch, what, row, error, limit, moved_gb=moved / measure.GB)


def in_turns(worker, calls: dict[str, Callable]) -> dict:
    """Medians of both, and how much faster it is with the switch on: median, least, most."""
    pairs, warm = (1, 0) if worker.tiny else (min(PAIRS, worker.sizes.pairs), 1)
    return measure.compared(measure.in_turns(calls, pairs, warm), ours="on")


def record(worker, switch: str, what: str, row: dict, error: float, limit: float, **labels) -> None:
    passed = error <= limit
    verdict = "on" if passed and row["off_ratio"][1] > 1 else "off"
    worker.row(what=f"{switch}, {what}", switch=switch, **labels, **row, error=error, limit=limit,
               verdict=verdict, passed=passed)  # fmt: skip


def same_bits(worker, name: str) -> None:
    """Every format in every dtype, with blocks that do not fill the last program."""
    form, generator = FORMATS[name], torch.Generator(worker.device).manual_seed(9)
    count = 3 if worker.tiny else 1001
    data = torch.randint(256, (count, form.block_bytes), dtype=torch.uint8, device=worker.device,
                         generator=generator)  # fmt: skip
    dequantise = in_process.pack_module("krea2_model.checkpoints.gguf").dequantise
    shape, wrong = (count, form.block_values), []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with off("gguf"):
            plain = dequantise(data, name, shape, dtype)
        with on(worker, "gguf"):
            values = dequantise(data, name, shape, dtype)
        # Random scales may be no numbers, which are equal to nothing.
        if not torch.equal(plain.nan_to_num(0), values.nan_to_num(0)):
            wrong.append(str(dtype))
    worker.row(what=f"gguf, {name}, bits", switch="gguf", differs_in=wrong, passed=not wrong)
