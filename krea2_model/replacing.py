"""Files that are written whole or not at all: an old file stays until the new one is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; its file takes the place of `path` if all goes well.

    A full disk, an error or a cancel leaves the old file as it was, and no partial one. The new
    file has the rights of the old one; where `path` is a link, the file that it leads to is
    replaced.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except OSError as error:
        # A full disk's error names no file.
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
