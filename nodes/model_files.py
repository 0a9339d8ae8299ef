"""Model files in ComfyUI's folders: the lists of the loaders, and the paths of names."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import folder_paths

from ..krea2_model import nano
from ..krea2_model.checkpoints.gguf import is_gguf, require_package
from ..krea2_model.checkpoints.identify import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    WHERE,
    CheckpointError,
    identify,
    read_header,
)
from ..krea2_model.checkpoints.pairing import COMPONENTS
from ..krea2_model.checkpoints.storage import weight_files
from ..krea2_model.lora.few_steps import few_step_preset, read_steps
from ..krea2_model.tools.self_check import ModelFile
from .file_kinds import Shapes, is_krea_folder, kind_of, preset_of_file, shapes_of, stamp, walk
from .reports import settings_report

AUTO = "auto"

# Models that the pack contains. The text encoder's file is made when its path is first needed.
NANO = "krea2-nano (built in)"
NANO_RAW = "krea2-nano Raw (built in)"
NANOS = (NANO, NANO_RAW)
_BUILT_IN: dict[str, dict[str, Callable[[], Path]]] = {
    TRANSFORMER: {
        NANO: lambda: nano.TRANSFORMERS["turbo"],
        NANO_RAW: lambda: nano.TRANSFORMERS["raw"],
    },
    TEXT_ENCODER: {NANO: nano.text_encoder_file},
    VAE: {NANO: lambda: nano.VAE},
}

NANO_NOTEBOOK_LORA = "krea2-nano notebook (built in)"
NANO_CONTROL_LORA = "krea2-nano outlines (built in)"
_BUILT_IN_CONTROLS = {NANO_CONTROL_LORA: nano.CONTROL_LORA}
_CONTROL_KEYS = ("loras", "controlnet")
_BUILT_IN_LORAS = {
    NANO_NOTEBOOK_LORA: nano.LORA,
    "krea2-nano reference (built in)": nano.REFERENCE_LORA,
}

# Folder keys of ComfyUI that may hold each part; all-in-one files are checkpoints.
_FOLDERS = {
    TRANSFORMER: ("diffusion_models", "checkpoints"),
    TEXT_ENCODER: ("text_encoders", "checkpoints"),
    VAE: ("vae", "checkpoints"),
}
_SUFFIXES = (".safetensors", ".sft")
_GGUF = ".gguf"

# Folder keys of the files that Inspect lists, besides diffusers folders.
_FILE_KEYS = ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras", "controlnet")


def list_models(part: str) -> list[str]:
    """Names for `part`: the user's files and folders, then what is built in."""
    return [*list_user_models(part), *_BUILT_IN[part]]


def list_user_models(part: str) -> list[str]:
    """Names of the files and diffusers folders that may hold `part`.

    Pickles, shards, and files whose header is of another kind are left out. A file that cannot be
    read stays in the list: choosing it shows why.
    """
    names: dict[str, None] = {}
    for key in _FOLDERS[part]:
        for name in (*folder_paths.get_filename_list(key), *_gguf_files(key)):
            if name not in names and any(_may_hold(path, part) for path in _places(key, name)):
                names[name] = None
    folders = _diffusers_folders()
    return [*names, *(n for n in folders if n not in names and holds(folders[n], part))]


def settings_of_models() -> dict[str, str]:
    """Sampling defaults by name of a transformer, as text, where its file tells them."""
    settings = {}
    for name in list_models(TRANSFORMER):
        try:
            preset = preset_of_file(find_model(TRANSFORMER, name))
        except (CheckpointError, OSError):
            continue  # lists show broken files too
        if preset is not None:
            settings[name] = settings_report(preset)
    return settings


def sizes_of_models(part: str) -> dict[str, int]:
    """Bytes by name of the files that hold `part` alone, without those that hold others too."""
    sizes = {}
    for name in list_models(part):
        try:
            path = find_model(part, name)
            is_alone = path.is_file() and kind_of(path).name == part
        except (CheckpointError, OSError):
            continue  # lists show broken files too
        if is_alone:
            sizes[name] = path.stat().st_size
    return sizes


def settings_of_loras() -> dict[str, str]:
    """Sampling defaults by name of a few-step LoRA, as text, where the name tells them."""
    steps = {name: read_steps(Path(name).name) for name in list_loras()}
    return {
        name: settings_report(few_step_preset(count, None))
        for name, count in steps.items()
        if count is not None
    }


