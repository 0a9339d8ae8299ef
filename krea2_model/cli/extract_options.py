"""Options of `krea2 extract`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .choices import DTYPES, EXTRACTED, KEY_STYLES
from .values import number, whole

_EXTRACT = """\
The LoRA on the base is near the fine-tune: what it holds of the squared difference is said at the
end. Of a Turbo from a Raw it is a few-step LoRA, which the preset "auto" recognises. Files are read
a layer at a time, and quantised ones count by their values.

  krea2 extract my_tuned.safetensors --base krea2_raw_bf16.safetensors --rank 64
      --output my_style.safetensors
  krea2 extract nano --base nano-raw --targets blocks --output nano_turbo_lora.safetensors
"""


def add_extract_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "krea2 extract FINE_TUNE --base FILE --output FILE [options]"
    parser.epilog = _EXTRACT
    parser.add_argument(
        "fine_tune", metavar="FINE_TUNE", help="a transformer: a file, a diffusers folder or nano"
    )
    parser.add_argument(
        "--base", required=True, metavar="FILE", help="what it was trained from; nano-raw for nano"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file"
    )
    parser.add_argument(
        "--rank", type=whole(1, 4096), default=64, metavar="N",
        help="the most of each layer; default: 64",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=number(0, 1, above=True), metavar="X",
        help="a lower rank where it holds this share of a layer's squared difference",
    )  # fmt: skip
    parser.add_argument(
        "--targets", choices=EXTRACTED, default=EXTRACTED[0],
        help="default: all; blocks for what krea2 train --start goes on from by default",
    )  # fmt: skip
    parser.add_argument(
        "--with-differences", action="store_true",
        help="store what norms, tables and biases differ by too, which diffusers does not read",
    )  # fmt: skip
    parser.add_argument(
        "--key-style", choices=KEY_STYLES, default=KEY_STYLES[0], help="default: ai-toolkit"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of the LoRA; default: bf16"
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="for the calculation; default: auto"
    )
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
