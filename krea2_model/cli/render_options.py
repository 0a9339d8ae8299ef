"""Options of `krea2 render` for many workers, and of `krea2 serve`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..images.sizes import MAX_SIZE
from .choices import ENGINES, LAYOUTS
from .values import number, whole

# Options with values that mean nothing to the plain engine, and their defaults.
ENGINE_OPTIONS: dict[str, Any] = {
    "address": None,
    "workers": None,
    "gpus_per_worker": None,
    "batch": 1,
    "encoders": 0,
    "gpus_per_encoder": None,
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
    _add_ray(many)
    many.add_argument(
        "--batch", type=whole(1, 256), default=1, metavar="N",
        help="rows of one setting and prompt length in a call of the model; default: 1, the very "
        "pixels of the plain command",
    )  # fmt: skip
    many.add_argument(
        "--encoders", type=whole(0), default=0, metavar="N",
        help="workers that encode prompts for the others, where a card holds not all parts; "
        "default: 0",
    )  # fmt: skip
    many.add_argument(
        "--gpus-per-encoder", type=number(0), metavar="X", help="default: as for workers"
    )
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
        "--server", action="append", default=[], metavar="HOST:PORT",
        help="a running ComfyUI, for --engine comfyui; repeat it for several",
    )  # fmt: skip
    many.add_argument(
        "--workflow", type=Path, metavar="FILE",
        help="its graph as JSON (File, Export (API)); columns name its inputs",
    )  # fmt: skip


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", metavar="NAME",
        help="the address to listen at; default: 127.0.0.1, this machine alone",
    )  # fmt: skip
    server.add_argument("--port", type=whole(1, 65535), default=8000, help="default: 8000")
    server.add_argument(
        "--token", default=os.environ.get("KREA2_TOKEN"), metavar="TEXT",
        help="a secret that clients send as their API key; default: that of KREA2_TOKEN",
    )  # fmt: skip
    server.add_argument(
        "--max-images", type=whole(1, 100), default=4, metavar="N",
        help="of a request; default: 4",
    )  # fmt: skip
    server.add_argument(
        "--max-side", type=whole(16, MAX_SIZE), default=2048, metavar="PX",
        help="of a picture; default: 2048",
    )  # fmt: skip
    server.add_argument(
        "--max-queue", type=whole(1, 100_000), default=32, metavar="N",
        help="requests that wait; more are refused with status 503; default: 32",
    )  # fmt: skip
    server.add_argument(
        "--batch", type=whole(1, 256), default=1, metavar="N",
        help="pictures of one size and setting in a call of the model; default: 1",
    )  # fmt: skip
    _add_ray(server)


def _add_ray(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster; default: Ray starts here"
    )
    group.add_argument(
        "--workers", type=whole(1), metavar="N", help="default: one a GPU, or one without a GPU"
    )
    group.add_argument(
        "--gpus-per-worker", type=number(0), metavar="X", help="default: 1, or 0 without a GPU"
    )
    group.add_argument(
        "--dashboard", action="store_true", help="Ray's page and metrics, where Ray starts here"
    )
