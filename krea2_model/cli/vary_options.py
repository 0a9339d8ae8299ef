"""Options of `krea2 vary` and `krea2 walk`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..schedule import MAX_SEED
from .choices import VARY_STRENGTH
from .picture_options import add_picture_options, add_run_options
from .values import number, whole

# That each frame of an animation stays.
SECONDS = 0.1

_VARY = """\
Each neighbour has the picture's settings, and noise on the way from its seed to another: seed N for
the first, N + 1 for the second and so on. `krea2 again` remakes each, and `krea2 vary` of a
neighbour goes on from it. Options on the command line replace those in the picture.

  krea2 vary fox.png --strength 0.3 --images 8
"""
_WALK = """\
The first frame is the picture of the first prompt and --seed, the last that of the second and
--to-seed. Leave the second prompt out to walk between seeds alone. `krea2 again` remakes a frame.

  krea2 walk "a red circle" "a blue star" --model nano --frames 12 --animation walk.webp
"""


def add_vary_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "krea2 vary PICTURE [options]"
    parser.epilog = _VARY
    parser.add_argument("picture", type=Path, help="a .png, .jpg or .webp made here, or in ComfyUI")
    group = parser.add_argument_group("neighbours")
    group.add_argument(
        "--strength", type=number(0, 1), default=VARY_STRENGTH, metavar="X",
        help="how far to go: 0 is the picture and 1 that of another seed; default: "
        f"{VARY_STRENGTH:g}",
    )  # fmt: skip
    group.add_argument(
        "--variation-seed", type=whole(0, MAX_SEED), metavar="N",
        help="of the first neighbour; default: the one after the seeds of the picture",
    )  # fmt: skip
    group.add_argument(
        "--words", "--prompt", dest="prompt", metavar="TEXT", help="another prompt for all"
    )
    group.add_argument(
        "--expand", action="store_true",
        help="another wording of the prompt for each, written by the text encoder; not with nano",
    )  # fmt: skip
    add_picture_options(parser, 8, "each with the next variation seed")
    add_run_options(
        parser, Path("vary.png"),
        "a .png, .jpg or .webp file; default: vary.png, vary-2.png and so on",
    )  # fmt: skip


def add_walk_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'krea2 walk "PROMPT" ["PROMPT"] [options]'
    parser.epilog = _WALK
    parser.add_argument("prompt", help="what the first picture shows")
    parser.add_argument("to_prompt", nargs="?", metavar="PROMPT", help="what the last one shows")
    group = parser.add_argument_group("frames")
    group.add_argument(
        "--frames", type=whole(2, 100_000), default=12, metavar="N",
        help="how many, both ends counted; default: 12",
    )  # fmt: skip
    group.add_argument(
        "--to-seed", type=whole(0, MAX_SEED), metavar="N",
        help="of the last picture; default: that of --seed",
    )  # fmt: skip
    group.add_argument(
        "--animation", type=Path, metavar="FILE", help="one moving .webp, .gif or .png of all"
    )
    group.add_argument(
        "--seconds", type=number(0.01, 60), default=SECONDS, metavar="X",
        help="that each of its frames stays; default: 0.1",
    )  # fmt: skip
    group.add_argument("--back", action="store_true", help="let it go back to its beginning")
    group.add_argument(
        "--format", choices=("png", "jpg", "webp"), default="png", help="of frames; default: png"
    )
    add_picture_options(parser)
    add_run_options(parser, Path("walk"), "the folder of the frames; default: walk")
