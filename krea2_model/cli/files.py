"""`krea2 inspect`, `check`, `convert` and `expand`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

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


def expand(args: Namespace) -> Iterator[str]:
    """Captions for a prompt, a line each; what one lacks is said on stderr."""
    import torch

    from .. import nano
    from ..checkpoints.text_encoder import load_text_encoder
    from ..memory.offload import offload_encoder
    from ..memory.plan import ENCODER, NONE, check_offload
    from ..text.expander import PromptExpander

    path = args.text_encoder or (nano.text_encoder_file() if args.model in NANO else args.model)
    if path is None:
        raise UsageError("Name the weights: --model or --text-encoder.")
    console = Console(args.quiet)
    device, offload = check_offload(args.device, args.offload, args.max_memory)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    with console.stage("loading the text encoder"):
        encoder = load_text_encoder(
            path,
            device=device if offload == NONE else "cpu",
            dtype=dtypes.get(args.dtype),
            tokenizer=args.tokenizer,
            keep_quantised=True,
        )
        expander = PromptExpander(encoder)
    places = offload_encoder(encoder, device, offload, args.max_memory)
    with places.use(ENCODER, expander.tail), console.bar(None, "writing", unit="token") as bar:
        expansions = expander(
            args.prompt,
            lambda text: bar.update(),
            creativity=args.creativity,
            length=args.length,
            seed=args.seed,
            variants=args.variants,
            style=args.style,
            language=args.language,
        )
    for expansion in expansions:
        if note := expansion.note():
            console.note(note)
        yield expansion.text
