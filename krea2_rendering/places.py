"""Folders and files on this machine or at addresses of fsspec: s3://, gs://, abfs://, file://."""

from __future__ import annotations

import posixpath
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from krea2_model.cli.errors import UsageError
from krea2_model.replacing import replacing


def is_address(name: str | Path) -> bool:
    return "://" in str(name)


class Place:
    """A folder, or a file, and the files below it.

    Raises UsageError for an address whose file system is not known or not installed.
    """

    def __init__(self, address: str | Path):
        self.address = str(address)
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{self.address} cannot be reached: {error}.") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers may have other working folders.
        return Place, (self._root if self.is_local else self.address,)

    def __str__(self) -> str:
        return self.address

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    def path(self, name: str = "") -> str:
        return posixpath.join(self._root, name) if name else self._root

    def local_path(self, name: str = "") -> Path:
        return Path(self.path(name))

    def is_folder(self) -> bool:
        return self._fs.isdir(self._root)

    def exists(self, name: str = "") -> bool:
        return self._fs.exists(self.path(name))

    def open(self, name: str = "") -> BinaryIO:
        return self._fs.open(self.path(name), "rb")

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; an object store does so by itself."""
        if not self.is_local:
            self._fs.pipe_file(self.path(name), data)
            return
        path = self.local_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(data)

    def remove(self, name: str) -> None:
        self._fs.rm_file(self.path(name))

    def names(self) -> Iterator[str]:
        """Names of all files below, with their folders."""
        if not self._fs.exists(self._root):
            return
        for path in self._fs.find(self._root):
            yield path[len(self._root) :].lstrip("/")

    def top_names(self) -> list[str]:
        """Names of the files that are in the folder itself."""
        if not self.is_folder():
            return []
        found = self._fs.ls(self._root, detail=True)
        return [posixpath.basename(f["name"]) for f in found if f["type"] == "file"]

    def check_writable(self) -> None:
        """Raise UsageError where no file can be written."""
        name = f".{secrets.token_hex(8)}.part"
        try:
            self.write(name, b"krea2")
            self.remove(name)
        except Exception as error:  # every file system has its own
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UsageError(
                f"Nothing can be written to {self.address} ({reason}); expected a folder, or an "
                "address with the rights to write. Choose another --output."
            ) from error


def check_room(place: Place, expected: int) -> str | None:
    """A note where a local disk has less room than `expected` bytes; None where it has more."""
    if not place.is_local:
        return None
    folder = place.local_path()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= expected:
        return None
    return f"{folder} has {free / 1e9:.1f} GB free, and the pictures take about " + (
        f"{expected / 1e9:.1f} GB"
    )
