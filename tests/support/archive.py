"""The archive that the registry hands out: tracked files without those of .comfyignore."""

import os
import shutil
from pathlib import Path

from pathspec import GitIgnoreSpec

ROOT = Path(__file__).resolve().parents[2]


def archive_files() -> list[str]:
    """Names relative to the root, with `/`, sorted."""
    ignored = GitIgnoreSpec.from_lines([".git", *_lines(".gitignore"), *_lines(".comfyignore")])
    names = []
    for folder, folders, files in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        # Not looked into: .local has an environment, and a link back to here.
        folders[:] = [f for f in folders if not ignored.match_file(f"{(inside / f).as_posix()}/")]
        names += [(inside / file).as_posix() for file in files]
    return sorted(name for name in names if not ignored.match_file(name))


def copy_archive(target: Path) -> Path:
    """Lay the archive's files out in a folder, as an installation would."""
    for name in archive_files():
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, file)
    return target


def _lines(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()
