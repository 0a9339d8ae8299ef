"""`krea2 inspect`, `check` and `convert`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

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
        raise UsageError(f"{len(errors)} of {len(args.files)} files cannot be read.")


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


def _is_same(source: Path, target: Path) -> bool:
    """True for one file twice, of which `convert` says so."""
    return source.exists() and source.samefile(target)
