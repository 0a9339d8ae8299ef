"""Train krea2-nano at 128 px: its VAE, nano Raw, nano Turbo distilled from it, three LoRAs on Raw.

The shipped files were made so. `train_nano_256.py` is the recipe of their successors.

    python scripts/train_nano.py                    # everything, in this order
    python scripts/train_nano.py raw --steps 6000   # one stage

An interrupted run goes on where it was saved last (every two minutes, in .local/nano/<stage>).
Losses are in log.jsonl there. Each stage ends by writing its file into krea2_model/nano and starts
from the files of the stages before it; `refine` goes on from the Turbo that is there. Takes hours
on two CPU cores and minutes on a GPU, which is used where there is one. A ComfyUI has to be found
for its tokenizer: set COMFYUI_PATH.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from krea2_model import (  # noqa: E402
    load_text_encoder,
    load_transformer,
    load_vae,
    nano,
)
from krea2_model.text.encoder import Qwen3VLTextEncoder  # noqa: E402
from krea2_model.transformer.model import Krea2Transformer  # noqa: E402
from krea2_model.vae.model import QwenImageVAE  # noqa: E402
from nano_training.examples import Examples  # noqa: E402
from nano_training.files import write_lora, write_transformer, write_vae  # noqa: E402
from nano_training.refine_turbo import refine_turbo  # noqa: E402
from nano_training.train_control import OutlineExamples, train_control  # noqa: E402
from nano_training.train_lora import train_lora  # noqa: E402
from nano_training.train_raw import train_raw  # noqa: E402
from nano_training.train_reference import ReferenceExamples, train_reference  # noqa: E402
from nano_training.train_turbo import train_turbo  # noqa: E402
from nano_training.train_vae import train_vae  # noqa: E402

STAGES = ("vae", "raw", "turbo", "refine", "lora", "reference", "control")


def run_stage(stage: str, folder: Path, steps: int | None, onward: bool) -> None:
    options = {} if steps is None else {"steps": steps}
    if stage == "vae":
        write_vae(train_vae(folder, **options), nano.VAE)
    elif stage == "raw":
        start = load_transformer(nano.TRANSFORMERS["raw"]) if onward else None
        save(train_raw(folder, examples(folder), start=start, **options))
    elif stage == "turbo":
        raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
        start = load_transformer(nano.TRANSFORMERS["turbo"]) if onward else None
        save(train_turbo(folder, examples(folder), raw, start=start, **options))
    elif stage == "refine":
        save(refine_turbo(folder, **options))
    elif stage == "lora":
        raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
        write_lora(train_lora(folder, examples(folder, notebook=True), raw, **options), nano.LORA)
    elif stage == "control":
        raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
        pairs = OutlineExamples(folder / "examples", *encoders())
        write_lora(train_control(folder, pairs, raw, **options), nano.CONTROL_LORA)
    else:
        raw = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32)
        shown = ReferenceExamples(folder / "examples", *encoders())
        write_lora(train_reference(folder, shown, raw, **options), nano.REFERENCE_LORA)


def examples(folder: Path, notebook: bool = False) -> Examples:
    """What the transformer learns from."""
    return Examples(folder / "examples", *encoders(), notebook)


def encoders() -> tuple[Qwen3VLTextEncoder, QwenImageVAE]:
    """What encodes examples: the parts as they are shipped."""
    encoder = load_text_encoder(nano.text_encoder_file(), dtype=torch.float32)
    return encoder, load_vae(nano.VAE, dtype=torch.float32)


def save(transformer: Krea2Transformer) -> None:
    """Write a transformer to its place."""
    write_transformer(transformer, nano.TRANSFORMERS[transformer.variant])


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