def _places(key: str, name: str) -> Iterator[Path]:
    """The files of a name in all folders of a key, ComfyUI's choice first.

    ComfyUI itself takes the first, which may be a file of another kind.
    """
    first = folder_paths.get_full_path(key, name)
    if first:
        yield Path(first)
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        return
    for root in folder_paths.get_folder_paths(key):
        path = Path(root) / relative
        if str(path) != first and path.is_file():
            yield path


def find_model(part: str, name: str) -> Path:
    """The file or folder of a name from `list_models`, with either kind of slash.

    Raises CheckpointError where there is none, or where it is something else.
    """
    check_text(name)
    if name in _BUILT_IN[part]:
        return _BUILT_IN[part][name]()
    for spelled in _spellings(name):
        places = [path for key in _FOLDERS[part] for path in _places(key, spelled)]
        if places:
            # The first of the right kind; where there is none, the first one's error says why.
            fitting = (path for path in places if part in kind_of(path).name)
            return _checked(next(fitting, places[0]), part)
        folder = _diffusers_folders().get(spelled.replace(os.sep, "/"))
        if folder:
            return _checked(folder, part)
    folders = " or ".join(f"models/{key}" for key in (*_FOLDERS[part], "diffusers"))
    choices = "one of the list" if part == TRANSFORMER else "auto or another one of the list"
    raise CheckpointError(
        f"There is no {name!r} in {folders}. Expected {part}, for example {WHERE[part]}; put the "
        f"file there and refresh, or choose {choices}."
    )


