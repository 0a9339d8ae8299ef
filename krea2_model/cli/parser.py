"""The commands and their options, without anything that takes time to import."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from .choices import CAPTION_LENGTHS, DTYPES, LENGTHS, OFFLOADS, PARTS, QUANTISATIONS
from .curate_options import add_curate_options
from .errors import UsageError, suggestion
from .extract_options import add_extract_options
from .picture_options import add_picture_options, add_run_options
from .render_options import add_engine_options, add_serve_options
from .style_options import add_styles_options
from .train_options import TRAINING, add_training_options
from .values import lora, number, place, seeds, whole
from .vary_options import add_vary_options, add_walk_options

SUMMARIES = {
    "generate": "make pictures from a prompt",
    "render": "make a picture of every row of a text, CSV or JSONL file",
    "grid": "make a labelled sheet of the values of one to three options against each other",
    "serve": "make pictures for programs, over HTTP as OpenAI's images API does",
    "again": "make a picture again, from the settings inside its file",
    "vary": "make neighbours of a picture, from the settings inside its file",
    "walk": "make the frames of a way between two prompts or seeds",
    "styles": "list, show and save styles: words, pictures and LoRAs by a name",
    "curate": "find duplicates and pictures that are no good for training",
    "train": "train a LoRA, or the whole transformer, on pictures with captions",
    "pretrain": "train a transformer from nothing, in stages of rising resolution",
    "distil": "make a few-step LoRA of a Raw checkpoint",
    "prefer": "teach a model which of two pictures of a prompt is preferred",
    "reward": "train on scores of the model's own pictures",
    "slider": "train a LoRA whose strength moves pictures between two descriptions",
    "pick": "make a page on which to pick the better pictures, for prefer",
    "merge": "merge fine-tuned transformers, or the LoRAs of one run",
    "extract": "make a LoRA of the difference between two transformers",
    "models": "say which files to get for this machine, and fetch them",
    "expand": "write a detailed caption from a short prompt",
    "describe": "write captions of pictures",
    "inspect": "say what a model file is",
    "check": "say what this machine has and what is wrong, for a bug report",
    "convert": "make one file of a folder, or the other way; quantise",
}
COMMANDS = tuple(SUMMARIES)

_EXAMPLES = """\
examples:
  krea2 "a red circle left of a blue square" --model nano
  krea2 "a fox in the snow" --model FOLDER --output fox.png
  krea2 again fox.png --seed 5
  krea2 models

