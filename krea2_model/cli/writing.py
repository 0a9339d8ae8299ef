"""`krea2 expand` and `krea2 describe`: text by the text encoder's language model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..checks import counted
from .choices import NANO
from .errors import UsageError, goes_with
from .progress import Console

if TYPE_CHECKING:
    from ..memory.offload import Offload
    from ..text.encoder import Qwen3VLTextEncoder

Writer = TypeVar("Writer")


def expand(args: Namespace) -> Iterator[str]:
    """Captions for a prompt, a line each; what one lacks is said on stderr."""
    from ..memory.plan import ENCODER
    from ..text.expander import PromptExpander

    console = Console(args.quiet)
    expander, places = _load(args, console, PromptExpander)
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


def describe(args: Namespace) -> Iterator[object]:
    """Captions of pictures, a line each, or the text files that they are written to.

    A picture that cannot be read is named, and the others go on.
    """
    if args.force and not args.write:
        raise goes_with("--force", "--write")
    files = _pictures(args.pictures)
    targets: dict[Path, Path] = {}
    console = Console(args.quiet)
    if args.write:
        targets = _caption_files(files)
        if not args.force:
            files = [file for file in files if not targets[file].exists()]
        if there := len(targets) - len(files):
            console.note(
                f"{there} of {counted(len(targets), 'picture')} with a caption, which is left."
            )
        if not files:
            return
    from ..images.pictures import pixels_of
    from ..memory.plan import ENCODER
    from ..replacing import replacing
    from ..text.describer import Describer

    describer, places = _load(args, console, Describer)
    errors: list[ValueError] = []
    options = {"creativity": args.creativity, "seed": args.seed, "max_side": args.max_side}
    with (
        places.use(ENCODER, *describer.parts),
        console.bar(len(files), "describing", unit=" pictures") as bar,
    ):
        for file in files:
            try:
                pixels = pixels_of(file, "the picture")
            except ValueError as error:
                if len(files) == 1:
                    raise
                errors.append(error)
                console.note(str(error))
                bar.update()
                continue
            captions = describer(pixels, args.length, lambda text: bar.refresh(), **options)
            bar.update()
            if args.write:
                with replacing(targets[file]) as partial:
                    partial.write_text("\n---\n".join(captions) + "\n", encoding="utf-8")
                yield targets[file]
            else:
                yield from captions
    if errors:
        raise UsageError(f"{len(errors)} of {counted(len(files), 'picture')} cannot be read.")


def _pictures(paths: Sequence[Path]) -> list[Path]:
    """Pictures that are named, and those in folders that are."""
    from ..images.picture_files import COMPANION, PICTURES, pictures_in

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            # Masks and references of a training picture need no caption.
            files += [file for file in pictures_in(path) if not COMPANION.search(file.stem)]
        elif not path.is_file():
            raise UsageError(f"{path} is not there; expected a picture, or a folder of pictures.")
        elif path.suffix.lower() not in PICTURES:
            raise UsageError(f"{path} is no picture; expected {', '.join(sorted(PICTURES))}.")
        else:
            files.append(path)
    if not files:
        named = ", ".join(map(str, paths))
        raise UsageError(
            f"There are no pictures in {named}; expected {', '.join(sorted(PICTURES))}."
        )
    return list(dict.fromkeys(files))


def _caption_files(files: Sequence[Path]) -> dict[Path, Path]:
    """The file of each picture's caption. Raises UsageError where two would have one."""
    targets = {file: file.with_suffix(".txt") for file in files}
    owners: dict[Path, Path] = {}
    for file, target in targets.items():
        other = owners.setdefault(target, file)
        if other != file:
            raise UsageError(
                f"{other} and {file} would have one caption file, {target.name}. Rename one."
            )
    return targets


def _load(
    args: Namespace, console: Console, make: Callable[[Qwen3VLTextEncoder], Writer]
) -> tuple[Writer, Offload]:
    """A writer with the text encoder that the options name, and the place of its weights."""
    import torch

    from .. import nano
    from ..checkpoints.text_encoder import load_text_encoder
    from ..memory.offload import offload_encoder
    from ..memory.plan import NONE, check_offload

    path = args.text_encoder or (nano.text_encoder_file() if args.model in NANO else args.model)
    if path is None:
        raise UsageError("Name the weights: --model or --text-encoder.")
    device, offload = check_offload(args.device, args.offload, args.max_memory)
    dtypes: dict[Any, torch.dtype] = {
        "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
    }  # fmt: skip
    with console.stage("loading the text encoder"):
        encoder = load_text_encoder(
            path,
            device=device if offload == NONE else "cpu",
            dtype=dtypes.get(args.dtype),
            tokenizer=args.tokenizer,
            keep_quantised=True,
        )
        writer = make(encoder)
    return writer, offload_encoder(encoder, device, offload, args.max_memory)
