"""`krea2 styles`: what is in the library of styles, and new ones for it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from ..features.style_library import SavedStyle, StyleLibrary
from ..features.style_mixing import MixedStyle
from .errors import UsageError, goes_with
from .model_files import KEYS, name_in_models
from .progress import Console

# Options of save alone: their names in `args`, and as they are typed.
_OF_SAVE = {
    name: f"--{name}" for name in ("words", "negative", "reference", "lora", "style", "force")
} | {"source": "--from"}


def styles(args: Namespace) -> Iterator[object]:
    """Lines of a list, of one style, or the folder of the one that was saved."""
    library = StyleLibrary(args.style_folder)
    if args.action != "save":
        for name, option in _OF_SAVE.items():
            if getattr(args, name) not in (None, "", [], False):
                raise goes_with(option, "krea2 styles save NAME")
    if args.action == "list":
        library.names()  # says what is wrong with the folder
        if args.name is not None:
            raise UsageError(f"{args.name} is too much; krea2 styles show {args.name} shows it.")
        found, problems = library.styles()
        for problem in problems:
            Console(args.quiet).note(problem)
        width = max(len(style.name) for style in found)
        for style in found:
            own = "" if style.is_built_in else " (yours)"
            yield f"{style.name:{width}}  {style.summary()}{own}"
        return
    if args.name is None:
        raise UsageError(f"NAME is missing; expected krea2 styles {args.action} NAME.")
    if args.action == "show":
        style = library.get(args.name)
        yield style.name
        yield from style.summary().split("; ")
        yield style.folder
    else:
        yield _save(args, library).folder


def _save(args: Namespace, library: StyleLibrary) -> SavedStyle:
    pictures = [(Path(file), weight) for file, weight in args.reference]
    loras = [(name_in_models(file, KEYS["lora"]), scale) for file, scale in args.lora]
    if args.source is not None:
        _check_picture(args.source, "--from")
        loras = loras or _loras_in(args.source)
        if not (args.words or args.negative or pictures or loras or args.style):
            pictures = [(args.source, 1.0)]
    for path, _ in pictures:
        _check_picture(path, "--reference")
    own: tuple[tuple[SavedStyle, float], ...] = ()
    if args.words or args.negative or pictures or loras or not args.style:
        own = ((_style_of(args, pictures, loras), 1.0),)
    mixed = MixedStyle((*MixedStyle.of(args.style, library).styles, *own) if args.style else own)
    style = mixed.as_one(args.name)
    files = [path for path, _ in mixed.pictures()]
    return library.save(style, files, args.source, args.force)


def _style_of(args: Namespace, pictures: list, loras: list) -> SavedStyle:
    paths = tuple((str(path.absolute()), weight) for path, weight in pictures)
    return SavedStyle(args.name, args.words, args.negative, paths, loras=tuple(loras))


def _loras_in(picture: Path) -> list[tuple[str, float]]:
    """The LoRAs in the settings of a picture; none where it has no settings."""
    from .kept import kept_in

    try:
        found = kept_in(picture).settings
    except UsageError:
        return []
    return [(str(name), float(scale)) for name, scale in found.get("lora", ())]


def _check_picture(path: Path, option: str) -> None:
    from ..images.pictures import pixels_of

    pixels_of(path, option)