def problem(find: Callable[..., Path | None], *arguments: str) -> bool | str:
    """The error that `find(*arguments)` raises, for a node's validation; True where none."""
    try:
        find(*arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return True


def list_loras() -> list[str]:
    """Names of the files of models/loras, for any model, then what is built in.

    Pickles are left out.
    """
    names = folder_paths.get_filename_list("loras")
    names = [name for name in names if Path(name).suffix.lower() in _SUFFIXES]
    return [*names, *_BUILT_IN_LORAS]


def find_lora(name: str) -> Path:
    """The file of a name from `list_loras`, with either kind of slash.

    Raises CheckpointError where there is none, or where it is something else.
    """
    check_text(name)
    if name in _BUILT_IN_LORAS:
        return _BUILT_IN_LORAS[name]
    for spelled in _spellings(name):
        if path := folder_paths.get_full_path("loras", spelled):
            return _checked_lora(Path(path))
    raise CheckpointError(
        f"There is no {name!r} in models/loras. Put the file there and refresh, or choose one of "
        "the list."
    )


def list_controls() -> list[str]:
    """Names of the files that may be control LoRAs, those of models/loras and models/controlnet.

    What is built in comes last. Pickles are left out.
    """
    names = [name for key in _CONTROL_KEYS for name in folder_paths.get_filename_list(key)]
    names = [name for name in dict.fromkeys(names) if Path(name).suffix.lower() in _SUFFIXES]
    return [*names, *_BUILT_IN_CONTROLS]


def find_control(name: str) -> Path:
    """The file of a name from `list_controls`, with either kind of slash.

    Raises CheckpointError where there is none, or where it is something else.
    """
    check_text(name)
    if name in _BUILT_IN_CONTROLS:
        return _BUILT_IN_CONTROLS[name]
    for spelled in _spellings(name):
        for key in _CONTROL_KEYS:
            if path := folder_paths.get_full_path(key, spelled):
                return _checked_lora(Path(path))
    raise CheckpointError(
        f"There is no {name!r} in models/loras or models/controlnet. Put the file there and "
        "refresh, or choose one of the list."
    )


def list_everything() -> list[str]:
    """Model files and diffusers folders of every kind, each after the name of its folder."""
    names = [
        f"{key}/{name}"
        for key in _FILE_KEYS
        for name in (*folder_paths.get_filename_list(key), *_gguf_files(key))
    ]
    return names + [f"diffusers/{name}" for name in _diffusers_folders()]


def own_files() -> list[ModelFile]:
    """The files of `list_everything`, with their paths."""
    files = []
    for entry in list_everything():
        key, _, name = entry.partition("/")
        try:
            path = find_anything(entry)
        except CheckpointError:
            path = Path(entry)  # a broken link: reading it gives the error
        files.append(ModelFile(key, name, path))
    return files


def find_anything(name: str) -> Path:
    """The file or folder of a name from `list_everything`. Raises CheckpointError for another."""
    check_text(name)
    key, _, rest = name.replace("\\", "/").partition("/")
    if key == "diffusers" and rest in _diffusers_folders():
        return _diffusers_folders()[rest]
    # ComfyUI has keys for other folders too, such as custom_nodes.
    if key in _FILE_KEYS and rest:
        for spelled in _spellings(rest):
            if path := folder_paths.get_full_path(key, spelled):
                return Path(path)
    raise CheckpointError(
        f"There is no {name!r}. Put the file into one of ComfyUI's models folders and refresh, or "
        "choose one of the list."
    )


def fingerprint(*paths: Path) -> str:
    """A value that changes when a file, or one in a folder, is replaced under its name.

    ComfyUI caches a loader's outputs for as long as this stays the same. It also writes it into
    pictures, so it is a hash, which tells nobody the folders of this machine.
    """
    stamps = [(str(path), *map(stamp, _files_of(path))) for path in paths]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def holds(path: Path, part: str) -> bool:
    """True if a file or a diffusers folder holds `part`, by its headers. Never raises."""
    if path.is_file():
        return part in kind_of(path).name
    try:
        files = weight_files(path / COMPONENTS[part])
    except (CheckpointError, OSError):
        return False
    if len(files) == 1:
        return part in kind_of(files[0]).name
    # The tensors that identify a part may be in any of its shards.
    try:
        return part in identify(shapes_of_part(path, part))
    except (CheckpointError, OSError):
        return False


def _checked(path: Path, part: str) -> Path:
    if path.is_file() and path.suffix.lower() not in (*_SUFFIXES, _GGUF):
        raise CheckpointError(
            f"{path.name} is a {path.suffix or 'nameless'} file; expected {part} as .safetensors "
            f"or .gguf, for example {WHERE[part]}."
        )
    if path.is_file():
        kind, problem = kind_of(path)
        if problem:
            raise CheckpointError(problem)
        if is_gguf(path):
            require_package(path)
    else:
        kind = identify(shapes_of_part(path, part))
    if part not in kind:
        raise CheckpointError(f"{path.name} is {kind}; expected {part}, for example {WHERE[part]}.")
    return path


def _checked_lora(path: Path) -> Path:
    if path.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(
            f"{path.name} is a {path.suffix or 'nameless'} file; expected a LoRA as .safetensors."
        )
    read_header(path)
    return path


def check_text(name: object) -> None:
    """Raise CheckpointError for a name that is no text: a program may post anything."""
    if not isinstance(name, str):
        raise CheckpointError(f"The file is {name!r}; expected a name from the list.")


def _spellings(name: str) -> Iterable[str]:
    """A name with either kind of slash, since its workflow may come from another system."""
    return dict.fromkeys((name, name.replace("\\", os.sep), name.replace("/", os.sep)))


def _may_hold(path: Path, part: str) -> bool:
    if path.suffix.lower() not in (*_SUFFIXES, _GGUF):
        return False
    if "-of-0" in path.name and any(path.parent.glob("*.safetensors.index.json")):
        return False
    kind = kind_of(path)
    # Choosing a file that cannot be read shows why.
    return bool(kind.problem) or part in kind.name


def _gguf_files(key: str) -> list[str]:
    """GGUF files of a folder key by relative name; ComfyUI's own lists leave them out."""
    names = set()
    for root in folder_paths.get_folder_paths(key):
        for folder, _, files in walk(root):
            relative = Path(folder).relative_to(root)
            names |= {str(relative / file) for file in files if file.lower().endswith(_GGUF)}
    return sorted(names)


def _diffusers_folders() -> dict[str, Path]:
    """Krea 2's diffusers folders by relative name."""
    folders: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for name, children, files in walk(root):
            if "model_index.json" not in files:
                continue
            children.clear()
            folder = Path(name)
            if is_krea_folder(folder):
                folders.setdefault(folder.relative_to(root).as_posix(), folder)
    return dict(sorted(folders.items()))


def shapes_of_part(path: Path, part: str) -> Shapes:
    """Shapes of the tensors of a file, or of `part` of a diffusers folder."""
    files = [path] if path.is_file() else weight_files(path / COMPONENTS[part])
    shapes: Shapes = {}
    for file in files:
        shapes |= shapes_of(file)
    return shapes


def _files_of(path: Path) -> list[Path]:
    """A file itself, or all files of a folder."""
    if path.is_file():
        return [path]
    files = (Path(folder, name) for folder, _, names in walk(path) for name in names)
    return sorted(file for file in files if file.exists())
