"""Memory at its peak while a transformer file of about 2 GB loads, anonymous and mapped apart.

    PYTHONPATH=ComfyUI python -P benchmarks/load_memory.py     # prints JSON

Files of random numbers are written into a temporary folder (8 GB); each loads in a process of its
own, through Load Krea 2 Model, through ComfyUI's own loader and through krea2_model (making what is
quantised plain, and keeping it), then runs once at 256 px. null stands where a loader does not take
a file.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("bf16", "fp8", "int8_convrot", "Q8_0")
HOW = ("ours", "core", "krea2_model", "krea2_model, kept quantised")


def write_files(folder: Path) -> dict[str, Path]:
    """A file of each of FORMATS; those of 8 bits have twice the layers."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    import gguf
    import torch

    from krea2_model.checkpoints.storage import Entry, read_safetensors, write_safetensors
    from krea2_model.checkpoints.transformer_keys import module_to_official
    from krea2_model.config import TransformerConfig
    from krea2_model.tools.convert import convert
    from krea2_model.transformer.model import Krea2Transformer

    folder.mkdir(parents=True)
    sources = {}
    for layers in (20, 40):
        config = TransformerConfig(
            num_layers=layers, num_attention_heads=16, num_key_value_heads=4, intermediate_size=5504
        )
        shapes = {
            module_to_official(name): tuple(tensor.shape)
            for name, tensor in Krea2Transformer(config, device="meta").state_dict().items()
        }

        def entry(name, shape):
            def make():
                numbers = torch.randn(shape, dtype=torch.bfloat16)
                return numbers * (0.02 if len(shape) > 1 else 0.1)

            return Entry(name, torch.bfloat16, shape, make)

        sources[layers] = folder / f"krea2_turbo_{layers}.safetensors"
        write_safetensors(sources[layers], [entry(*item) for item in shapes.items()], {})
    files = {"bf16": sources[20]}
    for form in FORMATS[1:3]:
        files[form] = folder / f"krea2_turbo_{form}.safetensors"
        convert(sources[40], files[form], quantise=form)
    files["Q8_0"] = folder / "krea2_turbo_q8.gguf"
    writer = gguf.GGUFWriter(files["Q8_0"], "krea2")
    for name, tensor in read_safetensors(sources[40])[0].items():
        numbers = tensor.float().numpy()
        if name.startswith("blocks.") and numbers.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sources[40].unlink()
    return files


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Peak:
    """The largest anonymous and mapped memory while it is open, beyond what was there before."""

    def __enter__(self):
        self.before = (status("RssAnon"), status("RssFile"))
        self.most, self.open = [0, 0], True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.open = False
        self.thread.join()

    def _watch(self):
        while self.open:
            for index, field in enumerate(("RssAnon", "RssFile")):
                self.most[index] = max(self.most[index], status(field) - self.before[index])
            time.sleep(0.002)


def measure(how: str, path: Path) -> None:
    """Load and run in this process; print the peaks of both as JSON."""
    import torch

    if how.startswith("krea2_model"):
        sys.path.insert(0, str(ROOT))
        from krea2_model.checkpoints.transformer import load_transformer

        load = functools.partial(load_transformer, keep_quantised=how.endswith("quantised"))
    else:
        sys.path.append(str(ROOT / "scripts"))
        import in_process

        in_process.start(Path(tempfile.mkdtemp()))
        import comfy.model_management
        import comfy.sd

        ours = in_process.pack_module("nodes.managed.model")
        options = {"dtype": torch.bfloat16}
        load = {
            "ours": lambda path: ours.load_model(path, torch.bfloat16),
            "core": lambda path: comfy.sd.load_diffusion_model(str(path), model_options=options),
        }[how]

    with torch.inference_mode():
        with Peak() as loading:
            started = time.monotonic()
            model = load(path)
            seconds = time.monotonic() - started
        taps, latents = torch.randn(1, 12, 12, 2560), torch.randn(1, 16, 32, 32)
        with Peak() as running:
            if how.startswith("krea2_model"):
                dtype = torch.bfloat16
                model(latents.to(dtype), torch.ones(1), model.fuse_text(taps.to(dtype)))
            else:
                comfy.model_management.load_models_gpu([model])
                inner, dtype = model.model.diffusion_model, model.model.get_dtype_inference()
                inner(latents[:, :, None].to(dtype), torch.ones(1), taps.flatten(2).to(dtype))
    print(json.dumps({
        "file": path.stat().st_size, "seconds": seconds,
        "loading": dict(zip(("anonymous", "mapped"), loading.most, strict=True)),
        "running": dict(zip(("anonymous", "mapped"), running.most, strict=True)),
    }))  # fmt: skip


def main() -> None:
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    results: dict = {}
    with tempfile.TemporaryDirectory(prefix="krea2-memory-") as folder:
        for form, path in write_files(Path(folder) / "models" / "diffusion_models").items():
            for how in HOW:
                command = [sys.executable, "-P", __file__, how, str(path)]
                done = subprocess.run(command, capture_output=True, text=True)
                lines = done.stdout.strip().splitlines()
                results.setdefault(form, {})[how] = json.loads(lines[-1]) if lines else None
    print(json.dumps(results))


if __name__ == "__main__":
    main()
