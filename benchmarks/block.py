"""A full-width block without its matrix products and attention: time, operators, traffic, peak.

    PYTHONPATH=ComfyUI python -P benchmarks/block.py [--tokens 4160]     # prints JSON

Ours as ComfyUI runs it, ComfyUI's own, and diffusers'. Linear layers and attention are stubs whose
own time is taken off. Operators are torch's that move data, views left out, one comfy_kitchen
operator as one; traffic is the bytes of their tensor arguments and results. Ours is counted on the
path that a GPU takes (ComfyUI's kernels), and timed on the path that this machine takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts"), str(ROOT)]

import in_process  # noqa: E402

in_process.start(Path(tempfile.mkdtemp(prefix="krea2-block-")))

import comfy.ldm.krea2.model  # noqa: E402
import comfy.ldm.modules.attention  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from diffusers.models.transformers import transformer_krea2 as diffusers_krea2  # noqa: E402

from benchmarks.traffic import Counter  # noqa: E402

config_module = in_process.pack_module("krea2_model.config")
transformer = in_process.pack_module("krea2_model.transformer.model")
attention = in_process.pack_module("krea2_model.nn.attention")
backend_module = in_process.pack_module("nodes.managed.backend")
layers_module = in_process.pack_module("nodes.managed.layers")

CONFIG = config_module.TransformerConfig()
DIM, HEADS, KV, MLP = CONFIG.hidden_size, 48, 12, CONFIG.intermediate_size


class Stubs:
    """Answers of layers: copies of fixed numbers, whose own time and operators do not count."""

    def __init__(self, dtype, tokens):
        self.dtype, self.tokens = dtype, tokens
        self.seconds, self.templates, self.counter = 0.0, {}, None

    def answer(self, *shape):
        started = time.perf_counter()
        with torch.utils._python_dispatch._disable_current_modes():
            if shape not in self.templates:
                self.templates[shape] = torch.randn(shape).to(self.dtype)
            result = self.templates[shape].clone()
        self.seconds += time.perf_counter() - started
        return result


def stub_linears(module, stubs, kind):
    for layer in module.modules():
        if isinstance(layer, kind):
            rows = layer.out_features
            layer.forward = lambda x, rows=rows: stubs.answer(*x.shape[:-1], rows)


def ours(stubs, rope, vector):
    with torch.device("meta"):
        block = transformer.SingleStreamBlock(
            CONFIG, layers_module.comfy_layers(comfy.ops.manual_cast), dtype=stubs.dtype
        )
    block = finish(block, stubs)
    vector = vector.float()  # once a step, before the blocks

    def run(hidden):
        # As inside a run: which block it is, and the patches there are (none).
        backend = backend_module.ComfyBackend({"block_index": 0})
        return block(hidden, vector, rope, None, None, backend)

    return run


def core(stubs, rope, vector):
    with torch.device("meta"):
        block = comfy.ldm.krea2.model.SingleStreamBlock(
            DIM, HEADS, 4, kvheads=KV, dtype=stubs.dtype, operations=comfy.ops.manual_cast
        )
    block = finish(block, stubs)
    return lambda hidden: block(hidden, vector, rope, transformer_options={"block_index": 0})


def theirs(stubs, rope, vector):
    with torch.device("meta"):
        block = diffusers_krea2.Krea2TransformerBlock(
            hidden_size=DIM, intermediate_size=MLP, num_heads=HEADS, num_kv_heads=KV, norm_eps=1e-5
        )
    block = finish(block, stubs)
    cosines = rope[0, 0, :, :, 0, 0].repeat_interleave(2, -1)
    sines = rope[0, 0, :, :, 1, 0].repeat_interleave(2, -1)
    return lambda hidden: block(hidden, vector, (cosines, sines))


def finish(block, stubs):
    stub_linears(block, stubs, torch.nn.Linear)
    for name, parameter in list(block.named_parameters()):
        path, _, leaf = name.rpartition(".")
        big = parameter.ndim == 2 and "table" not in name
        # Norm scales and tables are float32 in the official files.
        value = torch.empty(0) if big else torch.randn(parameter.shape) * 0.1
        setattr(block.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))
    return block.eval()


@contextlib.contextmanager
def stubbed_attention(stubs):
    def answer(query, *_, **__):
        return stubs.answer(query.shape[0], stubs.tokens, DIM)

    def heads(query, *_, **__):
        return stubs.answer(query.shape[0], stubs.tokens, HEADS, DIM // HEADS)

    places = [
        (comfy.ldm.modules.attention, "optimized_attention", answer),
        (comfy.ldm.krea2.model, "optimized_attention_masked", answer),
        (diffusers_krea2, "dispatch_attention_fn", heads),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)


def timed(run, stubs, hidden):
    stubs.seconds = 0.0
    started = time.perf_counter()
    run(hidden)
    return time.perf_counter() - started - stubs.seconds


def counted(run, hidden):
    with Counter() as counter:
        run(hidden)
    return {"operators": len(counter.operators), "gigabytes": counter.traffic / 1e9,
            "names": counter.operators}  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4160)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    rows = options.tokens // 64
    positions = transformer.grid_positions([(0, rows, 64)])[None][:, : options.tokens]
    rope = attention.rope_table(positions, CONFIG.axes_dims_rope, CONFIG.rope_theta)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        stubs = Stubs(dtype, rope.shape[2])
        vector = torch.randn(1, 1, 6 * DIM).to(dtype)
        hidden = torch.randn(1, rope.shape[2], DIM).to(dtype)
        with stubbed_attention(stubs):
            runs = {"ours": ours(stubs, rope, vector), "core": core(stubs, rope, vector),
                    "diffusers": theirs(stubs, rope, vector)}  # fmt: skip
            for run in runs.values():
                run(hidden.clone())
            times = {name: [] for name in runs}
            for _ in range(options.pairs):
                for name, run in runs.items():
                    times[name].append(timed(run, stubs, hidden.clone()))
            kernels = backend_module._has_kernels
            backend_module._has_kernels = lambda tensor: True
            counts = {name: counted(run, hidden.clone()) for name, run in runs.items()}
            backend_module._has_kernels = kernels
        results[str(dtype).removeprefix("torch.")] = {
            name: {"milliseconds": [1e3 * seconds for seconds in times[name]],
                   "median": 1e3 * statistics.median(times[name]), **counts[name]}
            for name in runs
        }  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
