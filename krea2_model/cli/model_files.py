"""Files that options name: where they are looked for, and their names inside pictures."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..catalogue import RAW, TURBO, files_in
from .choices import NANO
from .errors import UsageError, suggestion
from .picture_options import WEIGHTS

# ComfyUI's model folders that may hold the file of an option.
KEYS = {
    "model": ("checkpoints", "diffusers", "diffusion_models"),
    "transformer": ("diffusion_models", "unet", "checkpoints", "diffusers"),
    "text_encoder": ("text_encoders", "clip", "checkpoints", "diffusers"),
    "vae": ("vae", "checkpoints", "diffusers"),
    "tokenizer": (),
    "lora": ("loras",),
    "control": ("loras", "controlnet"),
}
_NANO_FOLDER = Path(__file__).resolve().parents[1] / "nano"


@dataclass(frozen=True)
class Weights:
    """Files or folders of the three parts.

    built_in: "turbo" or "raw" where the transformer is krea2-nano's.
    """

    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path | None = None
    built_in: str | None = None


def models_folder(chosen: Path | None) -> Path | None:
    """ComfyUI's models folder: the chosen one, or that of COMFYUI_PATH where it is there."""
    if chosen is not None:
        if not chosen.is_dir():
            raise UsageError(
                f"--models is {chosen}, which is no folder; expected ComfyUI's models folder, "
                "which holds diffusion_models, text_encoders and vae."
            )
        return chosen
    root = os.environ.get("COMFYUI_PATH")
    folder = Path(root, "models") if root else None
    return folder if folder is not None and folder.is_dir() else None


def find_file(
    option: str, name: str | Path, models: Path | None, beside: Sequence[Path] = ()
) -> Path:
    """The file or folder that an option names: its path, or its name in ComfyUI's models folder.

    beside: more folders to look in. Raises UsageError where there is none.
    """
    path = Path(name)
    if path.exists():
        return path
    places = [folder / path for folder in beside]
    if models is not None:
        places += [models / key / path for key in KEYS.get(option, ())]
    if option in ("lora", "control"):
        places.append(_NANO_FOLDER / path.name)
    for place in places if not path.is_absolute() else ():
        if place.exists():
            return place
    looked = f", nor in {models}" if models is not None and KEYS.get(option) else ""
    # A path has folders or an ending; a bare word may be a built-in model.
    is_word = option == "model" and path.name == str(name) and not path.suffix
    hint = suggestion(path.name.lower(), NANO, 0.5) if is_word else ""
    if not hint and option in WEIGHTS:
        hint = " `krea2 models` says which files to get, and fetches them."
    raise UsageError(
        f"There is no file or folder {name} (--{option.replace('_', '-')}){looked}. Check the name "
        f"and the folder.{hint}"
    )


def take_from_models(args: Namespace) -> None:
    """Name the parts that `args` leave out by the files in the models folder.

    Those of the tables come first, Turbo before Raw, then any that its header says to be the part.
    Raises UsageError for a folder that the user names and that lacks one.
    """
    if any(getattr(args, part) is not None for part in ("model", "transformer")):
        return
    models = models_folder(args.models)
    if models is None:
        return
    parts = ("transformer", "text_encoder", "vae")
    found = {
        p: files_in(models, p, TURBO) or files_in(models, p, RAW) or files_by_header(models, p)
        for p in parts
        if getattr(args, p) is None
    }
    lacking = [part.replace("_", " ") for part, files in found.items() if not files]
    if lacking and args.models is not None:
        raise UsageError(
            f"In {models} there is no {' and no '.join(lacking)} of Krea 2. Name the files with "
            "--transformer, --text-encoder and --vae; `krea2 models` says which to get."
        )
    if not lacking:
        for part, files in found.items():
            setattr(args, part, files[0])


