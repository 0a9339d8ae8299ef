"""Options of `krea2 curate`; those of limits have the names that the limits have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .values import number, whole

_CURATE = """\
Finds what of a folder is no good for training: the same file twice, near duplicates (re-encoded,
resized or slightly cropped; recoloured ones are none), broken, tiny, very wide or tall, flat, black
and white pictures, and those with borders. Nothing is deleted or moved: curate.parquet has the
numbers of every picture, curate.html shows what goes and why. Given again, with other limits too,
only new and changed files are read.

  krea2 curate photos --resolution 512 1024 --list kept.jsonl
  krea2 train kept.jsonl --model krea2_raw_bf16.safetensors --text-encoder qwen3vl_4b.safetensors
      --vae qwen_image_vae.safetensors --output my_style.safetensors
"""

ENGINES = ("plain", "ray")

_SHARE: dict[str, Any] = {"type": number(0, 1), "metavar": "X"}

_LIMITS: dict[str, dict[str, Any]] = {
    "resolution": {
        "type": whole(64, 4096), "nargs": "+", "metavar": "PX",
        "help": "sides of squares of the areas to train at; default: 1024"},
    "enlarge": {
        "type": number(1, 8), "metavar": "X",
        "help": "the most by which a side may be enlarged to the lowest of them; default: 1.25"},
    "aspect": {
        "type": number(1, 100), "metavar": "X", "help": "longer to shorter side; default: 4"},
    "entropy": {
        "type": number(0, 8), "metavar": "BITS",
        "help": "the least, of the histogram of brightness; default: 1"},
    "black": {**_SHARE, "help": "the most black pixels; default: 0.9"},
    "white": {**_SHARE, "help": "the most white pixels; default: 0.9"},
    "border": {
        **_SHARE, "help": "the most of the area in bars at opposite edges; default: 0.15"},
    "distance": {
        "type": whole(0, 71), "metavar": "BITS",
        "help": "of 144, in which hashes of near duplicates may differ; default: 20"},
    "colour": {
        "type": number(0, 4), "metavar": "X",
        "help": "difference in colours of near duplicates; default: 0.5"},
}  # fmt: skip


def add_curate_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "krea2 curate FOLDER [options]"
    parser.epilog = _CURATE
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of pictures, as for train")
    results = parser.add_argument_group("results")
    for name, what in (
        ("table", "a .parquet file; default: curate.parquet in FOLDER"),
        ("sheet", "an .html file; default: curate.html in FOLDER"),
        ("list", "a .jsonl file of what is kept, with captions, for krea2 train"),
    ):
        results.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    limits = parser.add_argument_group("limits")
    for name, how in _LIMITS.items():
        limits.add_argument(f"--{name}", **how)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers",
        type=whole(1, 4096),
        metavar="N",
        help="files are read by so many processes; default: one a core",
    )
    machine.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="plain: on this machine; ray: on all of a Ray cluster, which share FOLDER",
    )
    machine.add_argument(
        "--address", metavar="HOST:PORT", help="of the Ray cluster; default: Ray starts here"
    )  # fmt: skip


def limits_of(args: argparse.Namespace) -> dict[str, Any]:
    """The limits on the command line."""
    return {name: value for name in _LIMITS if (value := getattr(args, name)) is not None}
