"""`krea2 models`: the files to get for this machine, where they go, and which are there."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..catalogue import RAW, TURBO, ModelFile, card_for, files_for, files_in
from .errors import UsageError, goes_with
from .model_files import models_folder


def models(args: Namespace) -> Iterator[str]:
    """Lines on the files for a card, and with --fetch their downloads."""
    if args.yes and not args.fetch:
        raise goes_with("--yes", "--fetch")
    folder = args.models or models_folder(None) or Path("models")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--models is {folder}, which is a file; expected a folder.")
    if args.models is not None and not folder.exists() and not args.fetch:
        raise UsageError(
            f"--models is {folder}, which does not exist; expected ComfyUI's models folder. "
            "With --fetch it is made."
        )
    memory, machine = (args.memory, "") if args.memory is not None else _memory()
    variant = RAW if args.raw else TURBO
    choices = files_for(card_for(memory), variant)
    if machine:
        yield machine
    yield f"Files of {variant.title()} for {memory:.0f} GB, in ComfyUI's models folder {folder}"
    for part, files in choices.items():
        there = files_in(folder, part, variant)
        yield ""
        yield f"{part.replace('_', ' ')}{', one of these' if len(files) > 1 and not there else ''}"
        for path in there:
            yield f"  there  {path.relative_to(folder)}"
        for file in files if not there else ():
            yield from _lines(file)
    missing = {p: files for p, files in choices.items() if not files_in(folder, p, variant)}
    yield ""
    if missing and args.fetch:
        yield from _fetch(args, missing, folder)
    elif missing:
        yield f"To download what is missing: krea2 models --fetch{_same(args)}"
        return
    yield from _ready({part: files_in(folder, part, variant) for part in choices})


def _lines(file: ModelFile) -> Iterator[str]:
    facts = ", ".join(fact for fact in (file.size, file.note) if fact)
    name = f"a file of {file.name}" if file.is_page else file.name
    yield f"  get    {file.folder}/{name}{f', {facts}' if facts else ''}"
    yield f"         {file.url}"


def _fetch(
    args: Namespace, missing: Mapping[str, Sequence[ModelFile]], folder: Path
) -> Iterator[str]:
    direct = [next((f for f in files if not f.is_page), None) for files in missing.values()]
    files = [file for file in direct if file is not None and not file.note]
    if not files:
        return
    names = ", ".join(f"{file.name} ({file.size or 'size unknown'})" for file in files)
    if not args.yes:
        if not sys.stdin.isatty():
            raise UsageError("--fetch downloads gigabytes and nobody can be asked; add --yes.")
        sys.stderr.write(f"Download {names} into {folder}? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            yield "Nothing was downloaded."
            return
    from .fetch import fetch

    for path in fetch(files, folder):
        yield str(path)


def _ready(there: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    """The command line that uses what is there, or what is still to be done by hand."""
    if lacking := [part.replace("_", " ") for part, files in there.items() if not files]:
        yield f"Still to be downloaded by hand, from the addresses above: {' and '.join(lacking)}"
        return
    from ..text.tokenizer import find_tokenizer_folder

    try:
        find_tokenizer_folder()
    except FileNotFoundError as error:
        yield f"One thing is missing. {error}"
    options = " ".join(f"--{part.replace('_', '-')} {files[0]}" for part, files in there.items())
    yield f'To make a picture: krea2 "a fox in the snow" {options}'


def _same(args: Namespace) -> str:
    """The options that the line was typed with, for the next one."""
    words = [f" --memory {args.memory:g}"] if args.memory is not None else []
    words += [f" --models {args.models}"] if args.models is not None else []
    words += [" --raw"] if args.raw else []
    return "".join(words)


def _memory() -> tuple[float, str]:
    """GB of this machine's accelerator, or of main memory where there is none; and a line on it."""
    import torch

    from ..devices import find_device

    device = find_device("auto")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory / 2**30, properties.name
    total = getattr(getattr(torch, device.type, None), "recommended_max_memory", None)
    if device.type == "mps" and total is not None:
        return total() / 2**30, "Apple GPU"
    return _main_memory() / 2**30, "no GPU: main memory is used"


def _main_memory() -> float:
    from ..tools.self_check import main_memory

    size = main_memory()
    if not size:
        raise UsageError(
            "The size of the memory is not known without the package psutil; say it: --memory 16."
        )
    return size
