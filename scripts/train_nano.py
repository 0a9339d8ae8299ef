"""Train krea2-nano: its VAE, nano Raw, nano Turbo distilled from Raw, and two LoRAs on Raw.

    python scripts/train_nano.py                    # everything, in this order
    python scripts/train_nano.py raw --steps 6000   # one stage

An interrupted run goes on where it was saved last (every two minutes, in .local/nano). Losses are
in .local/nano/<stage>.jsonl. Each stage ends by writing its file into krea2_model/nano and starts
from the files of the stages before it. Takes hours on two CPU cores and minutes on a GPU, which is
used where there is one. A ComfyUI has to be found for its tokenizer: set COMFYUI_PATH.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from krea2_model import (  # noqa: E402
    load_text_encoder,
    load_transformer,
    load_vae,
    nano,
    save_transformer,
)
from krea2_model.checkpoints.transformer_keys import is_norm_or_table  # noqa: E402
from krea2_model.checkpoints.vae_keys import restore_temporal  # noqa: E402
from krea2_model.text.encoder import Qwen3VLTextEncoder  # noqa: E402
from krea2_model.transformer.model import Krea2Transformer  # noqa: E402
from krea2_model.vae.model import QwenImageVAE  # noqa: E402
from nano_training.examples import Examples  # noqa: E402
from nano_training.train_lora import train_lora  # noqa: E402
from nano_training.train_raw import train_raw  # noqa: E402
from nano_training.train_reference import ReferenceExamples, train_reference  # noqa: E402
from nano_training.train_turbo import train_turbo  # noqa: E402
from nano_training.train_vae import train_vae  # noqa: E402

STAGES = ("vae", "raw", "turbo", "lora", "reference")


def run_stage(stage: str, folder: Path, steps: int | None, onward: bool) -> None:
    options = {} if steps is None else {"steps": steps}
    if stage == "vae":
        vae = train_vae(folder, **options)
        tensors = restore_temporal(vae.state_dict(), vae.config)
        tensors = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, nano.VAE, {"format": "pt"})
    elif stage == "raw":
        start = load_transformer(nano.TRANSFORMERS["raw"]) if onward else None
        save(train_raw(folder, examples(folder), start=start, **options))
    elif stage == "turbo":
        raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
        start = load_transformer(nano.TRANSFORMERS["turbo"]) if onward else None
        save(train_turbo(folder, examples(folder), raw, start=start, **options))
    elif stage == "lora":
        raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
        save_lora(train_lora(folder, examples(folder, notebook=True), raw, **options), nano.LORA)
    else:
        raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
        shown = ReferenceExamples(folder / "examples", *encoders())
        save_lora(train_reference(folder, shown, raw, **options), nano.REFERENCE_LORA)


def examples(folder: Path, notebook: bool = False) -> Examples:
    """What the transformer learns from."""
    return Examples(folder / "examples", *encoders(), notebook)


def encoders() -> tuple[Qwen3VLTextEncoder, QwenImageVAE]:
    """What encodes examples: the parts as they are shipped."""
    encoder = load_text_encoder(nano.text_encoder_file(), dtype=torch.float32)
    return encoder, load_vae(nano.VAE, dtype=torch.float32)


def save_lora(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a LoRA in bfloat16."""
    save_file({name: t.bfloat16() for name, t in tensors.items()}, file, {"format": "pt"})


def save(transformer: Krea2Transformer) -> None:
    """Write a transformer to its place: matrices in bfloat16, norms and tables in float32."""
    for name, parameter in transformer.named_parameters():
        if not is_norm_or_table(name):
            parameter.data = parameter.data.bfloat16()
    save_transformer(transformer.cpu(), nano.TRANSFORMERS[transformer.variant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"{' '.join(STAGES)} (default: all)")
    parser.add_argument("--steps", type=int, help="of each stage (default: the stage's own)")
    parser.add_argument(
        "--onward", action="store_true", help="begin with the shipped weights, not from nothing"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".local" / "nano")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; expected {', '.join(STAGES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for stage in options.stages or STAGES:
        run_stage(stage, options.folder, options.steps, options.onward)


if __name__ == "__main__":
    main()
