"""The training commands, `krea2 curate`, `krea2 pick` and `krea2 merge`."""

from __future__ import annotations

import logging
import re
import signal
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .curate_options import limits_of
from .errors import Failure, UsageError
from .progress import Console
from .rendering import reading
from .train_options import TRAINING, option_of, settings_of


def train(args: Namespace) -> Iterator[object]:
    """Run a training command as a file of settings and the options say; gives the result's file.

    The first Ctrl+C ends the run after its step, with its state saved; a second one at once.
    """
    from krea2_training.config import KINDS, read_config
    from krea2_training.engine.loop import TrainingStopped

    settings = settings_of(args)
    is_file = args.source.suffix.lower() == ".toml"
    if not is_file:
        settings[TRAINING[args.command].source] = args.source
    words = partial(_in_options, args.command, settings if is_file else None)
    with _explained(words):
        config = read_config(args.source if is_file else None, settings, KINDS[args.command])

    from krea2_training.commands import run_command
    from krea2_training.engine.world import OtherProcess, is_first
    from krea2_training.forecast import forecast

    if args.dry_run:
        if is_first():
            with _explained(words):
                told = forecast(config)
            yield told
        return
    if not is_first():
        logging.disable(logging.INFO)
    console = Console(args.quiet or not is_first())
    with console.bar(config.training.steps, "Training", unit="step") as bar, _stopping() as stop:

        def on_step(step: int, record: dict[str, Any]) -> None:
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            bar.update(step - bar.n)
            if stop:
                raise KeyboardInterrupt

        try:
            with _explained(words):
                path = run_command(config, on_step, quiet=args.quiet)
        except (TrainingStopped, OtherProcess) as error:
            raise Failure(words(str(error))) from error
        if is_first():
            yield path


def curate(args: Namespace) -> Iterator[object]:
    """Find what of a folder is no good for training; gives the files that say so."""
    from concurrent.futures.process import BrokenProcessPool

    from krea2_training.curate import curate
    from krea2_training.curate.limits import Limits
    from krea2_training.curate.workers import each as each_plainly

    limits = limits_of(args)
    if sides := limits.get("resolution"):
        limits["resolution"] = tuple(sides)
    console = Console(args.quiet)
    with reading(args, each_plainly) as each, console.bar(None, "Reading", unit=" pictures") as bar:

        def on_picture(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            curated = curate(
                args.folder,
                Limits(**limits),
                table=args.table,
                sheet=args.sheet,
                listing=args.list,
                each=partial(each, workers=args.workers),
                on_picture=on_picture,
            )
        except BrokenProcessPool as error:
            raise Failure(
                "A process that read pictures was ended, perhaps since memory ran out. What was "
                "read is kept: go on with fewer, --workers 1."
            ) from error
    console.note(curated.summary())
    yield from curated.files


def pick(args: Namespace) -> Iterator[object]:
    """Write a page on which to pick the better pictures; gives its file."""
    from krea2_training.pick import write_page

    yield write_page(args.folder)


def merge(args: Namespace) -> Iterator[object]:
    """Merge files by weights, or their differences from a base; gives the file of the result."""
    if args.output.exists() and not args.force:
        raise UsageError(f"The output {args.output} exists; choose another name, or add --force.")
    from krea2_training.weights.merge import merge

    models = [(Path(name), weight) for name, weight in args.files]
    with Console(args.quiet).bar(None, args.output.name, unit="B", unit_scale=True) as bar:

        def progress(written: int, total: int) -> None:
            bar.total = total
            bar.update(written - bar.n)

        yield merge(models, args.output, args.base, progress)


@contextmanager
def _stopping() -> Iterator[list[bool]]:
    """A list that is filled by the first Ctrl+C; the second one interrupts.

    SIGTERM fills it too: torchrun passes Ctrl+C on so, beside the terminal's own signal.
    """
    pressed: list[bool] = []

    def press(number: int, frame: Any) -> None:
        if pressed and number == signal.SIGINT:
            raise KeyboardInterrupt
        pressed.append(True)

    previous = {kind: signal.signal(kind, press) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


@contextmanager
def _explained(words: Callable[[str], str]) -> Iterator[None]:
    """Errors of settings in the words of the command line."""
    try:
        yield
    except ValueError as error:
        raise UsageError(words(str(error))) from error


def _in_options(command: str, typed: Collection[str] | None, message: str) -> str:
    """A message with options in place of the settings that they set.

    typed: settings that options gave beside a file of others; None where there is no file.
    """

    def option(match: re.Match) -> str:
        name = match[0]
        if typed is not None and name not in typed:
            return name
        return option_of(command, name) or name

    return re.sub(r"\b[a-z]+\.[a-z_]+\b", option, message)