A first word that is no command is the prompt of `generate`. `krea2 COMMAND --help` has its options.
"""

_RENDER = """\
FILE has a prompt a line (.txt, a line that begins with # is a comment), or rows whose columns are
options of generate (.csv, .jsonl): prompt, negative, seed, steps, guidance, width, height, output,
lora, ... Options on the command line hold for rows that do not set them. Each finished picture is a
line of results.jsonl in the folder of --output. For many machines see docs/many_pictures.md.
"""
_GRID = """\
An axis is an option of generate with its values:

  seed=1,2,3  seed=1-4  steps=4-12:4     values, a range, a range in steps
  prompt~fox=hare|snowy owl              a part of the prompt, and what to write for it
  lora=a.safetensors:0.5,b.safetensors,none      a LoRA with its strength; a;b are two at once
  lora-strength=0,0.5,1                  the strength of the LoRAs
  model=nano,nano-raw                    also transformer, text-encoder and vae

Values that hold commas have | between them. x goes to the right, y down, and z has blocks below
each other. The single pictures and results.jsonl lie in a folder of the sheet's name. A sheet is
written also where the run is stopped; --resume goes on.

  krea2 grid "a red circle" --model nano --x seed=1-3 --y guidance=0,1
"""
_SERVE = """\
Options of pictures hold for requests that do not set them. docs/many_pictures.md has examples.
"""
_DESCRIBE = """\
The text encoder has to be a whole file: with the last layer and the vision tower. With several
lengths the shorter captions are written from the long one, and a .txt file holds them parted by
lines of ---, as krea2 train reads them. Pictures that have a .txt file are left, so the command
goes on where it was stopped. A choice of lengths ends at the next option: name pictures first.

  krea2 describe photos --length long medium short --write --text-encoder qwen3vl_4b.safetensors
"""
_AGAIN = """\
Options on the command line replace those in the picture. A picture holds names of files and no
folders: they are looked for in this folder, beside the picture, and in --models.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UsageError`s in whole sentences, with suggestions."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(_sentence(message, self))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width, that lists commands without the line of their names in braces."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        if isinstance(action, argparse._SubParsersAction):
            text = text.partition("\n")[2]
        return text


def build_parser() -> Parser:
    parser = Parser(
        prog="krea2",
        usage="krea2 PROMPT [options] | krea2 COMMAND ...",
        description="Krea 2: text to image.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"krea2 {__version__}")
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="COMMAND", prog="krea2"
    )
    for name, summary in SUMMARIES.items():
        described = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=described)
        _OPTIONS[name](command)
        talk = command.add_argument_group("messages")
        talk.add_argument("--quiet", action="store_true", help="no progress and no notes")
        talk.add_argument("--verbose", action="store_true", help="show where an error came from")
    return parser


def command_parser(name: str) -> Parser:
    """The parser of one command."""
    found = build_parser()._subparsers
    assert found is not None
    return next(a for a in found._group_actions if a.choices).choices[name]  # type: ignore


def _generate(parser: Parser) -> None:
    parser.usage = 'krea2 "PROMPT" [options]'
    parser.add_argument("prompt", help="what the picture shows, in whole sentences")
    add_picture_options(parser)
    add_run_options(parser)
    add_dry_run(parser)
    add_machine(parser)


def _render(parser: Parser) -> None:
    parser.usage = "krea2 render FILE [options]"
    parser.epilog = _RENDER
    parser.add_argument(
        "table", type=place, metavar="FILE",
        help="a .txt, .csv or .jsonl file; with --engine ray also .parquet, a folder, an address",
    )  # fmt: skip
    batch = parser.add_argument_group("batch")
    batch.add_argument(
        "--seeds", type=seeds, metavar="LIST", help="a picture of each seed: 7, 1,2,3 or 1-4"
    )
    batch.add_argument(
        "--grid", type=Path, metavar="FILE", help="a sheet of all pictures at the end"
    )
    add_batch_options(batch)
    add_engine_options(parser)
    add_picture_options(parser)
    add_run_options(parser, Path("renders"), "the folder of pictures; default: renders", place)
    add_machine(parser)


def _grid(parser: Parser) -> None:
    parser.usage = 'krea2 grid "PROMPT" --x OPTION=VALUES [--y ...] [--z ...] [options]'
    parser.epilog = _GRID
    parser.add_argument("prompt", nargs="?", help="what the pictures show; left out for prompt=A|B")
    axes = parser.add_argument_group("axes")
    axes.add_argument("--x", metavar="AXIS", help="to the right, such as seed=1,2,3")
    axes.add_argument("--y", metavar="AXIS", help="down, such as steps=4-12:4")
    axes.add_argument("--z", metavar="AXIS", help="a block of the sheet for each value")
    axes.add_argument(
        "--max-cells", type=whole(1, 100_000), default=400, metavar="N",
        help="refuse more cells than this; default: 400",
    )  # fmt: skip
    add_batch_options(axes)
    add_picture_options(parser)
    add_run_options(
        parser, Path("grid.png"), "the sheet, as .png, .jpg or .webp; default: grid.png, or "
        "grid-2.png if it exists",
    )  # fmt: skip
    add_machine(parser)


def _serve(parser: Parser) -> None:
    parser.usage = "krea2 serve [options]"
    parser.epilog = _SERVE
    add_serve_options(parser)
    add_picture_options(parser)
    add_machine(parser)


def _again(parser: Parser) -> None:
    parser.usage = "krea2 again PICTURE [options]"
    parser.epilog = _AGAIN
    parser.add_argument("picture", type=Path, help="a .png, .jpg or .webp made here, or in ComfyUI")
    parser.add_argument("--prompt", metavar="TEXT", help="another prompt")
    add_picture_options(parser)
    add_run_options(parser)
    add_dry_run(parser)
    add_machine(parser)


def _vary(parser: Parser) -> None:
    add_vary_options(parser)
    add_machine(parser)


def _walk(parser: Parser) -> None:
    add_walk_options(parser)
    add_machine(parser)


def _pick(parser: Parser) -> None:
    parser.usage = "krea2 pick FOLDER"
    parser.epilog = (
        "Open the page in a browser, click, and save picks.jsonl beside the pictures: krea2 prefer "
        "reads it.\n"
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="with several pictures of each prompt"
    )


def _merge(parser: Parser) -> None:
    parser.usage = "krea2 merge FILE[:WEIGHT] ... --output FILE [--base FILE]"
    parser.add_argument(
        "files", nargs="+", type=lora, metavar="FILE[:WEIGHT]", help="default weight: 1"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file"
    )
    parser.add_argument(
        "--base", type=Path, metavar="FILE",
        help="add the weighted differences from this model to it; default: the weighted average",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an output that exists")


def _models(parser: Parser) -> None:
    parser.usage = "krea2 models [options]"
    parser.add_argument(
        "--memory", type=number(0, 10_000, above=True, unit=" of GB"), metavar="GB",
        help="of the GPU; default: that of this machine",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER",
        help="ComfyUI's models folder; default: models in COMFYUI_PATH, or ./models",
    )  # fmt: skip
    parser.add_argument(
        "--raw", action="store_true", help="Raw (28 steps, guidance) instead of Turbo (8 steps)"
    )
    parser.add_argument("--fetch", action="store_true", help="download what is missing")
    parser.add_argument("--yes", action="store_true", help="download without asking")


def _expand(parser: Parser) -> None:
    parser.usage = 'krea2 expand "PROMPT" [options]'
    parser.add_argument("prompt")
    _writer_files(parser)
    caption = parser.add_argument_group("caption")
    caption.add_argument(
        "--creativity", type=number(0, 1), default=0.5, metavar="X",
        help="0 (the most likely words) to 1; default: 0.5",
    )  # fmt: skip
    caption.add_argument("--length", choices=LENGTHS, default="medium", help="default: medium")
    caption.add_argument(
        "--seed", type=whole(0, 2**64 - 1), default=0, metavar="N", help="of the first variant"
    )
    caption.add_argument(
        "--variants", type=whole(1, 16), default=1, metavar="N", help="how many, a line each"
    )
    caption.add_argument("--style", default="", help="words for the look")
    caption.add_argument("--language", default="", help="default: the prompt's")
    add_machine(parser)


def _describe(parser: Parser) -> None:
    parser.usage = "krea2 describe PICTURE ... [options]"
    parser.epilog = _DESCRIBE
    parser.add_argument(
        "pictures", nargs="+", type=Path, metavar="PICTURE", help="a picture, or a folder of them"
    )
    _writer_files(parser)
    caption = parser.add_argument_group("captions")
    caption.add_argument(
        "--length", nargs="+", choices=CAPTION_LENGTHS, default=["long"], metavar="LENGTH",
        help="long (about 200 words), medium (90), short (25) or style (the look alone), or "
        "several; default: long",
    )  # fmt: skip
    caption.add_argument(
        "--write", action="store_true", help="into .txt files beside the pictures, for krea2 train"
    )
    caption.add_argument(
        "--force", action="store_true", help="with --write: replace captions that are there"
    )
    caption.add_argument(
        "--creativity", type=number(0, 1), default=0.2, metavar="X",
        help="0 (the most likely words) to 1; default: 0.2",
    )  # fmt: skip
    caption.add_argument(
        "--seed", type=whole(0, 2**64 - 1), default=0, metavar="N", help="of each caption"
    )
    caption.add_argument(
        "--max-side", type=whole(32, 4096), default=1024, metavar="PX",
        help="larger pictures are read at the area of its square; default: 1024",
    )  # fmt: skip
    add_machine(parser)


def _writer_files(parser: Parser) -> None:
    files = parser.add_argument_group("model files")
    files.add_argument("--model", help="a diffusers folder or an all-in-one file")
    files.add_argument(
        "--text-encoder", type=Path, metavar="FILE", help="a Qwen3-VL file or folder"
    )
    files.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="a folder with the Qwen tokenizer"
    )


def _inspect(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file or folder")


def _check(parser: Parser) -> None:
    parser.add_argument(
        "models", nargs="?", type=Path, help="ComfyUI's models folder, to look through its files"
    )


def _convert(parser: Parser) -> None:
    parser.add_argument("source", type=Path, help="a model file or a diffusers folder")
    parser.add_argument("target", type=Path, help="a .safetensors file, or a folder to make")
    parser.add_argument("--part", choices=PARTS, help="only this part; default: all there are")
    parser.add_argument(
        "--quantise", choices=QUANTISATIONS, help="the transformer's blocks in 8 bits"
    )
    parser.add_argument("--force", action="store_true", help="replace a target that exists")


def add_batch_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume", action="store_true", help="skip pictures that an earlier run has made"
    )
    group.add_argument(
        "--strict", action="store_true", help="stop at the first picture with an error"
    )
    group.add_argument(
        "--format", choices=("png", "jpg", "webp"), default="png",
        help="of the single pictures; default: png",
    )  # fmt: skip


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true",
        help="say what a picture takes in tokens, operations and memory, and make none",
    )  # fmt: skip


def add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda, cuda:1, mps or xpu; default: auto, the GPU if there is one",
    )  # fmt: skip
    machine.add_argument(
        "--offload", choices=OFFLOADS, default="auto",
        help="none: all weights stay on the device; parts: text encoder, transformer and VAE take "
        "turns; blocks: what does not fit streams; default: auto, by free memory",
    )  # fmt: skip
    machine.add_argument(
        "--max-memory", type=number(0, above=True, unit=" of GB"), metavar="GB",
        help="of the device; default: all that is free",
    )  # fmt: skip
    machine.add_argument("--dtype", choices=DTYPES, help="default: the files'; fp32 for nano")


_OPTIONS: dict[str, Callable[[Any], None]] = {
    "generate": _generate,
    "render": _render,
    "grid": _grid,
    "serve": _serve,
    "again": _again,
    "vary": _vary,
    "walk": _walk,
    "styles": add_styles_options,
    **{name: partial(add_training_options, name=name) for name in TRAINING},
    "curate": add_curate_options,
    "pick": _pick,
    "merge": _merge,
    "extract": add_extract_options,
    "models": _models,
    "expand": _expand,
    "describe": _describe,
    "inspect": _inspect,
    "check": _check,
    "convert": _convert,
}

_NAMED = re.compile(r"^argument (\S+?)(?:[/ ,]\S+)*: (.*)$", re.DOTALL)
_CHOICE = re.compile(r"^invalid choice: '?(.*?)'? \(choose from (.*)\)$", re.DOTALL)


def _sentence(message: str, parser: argparse.ArgumentParser) -> str:
    """argparse's message as the other errors are: the option, its value, what was expected."""
    named = _NAMED.match(message)
    if named is None:
        if message.startswith("the following arguments are required: "):
            missing = message.rpartition(": ")[2]
            verb = "are" if ", " in missing else "is"
            return f"{missing} {verb} missing. See {parser.prog} --help."
        return f"{message[0].upper()}{message[1:]}. See {parser.prog} --help."
    option, problem = named.groups()
    if choice := _CHOICE.match(problem):
        value, allowed = choice[1], re.sub(r"'", "", choice[2])
        hint = suggestion(value, allowed.split(", "))
        return f"{option} is {value}; expected one of {allowed}.{hint}"
    if problem.startswith("is "):
        return f"{option} {problem}."
    return f"{option}: {problem}. See {parser.prog} --help."
