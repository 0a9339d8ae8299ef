"""`krea2 inspect`, `check`, `convert` and `extract`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from ..checks import counted
from .choices import NANO
from .errors import UsageError
from .progress import Console


def inspect(args: Namespace) -> Iterator[str]:
    """A description of each file, also of those after one that cannot be read."""
    from ..tools.describe import describe

    errors: list[ValueError] = []
    for path in args.files:
        try:
            yield describe(path)
        except ValueError as error:
            if len(args.files) == 1:
                raise
            errors.append(error)
            yield f"{path}: {error}"
    if errors:
        raise UsageError(f"{len(errors)} of {counted(len(args.files), 'file')} cannot be read.")


def check(args: Namespace) -> Iterator[str]:
    from ..tools.self_check import check

    yield str(check(args.models))


def convert(args: Namespace) -> Iterator[Path]:
    from ..tools.convert import convert

    console, target = Console(args.quiet), args.target
    if target.suffix and target.exists() and not args.force and not _is_same(args.source, target):
        raise UsageError(f"The target {target} exists; choose another name, or add --force.")
    with ExitStack() as stack:
        bars: list[tqdm] = []

        def progress(written: int, total: int) -> None:
            if not bars or bars[-1].n >= bars[-1].total:
                options = {"unit": "B", "unit_scale": True, "unit_divisor": 1000}
                bars.append(stack.enter_context(console.bar(total, target.name, **options)))
            bars[-1].update(written - bars[-1].n)

        yield from convert(args.source, target, args.quantise, args.part, progress)


def extract(args: Namespace) -> Iterator[Path]:
    if args.output.exists() and not args.force:
        raise UsageError(f"The output {args.output} exists; choose another name, or add --force.")
    from ..tools.extract import extract_lora

    console = Console(args.quiet)
    with console.bar(None, args.output.name, unit=" weights") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = extract_lora(
            _transformer(args.fine_tune),
            _transformer(args.base),
            args.output,
            rank=args.rank,
            keep=args.keep,
            targets=args.targets,
            key_style=args.key_style,
            differences=args.with_differences,
            dtype=args.dtype,
            device=args.device,
            progress=progress,
        )
    hint = "" if found.differences or not found.vectors else " (--with-differences stores them)"
    console.note(f"{found}{hint}.")
    yield found.path


def _transformer(name: str) -> Path:
    """The file that a word of the command line names."""
    from .. import nano

    return nano.TRANSFORMERS[NANO[name]] if name in NANO else Path(name)


def _is_same(source: Path, target: Path) -> bool:
    """True for one file twice, of which `convert` says so."""
    return source.exists() and source.samefile(target)
