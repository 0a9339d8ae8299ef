"""Model files in ComfyUI's folders: what the loaders list, and where a name leads."""

import os
from pathlib import Path

import folder_paths

from ..krea2_model.identify import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    WHERE,
    CheckpointError,
    identify,
    read_header,
)

AUTO = "auto"

# Folder keys of ComfyUI that may hold each part; all-in-one files are checkpoints.
_FOLDERS = {
    TRANSFORMER: ("diffusion_models", "checkpoints"),
    TEXT_ENCODER: ("text_encoders", "checkpoints"),
    VAE: ("vae", "checkpoints"),
}
_COMPONENTS = {TRANSFORMER: "transformer", TEXT_ENCODER: "text_encoder", VAE: "vae"}

# Kinds by (path, size, time of change): a folder is listed often, its headers are read once.
_kinds: dict[tuple[str, int, int], str] = {}


def list_models(part: str) -> list[str]:
    """Names of the files and diffusers folders that may hold `part`.

    Pickles, shards, and files whose header says that they are something else are left out. A file
    that cannot be read stays in the list, since choosing it is how its owner learns why.
    """
    names = []
    for key in _FOLDERS[part]:
        for name in folder_paths.get_filename_list(key):
            path = folder_paths.get_full_path(key, name)
            if path and name not in names and _may_hold(Path(path), part):
                names.append(name)
    return names + [name for name in _diffusers_folders() if name not in names]


def find_model(part: str, name: str) -> Path:
    """The file or folder of a name from `list_models`, with either kind of slash.

    Raises CheckpointError where there is none, or where it is something else.
    """
    for spelled in dict.fromkeys((name, name.replace("\\", os.sep), name.replace("/", os.sep))):
        for key in _FOLDERS[part]:
            path = folder_paths.get_full_path(key, spelled)
            if path:
                check_kind(Path(path), part)
                return Path(path)
        folder = _diffusers_folders().get(spelled.replace(os.sep, "/"))
        if folder:
            return folder
    folders = " or ".join(f"models/{key}" for key in (*_FOLDERS[part], "diffusers"))
    raise CheckpointError(
        f"There is no {name!r} in {folders}. Expected {part}, for example {WHERE[part]}; put the "
        "file there and refresh, or choose one of the list."
    )


def check_kind(path: Path, part: str) -> None:
    """Raise CheckpointError where a file's header says that it does not hold `part`."""
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise CheckpointError(
            f"{path.name} is a {path.suffix or 'nameless'} file; expected {part} as .safetensors, "
            f"for example {WHERE[part]}."
        )
    kind = identify(read_header(path).tensors)
    if part not in kind:
        raise CheckpointError(f"{path.name} is {kind}; expected {part}, for example {WHERE[part]}.")


def holds_every_part(path: Path) -> bool:
    """Whether text encoder and VAE come with a transformer: a diffusers folder or all-in-one."""
    if path.is_dir():
        return all((path / component).is_dir() for component in _COMPONENTS.values())
    kind = identify(read_header(path).tensors)
    return all(part in kind for part in _COMPONENTS)


def find_fitting(part: str, model: Path) -> Path:
    """The file of `part` that belongs to the transformer `model`, for the choice "auto".

    Raises CheckpointError where none does.
    """
    if holds_every_part(model):
        return model
    width = _text_width(model) if part == TEXT_ENCODER else None
    for name in list_models(part):
        try:
            path = find_model(part, name)
        except CheckpointError:
            # Lists show broken files too, for their owners to choose and learn why.
            continue
        if width is None or path.is_dir() or _encoder_width(path) == width:
            return path
    wanted = f"{part} of width {width}" if width else part
    raise CheckpointError(
        f"No {wanted} was found for {model.name}. Download {WHERE[part]}, or choose the file "
        'instead of "auto".'
    )


def check_pair(model: Path, encoder: Path) -> None:
    """Raise CheckpointError where a text encoder's width is not what the transformer needs."""
    if model.is_dir() or encoder.is_dir():
        return
    wanted, found = _text_width(model), _encoder_width(encoder)
    if None not in (wanted, found) and wanted != found:
        raise CheckpointError(
            f"{encoder.name} gives text of width {found}; {model.name} needs {wanted}. Use the "
            f"text encoder that belongs to it, for example {WHERE[TEXT_ENCODER]}."
        )


def _may_hold(path: Path, part: str) -> bool:
    if path.suffix.lower() not in (".safetensors", ".sft"):
        return False
    if "-of-0" in path.name and any(path.parent.glob("*.safetensors.index.json")):
        return False
    try:
        stat = path.stat()
        signature = (str(path), stat.st_size, stat.st_mtime_ns)
        if signature not in _kinds:
            _kinds[signature] = identify(read_header(path).tensors)
    except (OSError, CheckpointError):
        return True
    return part in _kinds[signature]


def _diffusers_folders() -> dict[str, Path]:
    """Krea 2 folders of models/diffusers by relative name."""
    folders = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for found, children, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                children.clear()
                if (Path(found) / "transformer").is_dir():
                    folders[Path(found).relative_to(root).as_posix()] = Path(found)
    return dict(sorted(folders.items()))


def _text_width(transformer: Path) -> int | None:
    for name, shape in read_header(transformer).shapes.items():
        if name.endswith(("txtfusion.layerwise_blocks.0.prenorm.scale",
                          "text_fusion.layerwise_blocks.0.norm1.weight")):  # fmt: skip
            return shape[0]
    return None


def _encoder_width(path: Path) -> int | None:
    for name, shape in read_header(path).shapes.items():
        if name.endswith("layers.0.input_layernorm.weight"):
            return shape[0]
    return None
