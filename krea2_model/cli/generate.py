"""`krea2 generate` and `krea2 again`: pictures of one prompt, each saved as it is made."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from PIL import Image

from ..images.output_files import numbered, save_image
from ..text.wildcards import fill_in
from .checks import check_folders, check_machine, check_output, check_picture
from .errors import UsageError
from .graph import graph_of, not_in_graph
from .kept import settings_in
from .model_files import take_from_models
from .progress import Console
from .settings import as_json, check_names, options_of, parameters_text, settings_of


def generate(args: Namespace) -> Iterator[Path | str]:
    """Make the pictures that `args` ask for; yields each file as it is written.

    With --dry-run it yields what a picture would take, and makes none.
    """
    console = Console(args.quiet)
    take_from_models(args)
    check_output(args)
    check_folders(args, [args])
    check_picture(args)
    weights = check_machine(args)
    from .painter import Painter

    painter = Painter(args, weights, console)
    if args.dry_run:
        yield str(painter.forecast(next(pictures_of(args))))
        return
    taken: set[Path] = set()
    for one in pictures_of(args):
        picture = painter.paint(one, args.output.name)
        yield save(picture.image, one, picture.results, args.output, taken, console)


def pictures_of(args: Namespace) -> Iterator[Namespace]:
    """The options of each picture: one seed after the other, wildcards drawn by it."""
    for number in range(args.images):
        one = copy(args)
        one.seed = (args.seed + number) % 2**64
        yield drawn(one)


def drawn(args: Namespace) -> Namespace:
    """The options of a picture, with wildcards of its prompts drawn by its seed."""
    if args.wildcards:
        args.prompt = fill_in(args.prompt, args.seed, args.wildcard_folder)
        if args.blend is not None:
            args.blend = fill_in(args.blend, args.seed, args.wildcard_folder)
    return args


def save(
    image: Image.Image,
    args: Namespace,
    results: dict[str, Any],
    output: Path,
    taken: set[Path],
    console: Console,
) -> Path:
    """Write a picture under the first free name, or with --force under the first of this run."""
    texts = texts_of(settings_of(args, **results), console) if args.metadata else {}
    names = numbered(output, len(taken) + 1, args.force)
    path = next(name for name in names if name not in taken)
    path.parent.mkdir(parents=True, exist_ok=True)
    left_out = save_image(image, path, texts)
    if left_out:
        names_left = " and ".join(left_out)
        console.note(f"note: {path.name} holds no {names_left}; a .png file takes all of them")
    taken.add(path)
    return path


def texts_of(settings: dict[str, Any], console: Console) -> dict[str, str]:
    """The texts that a picture keeps: our settings, the usual parameters, ComfyUI's graph."""
    texts = {"krea2": as_json(settings), "parameters": parameters_text(settings)}
    if options := not_in_graph(settings):
        console.note(
            f"note: no ComfyUI graph in the picture: it cannot express {', '.join(options)}"
        )
    else:
        texts["prompt"] = json.dumps(graph_of(settings))
    return texts


def again(args: Namespace, typed: list[str]) -> Iterator[Path | str]:
    """Make a picture again by the settings in its file; `typed` options replace them."""
    settings = settings_in(args.picture)
    check_names({n: v for n, v in settings.items() if n not in named_options(typed)}, args.picture)
    yield from generate(merged(settings, typed, args))


def merged(
    settings: dict[str, Any], typed: list[str], args: Namespace, command: str = "again"
) -> Namespace:
    """Options of generate: those of a picture, and over them what was typed.

    command: whose words were typed.
    """
    from .parser import command_parser

    parser = command_parser("generate")
    prompt = args.prompt if args.prompt is not None else settings.get("prompt", "")
    named = named_options(typed, command)
    held = {name: value for name, value in settings.items() if name not in named}
    if named & {"transformer", "model"}:
        # Another model brings its own steps and guidance, and its own parts.
        for name in ("model", "transformer", "steps", "guidance"):
            held.pop(name, None)
    try:
        from_picture = parser.parse_args([*options_of(held), "--", str(prompt)])
    except (ValueError, TypeError) as error:
        raise UsageError(f"The settings in {args.picture} are wrong: {error}") from error
    result = copy(args)
    for name, value in vars(from_picture).items():
        if name not in named and (name in held or not hasattr(result, name)):
            setattr(result, name, value)
    result.prompt = str(prompt)
    # The prompt in the file is drawn already.
    result.wildcards = args.wildcards and args.prompt is not None
    result.beside = (args.picture.parent,)
    result.is_again = True
    return result


def named_options(typed: list[str], command: str = "again") -> set[str]:
    """Names of the options of a command that were typed."""
    from .parser import command_parser

    parser = command_parser(command)
    for action in parser._actions:
        action.default = None
    blank = vars(parser.parse_args(typed))
    return {name for name, value in blank.items() if value is not None}
