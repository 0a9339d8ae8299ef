"""Options of `krea2 render` for many workers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .choices import ENGINES, LAYOUTS
from .values import number, whole

# Options with values that mean nothing to the plain engine, and their defaults.
ENGINE_OPTIONS: dict[str, Any] = {
    "address": None,
    "workers": None,
    "gpus_per_worker": None,
    "batch": 1,
    "layout": LAYOUTS[0],
    "shard_size": 256,
    "dry_run": False,
    "dashboard": False,
    "server": [],
    "workflow": None,
}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    many = parser.add_argument_group("many workers")
    many.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0],
        help="plain: one after the other (default); ray: many GPUs and machines; comfyui: running "
        "ComfyUI servers",
    )  # fmt: skip
    many.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster; default: Ray starts here"
    )
    many.add_argument(
        "--workers",
        type=whole(1),
        metavar="N",
        help="default: one a GPU, or one where there is none",
    )
    many.add_argument(
        "--gpus-per-worker", type=number(0), metavar="X", help="default: 1, or 0 without a GPU"
    )
    many.add_argument(
        "--batch", type=whole(1, 256), default=1, metavar="N",
        help="rows of one setting and prompt length in a call of the model; default: 1, the very "
        "pixels of the plain command",
    )  # fmt: skip
    many.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0],
        help="folder: image files (default); webdataset or parquet: shards of many pictures",
    )  # fmt: skip
    many.add_argument(
        "--shard-size", type=whole(1, 100_000), default=256, metavar="N",
        help="pictures of a shard; default: 256",
    )  # fmt: skip
    many.add_argument(
        "--dry-run", action="store_true",
        help="count rows, calls, bytes and hours, from a picture that is not kept, and stop",
    )  # fmt: skip
    many.add_argument(
        "--dashboard", action="store_true", help="Ray's page and metrics, where Ray starts here"
    )
    many.add_argument(
        "--server", action="append", default=[], metavar="HOST:PORT",
        help="a running ComfyUI, for --engine comfyui; repeat it for several",
    )  # fmt: skip
    many.add_argument(
        "--workflow", type=Path, metavar="FILE",
        help="its graph as JSON (File, Export (API)); columns name its inputs",
    )  # fmt: skip
