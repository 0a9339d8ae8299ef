"""`--regions`: a JSON file, or the JSON itself, which pictures keep; see `region_list`."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .model_files import KEYS, find_file, find_lora, models_folder, name_in_models

if TYPE_CHECKING:
    from ..features.regions import Regions

# Rows and columns of tokens of a large image, for checks where the size is not known yet.
_LARGE = (256, 256)


def regions_of(args: Namespace) -> Regions | None:
    """The regions that `args` ask for, None without any.

    Raises UsageError, CheckpointError or ValueError for what is wrong with them or their files.
    """
    if args.regions is None:
        return None
    # Imported here, since they import torch.
    from ..features.region_list import read_regions
    from ..features.regions import Regions
    from ..features.style_mixing import escaped
    from ..pipeline.styled_call import with_texts

    entries, options = read_regions(_text_of(args))
    regions = Regions.read([_with_paths(entry, args) for entry in entries], **options)
    if getattr(args, "escape_regions", False):  # see `styled`
        regions = with_texts(regions, escaped)
    grid = _LARGE
    if args.width is not None and args.height is not None:
        grid = (-(-args.height // 16), -(-args.width // 16))
    if grid != _LARGE or all(region.mask is None for region in regions.regions):
        regions.shapes.shares(*grid)
    return regions


def regions_to_keep(args: Namespace) -> Any:
    """The regions as a picture keeps them: with names of files in place of paths."""
    found = json.loads(_text_of(args))
    for entry, key, place in file_names(found):
        keys = KEYS["lora"] if key == "loras" else ()
        entry[place] = name_in_models(entry[place], keys)
    return found


def file_names(found: Any) -> Iterator[tuple[Any, str, Any]]:
    """Of each file that regions name: its container, the region's key, and the key of its name."""
    entries = found.get("regions") if isinstance(found, dict) else found
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        if "mask" in entry:
            yield entry, "mask", "mask"
        images, loras = entry.get("images"), entry.get("loras")
        for number, _ in enumerate(images if isinstance(images, list) else ()):
            yield images, "images", number
        for pair in loras if isinstance(loras, list) else ():
            if isinstance(pair, list) and pair:
                yield pair, "loras", 0


def _text_of(args: Namespace) -> str:
    value = str(args.regions)
    if value.lstrip().startswith(("[", "{")):
        return value
    path = _file_of(args)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"--regions is {path}, which cannot be read: {reason}.") from error


def _file_of(args: Namespace) -> Path:
    path = Path(str(args.regions))
    if not path.is_file():
        raise UsageError(
            f"--regions is {path}, which is not there; expected a JSON file, or a list as JSON "
            'such as [{"prompt": "a red fox", "box": [0, 0, 0.5, 1]}].'
        )
    return path


def _with_paths(entry: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """Arguments of a region with the paths of its files."""
    beside = list(getattr(args, "beside", ()))
    if not str(args.regions).lstrip().startswith(("[", "{")):
        beside.insert(0, _file_of(args).parent)

    def picture(name: str) -> Path:
        return find_file("regions", name, None, beside)

    found = dict(entry)
    if "mask" in entry:
        found["mask"] = picture(entry["mask"])
    if "images" in entry:
        found["images"] = [picture(name) for name in entry["images"]]
    if "loras" in entry:
        models = models_folder(args.models)
        loras = entry["loras"]
        found["loras"] = [(find_lora(name, models, beside), scale) for name, scale in loras]
    return found
