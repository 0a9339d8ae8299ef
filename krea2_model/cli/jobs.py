"""The pictures of a table's rows: their options, checks, identity and errors."""

from __future__ import annotations

import errno
import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from .errors import UsageError, explain
from .picture_options import FILES, PICTURES
from .settings import settings_of


def pictures_of_row(args: Namespace) -> Iterator[Namespace]:
    """The options of each picture of a row: each of --seeds, or --images from --seed on."""
    # Imported here: with it comes torch.
    from .generate import pictures_of

    if args.seeds is None:
        yield from pictures_of(args)
        return
    for seed in args.seeds:
        one = copy(args)
        one.seed, one.images = seed, 1
        yield from pictures_of(one)


def check_row(args: Namespace, checked: set[str]) -> None:
    """Check the options and files of a row's pictures; what `checked` holds is checked already."""
    from .checks import check_picture

    for one in pictures_of_row(args):
        key = digest_of(settings_of(one, seed=0), one)
        if key not in checked:
            check_picture(one)
            checked.add(key)


def check_name(name: Path) -> None:
    """Refuse the name of a picture that leads out of the folder of --output."""
    if name.is_absolute() or ".." in name.parts:
        raise UsageError(f"output is {name}; expected a name in the folder of --output.")


def key_of(args: Namespace) -> str:
    """A digest of all that decides a picture, whatever its row and name are."""
    return digest_of(settings_of(args), args)


def digest_of(settings: Mapping[str, Any], args: Namespace) -> str:
    """A digest of settings as `settings_of` gives them, and of the folders of input files."""
    text = json.dumps(settings)
    # Settings hold names without folders, and many folders may have a 0001.png, or a LoRA of one
    # name for each step of a training.
    names = (*PICTURES, *FILES)
    if files := [str(getattr(args, name)) for name in names if getattr(args, name)]:
        text += json.dumps(files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def message_of(error: BaseException, args: Namespace) -> str:
    """An error in the words of the command line."""
    explained = explain(error, vars(args))
    return explained[0] if explained else f"{type(error).__name__}: {error}"


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
