"""Folders of a training node: pictures in ComfyUI's input folder, results in its output folder."""

import re
from pathlib import Path

import folder_paths

from ..krea2_model import nano
from ..krea2_model.images.picture_files import PICTURES
from .file_kinds import walk
from .model_files import check_text

NANO_PICTURES = "krea2-nano pictures (built in)"
# Of the output folder: results, where ComfyUI looks for LoRAs too, and states.
_RESULTS, _RUNS, _CACHE = "loras", "krea2_training", "krea2_training_cache"
_ENDING = ".safetensors"
_NOT_IN_NAMES = re.compile(r'[<>:"|?*\x00-\x1f]')


def list_picture_folders() -> list[str]:
    """Folders of pictures below the input folder, by relative name, then krea2-nano's own."""
    root = Path(folder_paths.get_input_directory())
    names = []
    for folder, _, files in walk(root):
        if Path(folder) != root and any(Path(file).suffix.lower() in PICTURES for file in files):
            names.append(Path(folder).relative_to(root).as_posix())
    return [*sorted(names), NANO_PICTURES]


def find_picture_folder(name: str) -> Path:
    """The folder of a name below the input folder, with either kind of slash.

    Raises ValueError for a name that leads out of it, and where there is no such folder.
    """
    check_text(name)
    if name == NANO_PICTURES:
        return nano.PICTURES
    folder = Path(
        folder_paths.get_input_directory(), *name_parts(name, "folder", "the input folder")
    )
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {name!r} in ComfyUI's input folder. Put the pictures there, each "
            "with its caption beside it (cat.png, cat.txt), and refresh."
        )
    return folder


def find_output(name: str) -> tuple[Path, Path]:
    """The file of a result, in the output folder's `loras`, and the folder of its run.

    Raises ValueError for a name that leads out of them.
    """
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}; expected a name such as my_style.")
    parts = name_parts(name.strip().removesuffix(_ENDING), "name", "output/loras")
    root = Path(folder_paths.get_output_directory())
    result = root.joinpath(_RESULTS, *parts)
    return result.with_name(result.name + _ENDING), root.joinpath(_RUNS, *parts)


def find_cache() -> Path:
    """The folder of encoded pictures and captions, which all runs share."""
    return Path(folder_paths.get_output_directory(), _CACHE)


def relative_name(result: Path) -> str:
    """A result as ComfyUI's lists of LoRAs name it."""
    root = Path(folder_paths.get_output_directory(), _RESULTS)
    return str(result.relative_to(root))


def name_parts(name: str, what: str, where: str) -> list[str]:
    """The parts of a relative name. Raises ValueError for one that could lead elsewhere."""
    parts = name.replace("\\", "/").split("/")
    # Windows drops dots and spaces at the end of a name.
    if any(not part.strip(". ") or part != part.rstrip(". ") for part in parts) or (
        _NOT_IN_NAMES.search(name) or parts[0].startswith("~")
    ):
        raise ValueError(
            f"{what} is {name!r}; expected a name in {where}, such as my_style or "
            'people/my_style, without any of : * ? " < > |.'
        )
    return parts
