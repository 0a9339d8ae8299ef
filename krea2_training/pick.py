"""A page on which the better pictures of each prompt are picked, for `krea2 prefer`."""

from __future__ import annotations

import json
from pathlib import Path

from krea2_model.checks import counted
from krea2_model.images.picture_files import pictures_in
from krea2_model.replacing import replacing

from .data.pairs import prompt_in

PAGE = "pick.html"


def write_page(folder: Path) -> Path:
    """Write the page of a folder's pictures beside them, grouped by prompt; returns its file.

    The prompt is that of the settings in each picture. Raises ValueError where no prompt has two
    pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one of pictures that krea2 has made.")
    groups: dict[str, list[str]] = {}
    files = pictures_in(folder)
    for file in files:
        prompt = prompt_in(file)
        if prompt is not None:
            groups.setdefault(prompt, []).append(file.relative_to(folder).as_posix())
    several = [{"prompt": p, "files": own} for p, own in groups.items() if len(own) > 1]
    if not several:
        raise ValueError(
            f"{folder} has no two pictures of one prompt ({counted(len(files), 'picture')}, "
            f"{counted(len(groups), 'prompt')} in them). Make several of each: krea2 render "
            "prompts.txt --images 4."
        )
    text = Path(__file__).with_name(PAGE).read_text(encoding="utf-8")
    # "<" would end the script element.
    data = json.dumps(several, ensure_ascii=False).replace("<", "\\u003c")
    page = folder / PAGE
    with replacing(page) as partial:
        partial.write_text(text.replace("GROUPS", data, 1), encoding="utf-8")
    return page
