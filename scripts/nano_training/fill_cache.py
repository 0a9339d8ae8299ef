"""Fill the cache of a `krea2 pretrain` run of krea2-nano's, with several processes at once.

    python scripts/nano_training/fill_cache.py run.toml --processes 8

The run then finds everything there. Here captions go through the text encoder many at a time, in
float32, where a run encodes them one by one: what they give differs by rounding.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def fill_cache(config_file: Path, processes: int = 1) -> int:
    """Encode what is missing of a run's pictures and captions; returns how much that was."""
    fill = partial(_fill, config_file, processes)
    if processes < 2:
        return fill(0)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(fill, range(processes)))


def _fill(config_file: Path, processes: int, index: int) -> int:
    """The part of one process: every so-manieth example, at the sizes of all stages."""
    import torch

    from krea2_model import load_text_encoder, load_vae
    from krea2_training.config import PretrainConfig, read_config
    from krea2_training.data.cache import Cache
    from krea2_training.data.encoders import Encoders
    from krea2_training.data.examples import read_examples
    from krea2_training.pretrain import stages_of
    from krea2_training.weights.base import machine_of
    from nano_training.recipe.pool import encode_captions

    if processes > 1:
        torch.set_num_threads(1)
    config = read_config(config_file, kind=PretrainConfig)
    examples = read_examples(config.data)[index::processes]
    if not examples:
        return 0
    captions = sorted({"", *(text for one in examples for text in one.captions)})

    class InBatches(Encoders):
        def text(self) -> Any:
            encoder = load_text_encoder(self.text_path, device=self.device, dtype=torch.float32)
            return dict(zip(captions, encode_captions(encoder, captions), strict=True))

        def taps(self, encoder, prompt, images=(), labels=True):
            return encoder[prompt]

        def vae(self) -> Any:
            return load_vae(self.vae_path, device=self.device, dtype=torch.float32)

    encoders = InBatches(config.model, *machine_of(config))
    cache = Cache(config.cache, encoders, config.references)
    stages = stages_of(config, examples)
    return cache.fill([one for stage in stages for one in stage.order.pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    print(f"{fill_cache(options.config, options.processes)} encodings made", flush=True)


if __name__ == "__main__":
    main()
