"""Options of `krea2 styles`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .values import lora, style

_STYLES = """\
A style has words, pictures whose style is taken over, LoRAs, and settings that it suggests.
`--style NAME:WEIGHT` of the other commands uses it. In words {prompt} is the place of the prompt;
without it they follow the prompt. Several --style are saved as one, a moodboard.

  krea2 styles
  krea2 styles show Watercolour
  krea2 styles save "My ink" --from fox.png --words "loose black ink on white paper"
  krea2 styles save Evening --style "Ink wash:0.6" --style "Neon night:0.4"
"""


def add_styles_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "krea2 styles [list | show NAME | save NAME ...]"
    parser.epilog = _STYLES
    parser.add_argument("action", nargs="?", choices=("list", "show", "save"), default="list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the style to show or save")
    parser.add_argument(
        "--style-folder", type=Path, metavar="FOLDER",
        help="the library; default: KREA2_STYLES, or that of the user",
    )  # fmt: skip
    saved = parser.add_argument_group("save")
    saved.add_argument(
        "--from", dest="source", type=Path, metavar="PICTURE",
        help="a picture in this style: gives its LoRAs and the thumbnail; where nothing else is "
        "given it is the picture whose style is taken over",
    )  # fmt: skip
    saved.add_argument("--words", default="", metavar="TEXT", help="added to prompts")
    saved.add_argument("--negative", default="", metavar="TEXT", help="added to negatives")
    saved.add_argument(
        "--reference", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]",
        help="a picture whose style to take over; repeat it for several",
    )  # fmt: skip
    saved.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA, kept by its name in models/loras; repeat it for several",
    )  # fmt: skip
    saved.add_argument(
        "--style", type=style, action="append", default=[], metavar="NAME[:WEIGHT]",
        help="a style that this one contains; repeat it for several",
    )  # fmt: skip
    saved.add_argument("--force", action="store_true", help="replace a style of this name")
