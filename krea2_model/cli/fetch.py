"""Downloads with huggingface_hub: the one place of this package that reaches the network.

`krea2 models --fetch` imports it, and nothing else does.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..catalogue import ModelFile
from .errors import Failure

_ADDRESS = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/resolve/main/([\w./-]+)")


def fetch(files: Sequence[ModelFile], models: Path) -> Iterator[Path]:
    """Download files into ComfyUI's models folder; yields each that is complete.

    What an earlier try has downloaded is not downloaded again. Raises Failure where there is not
    enough room on the disk for all of them, and where a download fails.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise Failure("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it and run again.")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    places: list[tuple[ModelFile, str, str]] = []
    for file in files:
        address = _ADDRESS.fullmatch(file.url)
        assert address is not None, file.url
        places.append((file, address[1], address[2]))
    sizes = []
    for file, repository, name in places:
        try:
            sizes.append(get_hf_file_metadata(hf_hub_url(repository, name)).size or 0)
        except Exception as error:
            raise _failure(file, error) from error
    check_room(models, sum(sizes))
    for (file, repository, name), size in zip(places, sizes, strict=True):
        try:
            path = Path(hf_hub_download(repository, name, local_dir=models))
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise _failure(file, error) from error
        if size and path.stat().st_size != size:
            raise Failure(
                f"{path} has {path.stat().st_size:,} bytes instead of {size:,}; run again."
            )
        yield path


def check_room(folder: Path, needed: int) -> None:
    """Raise Failure where the disk of a folder has less room than `needed` bytes."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Failure(
            f"The files have {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; make "
            "room, or name another place with --models."
        )


def _failure(file: ModelFile, error: Exception) -> Failure:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return Failure(
        f"{file.name} could not be downloaded ({reason}). Run again to go on where it stopped, or "
        f"download {file.url} into {file.folder}."
    )
