"""The text encoder at full size: what is held, and encoding a prompt beside core.

    PYTHONPATH=ComfyUI python -P benchmarks/text_encoder.py     # prints JSON

Sizes are counted on meta. Encoding runs on random weights of the released sizes (a file of 8 GB in
a temporary folder), as ComfyUI loads it, in turns; `--sizes` leaves that out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts")]

import in_process  # noqa: E402

PROMPT = (
    "A fox asleep under a birch in the first snow, its tail over its nose; low winter sun from "
    "the left, long blue shadows, a red mitten lost beside it, shot on film with a shallow focus"
)


def module_bytes(module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def sizes() -> dict[str, int]:
    import comfy.text_encoders.krea2
    import torch

    encoder = in_process.pack_module("krea2_model.text.encoder")
    config = in_process.pack_module("krea2_model.config").TextEncoderConfig()
    ours = encoder.Qwen3VLTextEncoder(config, device="meta", dtype=torch.bfloat16)
    core = comfy.text_encoders.krea2.te(dtype_llama=torch.bfloat16)
    core = core(device="meta", dtype=torch.bfloat16, model_options={})
    language = in_process.pack_module("krea2_model.text.language_model")
    tail = language.LanguageTail(config, range(35, 36), device="meta", dtype=torch.bfloat16)
    return {
        "ours": module_bytes(ours),
        "core": module_bytes(core),
        "tail": module_bytes(tail),
        # Keys and values of a token in all layers, in float32.
        "token": config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4,
    }


def write_file(path: Path) -> None:
    """What a released file holds, of the vision tower only what it is known by."""
    import torch

    encoder = in_process.pack_module("krea2_model.text.encoder")
    config = in_process.pack_module("krea2_model.config")
    storage = in_process.pack_module("krea2_model.checkpoints.storage")
    whole = config.TextEncoderConfig(tap_layers=(config.TextEncoderConfig().num_hidden_layers,))
    pool = torch.randn(2**26)

    def entry(name, shape):
        count = shape.numel()

        def make():
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            repeats = -(-count // len(pool))
            numbers = (pool * shape[-1] ** -0.5).bfloat16().repeat(repeats)
            return numbers[:count].view(shape)

        return storage.Entry(f"model.{name}", torch.bfloat16, tuple(shape), make)

    shapes = encoder.Qwen3VLTextEncoder(whole, device="meta").state_dict()
    entries = [entry(name, weight.shape) for name, weight in shapes.items()]
    entries.append(entry("norm.weight", torch.Size([whole.hidden_size])))
    for name, shape in (
        ("visual.merger.linear_fc2.weight", (2560, 4096)),
        ("visual.deepstack_merger_list.0.norm.weight", (4096,)),
    ):
        entries.append(entry(name, torch.Size(shape)))
    path.parent.mkdir(parents=True)
    storage.write_safetensors(path, entries, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="krea2-text-") as folder:
        in_process.start(Path(folder))
        results: dict = {"bytes": sizes()}
        if not options.sizes:
            import torch

            write_file(Path(folder) / "models" / "text_encoders" / "qwen3vl_4b_bf16.safetensors")
            file = "qwen3vl_4b_bf16.safetensors"
            with torch.inference_mode():
                clips = {
                    "ours": in_process.run_node("K2TextEncoderLoader", file=file)[0],
                    "core": in_process.run_node("CLIPLoader", clip_name=file, type="krea2")[0],
                }
                # fmt: skip
                results["seconds"] = {name: [] for name in clips}
                for turn in range(options.pairs + 1):
                    for name, clip in clips.items():
                        started = time.perf_counter()
                        clip.encode_from_tokens(clip.tokenize(PROMPT))
                        if turn:
                            results["seconds"][name].append(time.perf_counter() - started)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