def files_by_header(models: Path, part: str) -> list[Path]:
    """Files in ComfyUI's models folder that hold a part, by their headers; Turbo's first."""
    from ..checkpoints.checkpoint import read_shapes
    from ..checkpoints.identify import CheckpointError, identify
    from ..checkpoints.pairing import COMPONENTS, has_all_layers

    kinds = {component: kind for kind, component in COMPONENTS.items()}
    found = []
    for folder in (models / key for key in KEYS[part]):
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if file.suffix.lower() not in (".safetensors", ".sft", ".gguf"):
                continue
            try:
                shapes = read_shapes(file)
                is_whole = part != "text_encoder" or has_all_layers(shapes)
                if kinds[part] in identify(shapes) and is_whole:
                    found.append(file)
            except (CheckpointError, OSError):
                continue  # an incomplete download, for example
    return sorted(found, key=lambda file: TURBO not in file.name.lower())


def find_weights(args: Namespace) -> Weights:
    """The model files of a run. Raises UsageError where one is not named or not there."""
    from .. import nano

    models, beside = models_folder(args.models), getattr(args, "beside", ())
    found: dict[str, Path] = {}
    built_in = None
    if args.model in NANO:
        built_in = NANO[args.model]
        found = {
            "transformer": nano.TRANSFORMERS[built_in],
            "text_encoder": nano.text_encoder_file(),
            "vae": nano.VAE,
        }
    elif args.model is not None:
        whole = find_file("model", args.model, models, beside)
        found = dict.fromkeys(("transformer", "text_encoder", "vae"), whole)
    for part in ("transformer", "text_encoder", "vae"):
        if (name := getattr(args, part, None)) is not None:
            found[part] = find_file(part, name, models, beside)
    if args.transformer is not None:
        built_in = None
    if missing := [part for part in ("transformer", "text_encoder", "vae") if part not in found]:
        if len(missing) == 3:
            raise UsageError(
                "Name the weights: --model (nano is small and built in), or --transformer, "
                "--text-encoder and --vae. `krea2 models` says which files to get."
            )
        options = " and ".join(f"--{part.replace('_', '-')}" for part in missing)
        raise UsageError(
            f"{options} is missing: a model has a transformer, a text encoder and a VAE."
        )
    tokenizer = args.tokenizer and find_file("tokenizer", args.tokenizer, models, beside)
    return Weights(**found, tokenizer=tokenizer, built_in=built_in)


def find_loras(args: Namespace) -> list[tuple[Path, float]]:
    """LoRA files and their scales. Raises UsageError for what is not there or is no LoRA."""
    models, beside = models_folder(args.models), getattr(args, "beside", ())
    return [(find_lora(name, models, beside), scale) for name, scale in args.lora]


def find_lora(name: str | Path, models: Path | None, beside: Sequence[Path] = ()) -> Path:
    """A LoRA file, see `find_file`. Raises UsageError for another file."""
    from ..checkpoints.identify import CONTROL_LORA, LORA, identify, read_header

    path = _file_of("lora", name, models, beside)
    kind = identify(read_header(path).tensors)
    if LORA not in kind or CONTROL_LORA in kind:
        remedy = " Give it to --control." if kind == CONTROL_LORA else ""
        raise UsageError(f"--lora {name} is {kind}; expected a LoRA as .safetensors.{remedy}")
    return path


def _file_of(option: str, name: str | Path, models: Path | None, beside: Sequence[Path]) -> Path:
    """As `find_file`, for what is no folder. Raises UsageError for one."""
    path = find_file(option, name, models, beside)
    if path.is_dir():
        raise UsageError(f"--{option} is {name}, a folder; expected a .safetensors file in it.")
    return path


def find_controls(args: Namespace) -> list[tuple[Path, str]]:
    """Control LoRAs and their forms. Raises UsageError or CheckpointError for other files."""
    from ..checkpoints.identify import read_header
    from ..lora.control import form_of

    models, beside = models_folder(args.models), getattr(args, "beside", ())
    found = []
    for name in args.control:
        path = _file_of("control", name, models, beside)
        header = read_header(path)
        found.append((path, form_of(header.shapes, path.name, header.metadata)))
    return found


def name_in_models(path: Path | str, keys: Iterable[str]) -> str:
    """The name that a picture keeps of a file: its place in a folder of ComfyUI's, or its own."""
    path = Path(path)
    parts, keys = path.parts, tuple(keys)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] in keys:
            return "/".join(parts[index + 1 :])
    return path.name
