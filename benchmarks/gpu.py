"""A step of the full-size transformer on a GPU: ours beside core's, resident and offloaded.

    PYTHONPATH=ComfyUI python -P benchmarks/gpu.py     # prints JSON; 30 GB of disk, 40 GB of VRAM

Random weights of the released sizes, in bf16 and in fp8, as ComfyUI loads them. Beside them stands
the roofline of the same GPU: the matrix products and the attention of a step at the rates they
reach alone, and its element-wise traffic at the bandwidth of a copy. `--tiny` runs the same code on
a small model on any device, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts")]

import in_process  # noqa: E402

SIZES = ((512, 64), (512, 512), (1024, 64), (1024, 512), (1536, 64), (2048, 64))
CAPS_GB = (8, 12, 16)
# Element-wise traffic of a block in bytes a token, from benchmarks/block.py.
TRAFFIC_A_TOKEN = 1.58e9 / 4160


def write_file(path: Path, config) -> None:
    import torch

    storage = in_process.pack_module("krea2_model.storage")
    transformer = in_process.pack_module("krea2_model.transformer")
    keys = in_process.pack_module("krea2_model.transformer_keys")
    shapes = transformer.Krea2Transformer(config, device="meta").state_dict()

    def entry(name, shape):
        matrix = len(shape) > 1 and not name.endswith(".lin")
        dtype = torch.bfloat16 if matrix else torch.float32
        size = shape[-1] ** -0.5 if matrix else 0.1
        device = "cuda" if torch.cuda.is_available() else "cpu"
        make = lambda: (torch.randn(shape, device=device) * size).to(dtype).cpu()  # noqa: E731
        return storage.Entry(name, dtype, tuple(shape), make)

    entries = [entry(keys.module_to_official(name), t.shape) for name, t in shapes.items()]
    storage.write_safetensors(path, entries, {"krea2.variant": "turbo"})


def measured(call, repeats: int = 5) -> list[float]:
    """Seconds of each call, the device waited for."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    seconds = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds


def step(model, pixels: int, text: int, config):
    """One call of a loaded model, as a sampler makes it after the text was fused."""
    import torch

    inner = model.model.diffusion_model
    device, dtype = model.load_device, model.model.get_dtype_inference()
    latents = torch.randn(1, 16, 1, pixels // 8, pixels // 8, device=device, dtype=dtype)
    context = torch.randn(1, text, config.num_text_layers * config.text_hidden_dim)
    context = context.to(device, dtype)
    if hasattr(inner, "fuse_context"):
        hooks = in_process.pack_module("nodes.managed.hooks")
        context = inner.fuse_context(context, None, hooks.PatchHooks({}))
    when = torch.tensor([0.5], device=device)
    return lambda: inner(latents, when, context, transformer_options={})


def roofline(pixels: int, text: int, config, device, dtype) -> float:
    """Seconds that a step takes at the least, by rates measured here."""
    import torch
    import torch.nn.functional as F

    tokens = (pixels // 16) ** 2 + text
    dim, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.attention_head_dim
    rows = torch.randn(tokens, dim, device=device, dtype=dtype)
    total = 0.0
    for inside, outside, count in ((dim, dim, 3), (dim, kv, 2), (dim, inner, 2), (inner, dim, 1)):
        x = rows if inside == dim else torch.randn(tokens, inside, device=device, dtype=dtype)
        weight = torch.randn(outside, inside, device=device, dtype=dtype)
        total += count * statistics.median(measured(lambda x=x, w=weight: F.linear(x, w)))
    heads = rows.view(1, tokens, -1, config.attention_head_dim).transpose(1, 2)
    total += statistics.median(measured(lambda: F.scaled_dot_product_attention(*[heads] * 3)))
    copied = torch.empty(2**27, device=device, dtype=torch.uint8)
    target = torch.empty_like(copied)
    seconds = statistics.median(measured(lambda: target.copy_(copied)))
    total += TRAFFIC_A_TOKEN * dim / 6144 * tokens / (2 * copied.numel() / seconds)
    return total * config.num_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    if not (gpu or options.tiny):
        sys.exit("There is no GPU here.")
    with tempfile.TemporaryDirectory(prefix="krea2-gpu-") as folder:
        base = Path(folder)
        in_process.start(base, *(("--gpu-only",) if gpu else ("--cpu",)))
        import comfy.model_management as management

        configs = in_process.pack_module("krea2_model.config")
        config = configs.TransformerConfig()
        if options.tiny:
            config = configs.TransformerConfig(
                num_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=768,
                text_hidden_dim=160, text_intermediate_size=512,
            )  # fmt: skip
        models = base / "models" / "diffusion_models"
        models.mkdir(parents=True)
        write_file(models / "krea2_turbo_bf16.safetensors", config)
        convert = in_process.pack_module("krea2_model.convert").convert
        convert(models / "krea2_turbo_bf16.safetensors", models / "krea2_turbo_fp8.safetensors",
                quantise="fp8")  # fmt: skip
        sizes = SIZES[:2] if options.tiny else SIZES
        results: dict = {"device": torch.cuda.get_device_name() if gpu else "cpu", "steps": []}
        with torch.inference_mode():
            for form in ("bf16", "fp8"):
                file = f"krea2_turbo_{form}.safetensors"
                loaders = {
                    "ours": lambda file=file: in_process.run_node("K2ModelLoader", file=file)[0],
                    "core": lambda file=file: in_process.run_node(
                        "UNETLoader", unet_name=file, weight_dtype="default"
                    )[0],
                }
                found: dict = {}
                for who, load in loaders.items():
                    management.unload_all_models()
                    model = load()
                    management.load_models_gpu([model], force_full_load=True)
                    for pixels, text in sizes:
                        if gpu:
                            torch.cuda.reset_peak_memory_stats()
                        seconds = measured(step(model, pixels, text, config))
                        peak = torch.cuda.max_memory_allocated() if gpu else 0
                        found.setdefault((pixels, text), {})[who] = {
                            "seconds": seconds, "peak": peak}  # fmt: skip
                    if gpu:
                        for cap in CAPS_GB:
                            model.detach()
                            model.load(model.load_device, lowvram_model_memory=cap * 10**9)
                            seconds = measured(step(model, 1024, 64, config))
                            found.setdefault(f"{cap} GB", {})[who] = {"seconds": seconds}
                    model.detach()
                    del model
                for key, runs in found.items():
                    line = {"form": form, "runs": runs}
                    if isinstance(key, tuple):
                        line |= {"pixels": key[0], "text": key[1]}
                        device = management.get_torch_device()
                        line["roofline"] = roofline(*key, config, device, torch.bfloat16)
                    else:
                        line |= {"pixels": 1024, "text": 64, "weights": key}
                    results["steps"].append(line)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
