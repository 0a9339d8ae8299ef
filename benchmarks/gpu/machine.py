"""Section "machine": the card, what ComfyUI really uses on it, and the ceilings of all others."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import comfy.ldm.modules.attention
import comfy.quant_ops
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import measure, rooflines

QUERY = ("name", "driver_version", "memory.total", "power.limit", "power.draw", "clocks.sm",
         "clocks.max.sm", "clocks.mem", "temperature.gpu")  # fmt: skip
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# What a block of ours calls of ComfyUI's kernels.
KERNELS = ("rms_rope_", "rms_adaln", "quantize_per_tensor_fp8", "int8_linear")


def run_machine(worker) -> None:
    worker.row(what="card", **card())
    worker.row(what="software", **software())
    worker.row(what="backends", **backends(worker.device))
    copy(worker)
    config = worker.sizes.transformer
    lengths = sorted({rooflines.tokens_of(*size) for size in worker.sizes.steps})
    for tokens in lengths:
        for form in ("bf16", "fp8"):
            worker.attempt("products", lambda t=tokens, f=form: products(worker, config, t, f),
                           form=form, tokens=tokens)  # fmt: skip
    for tokens in lengths:
        attention(worker, config, tokens)
    worker.row(what="clocks afterwards", **card())


def card() -> dict:
    """Read, never set."""
    if not (measure.has_gpu() and shutil.which("nvidia-smi")):
        return {"name": torch.cuda.get_device_name() if measure.has_gpu() else "cpu"}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return dict(zip(QUERY, done.stdout.strip().split(", "), strict=False))


def software() -> dict:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "comfy-kitchen", "comfy-aimdo", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def backends(device) -> dict:
    """Which implementation each kernel gets, and ComfyUI's attention; plain torch has to show."""
    kitchen = getattr(comfy.quant_ops, "ck", None)
    found = {"attention": comfy.ldm.modules.attention.optimized_attention.__name__}
    if kitchen is None:
        return found | {"passed": False, "error": "comfy-kitchen is not there"}
    for name, state in kitchen.list_backends().items():
        usable = state["available"] and not state["disabled"]
        found[f"kitchen {name}"] = "usable" if usable else str(state["unavailable_reason"])
    for kernel in KERNELS:
        try:
            found[kernel] = kitchen.registry.get_capable_backend(kernel)
        except Exception as error:
            found[kernel] = f"none: {error}"
    fused = all(found[kernel] == "cuda" for kernel in KERNELS[:2])
    return found | {"passed": fused or device.type != "cuda"}


def copy(worker) -> None:
    """Bytes read and written over the time."""
    size = worker.sizes.copy_bytes
    source = torch.randint(256, (size,), dtype=torch.uint8, device=worker.device)
    target = torch.empty_like(source)
    spent = measure.median_milliseconds(lambda: target.copy_(source))
    worker.row(what="copy", bytes=size, ms=spent, tb_s=2 * size / spent / 1e9)
    if measure.has_gpu():
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        spent = measure.median_milliseconds(lambda: target.copy_(host, non_blocking=True), 3, 1)
        worker.row(what="copy from pinned memory", bytes=size, ms=spent, tb_s=size / spent / 1e9)


def products(worker, config, tokens: int, form: str) -> None:
    """All matrix products of one block, back to back."""
    total, flops = 0.0, 0.0
    for inside, outside, count in rooflines.block_products(config):
        call = product(tokens, inside, outside, form, worker.device)
        spent = measure.median_milliseconds(call, repeats=2)
        total += count * spent
        flops += count * 2.0 * tokens * inside * outside
    worker.row(what="products", form=form, tokens=tokens, ms=total, tflops=flops / total / 1e9)


def product(tokens: int, inside: int, outside: int, form: str, device):
    if form == "fp8" and device.type == "cpu":
        tokens = inside = outside = 16  # there is only a very slow one
    rows = torch.randn(tokens, inside, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outside, inside, device=device, dtype=torch.bfloat16)
    if form == "bf16":
        return lambda: F.linear(rows, weight)
    eight, weight = (t.to(torch.float8_e4m3fn) for t in (rows, weight))
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        eight, weight.T, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
    )


def attention(worker, config, tokens: int) -> None:
    """One block's, by every backend, with key/value heads grouped and repeated."""

    def heads(count: int):
        shape = (1, count, tokens, config.attention_head_dim)
        return torch.randn(shape, device=worker.device, dtype=torch.bfloat16)

    query = heads(config.num_attention_heads)
    key, value = (heads(config.num_key_value_heads) for _ in range(2))
    repeats = config.num_attention_heads // config.num_key_value_heads
    pairs = {True: (key, value),
             False: tuple(t.repeat_interleave(repeats, dim=1) for t in (key, value))}  # fmt: skip
    flops = 4.0 * tokens**2 * config.hidden_size
    for name, backend in BACKENDS.items():
        for grouped, (keys, values) in pairs.items():
            row = {"what": "attention", "backend": name, "grouped": grouped, "tokens": tokens}

            def call(keys=keys, values=values, grouped=grouped):
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)

            try:
                with sdpa_kernel(backend):
                    spent = measure.median_milliseconds(call, launches=8, repeats=2)
            except RuntimeError:
                worker.row(**row, ms=None)
                continue
            worker.row(**row, ms=spent, tflops=flops / spent / 1e9)
