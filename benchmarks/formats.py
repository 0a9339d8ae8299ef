"""Each file format with krea2-nano: image error, memory held, and ComfyUI's own loader beside it.

    PYTHONPATH=ComfyUI python -P benchmarks/formats.py     # prints a table in Markdown

nano's transformer is written in every format by the tests' writers. Each file paints the same
prompts through Load Krea 2 Model and, where ComfyUI reads it, through Load Diffusion Model; errors
are mean differences of pixels, in 255ths, from the bf16 original's pictures.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

import in_process  # noqa: E402

BASE = Path(tempfile.mkdtemp(prefix="krea2-formats-"))
in_process.start(BASE)

import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import formats  # noqa: E402

run = in_process.run_node
NANO = "krea2-nano (built in)"
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")
PROMPTS = (
    "a red circle on white",
    "a small green star above a purple ring on white",
    "a blue square on the left and an orange triangle on the right",
    "a yellow heart on black",
    "a large purple triangle at the top on grey",
)


def held(model) -> int:
    """Bytes of a model's weights as they lie in memory."""
    total = 0
    for weight in model.model.diffusion_model.parameters():
        if isinstance(weight, QuantizedTensor):
            parts = vars(weight._params).values()
            total += weight._qdata.nbytes
            total += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
        else:
            total += weight.nbytes
    return total


class Painter:
    def __init__(self) -> None:
        clip = run("K2TextEncoderLoader", file=NANO)[0]
        self.vae = run("K2VAELoader", file=NANO)[0]
        self.prompts = [run("K2TextEncode", clip=clip, prompt=prompt)[0] for prompt in PROMPTS]

    def __call__(self, model) -> torch.Tensor:
        """The pictures of all prompts, in 255ths."""
        pictures = []
        for seed, positive in enumerate(self.prompts):
            latent = {"samples": torch.zeros(1, 16, 1, 16, 16)}
            sampled = run(
                "KSampler", model=model, seed=seed, steps=8, cfg=1.0, sampler_name="euler",
                scheduler="simple", positive=positive, negative=positive, latent_image=latent,
            )[0]  # fmt: skip
            pictures.append(run("K2VAEDecode", samples=sampled, vae=self.vae)[0])
        return torch.cat(pictures) * 255


@torch.inference_mode()
def main() -> None:
    nano = in_process.pack_module("krea2_model.nano")
    tensors = load_file(nano.TRANSFORMERS["turbo"])
    paint = Painter()
    folder = BASE / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    files: dict[str, tuple[Path, bool]] = {}
    for name in ("bf16", "fp16", "fp32"):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
        files[name] = (folder / f"krea2_turbo_{name}.safetensors", True)
        norms = {n: t if t.ndim < 2 else t.to(dtype) for n, t in tensors.items()}
        save_file(norms, files[name][0])
    plain = {"fp8, no scales": lambda tensors: formats.float8(tensors, "plain")}
    for name, write in (plain | formats.WRITERS).items():
        files[name] = (folder / f"krea2_turbo_{len(files)}.safetensors", "branches" not in name)
        stored, _, metadata = write(tensors)
        save_file({n: t.contiguous() for n, t in stored.items()}, files[name][0], metadata)
    for name in GGUF:
        files[f"GGUF {name}"] = (folder / f"krea2_turbo_{name}.gguf", False)
        formats.gguf_file(tensors, files[f"GGUF {name}"][0], name)
    folder_paths.filename_list_cache.clear()

    original = None
    print("| format | file | held | image error | core's image error | ours from core's |")
    print("|---|---|---|---|---|---|")
    for name, (path, core_reads) in files.items():
        model = run("K2ModelLoader", file=path.name)[0]
        pictures = paint(model)
        if original is None:
            original = pictures
        row = [name, f"{path.stat().st_size / 1e6:.1f} MB", f"{held(model) / 1e6:.1f} MB"]
        row.append(f"{(pictures - original).abs().mean():.2f}")
        if core_reads:
            theirs = paint(run("UNETLoader", unet_name=path.name, weight_dtype="default")[0])
            row.append(f"{(theirs - original).abs().mean():.2f}")
            row.append(f"{(pictures - theirs).abs().mean():.1e}")
        else:
            row += ["not read", ""]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
