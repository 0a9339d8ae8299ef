"""The settings of a picture: kept in its file, read from it, and turned into options again."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import PRESETS
from .choices import NANO
from .errors import UsageError
from .model_files import KEYS, name_in_models
from .picture_options import FILES, PICTURE, PICTURES, REPEATED
from .regions import file_names, regions_to_keep
from .values import text_of

# Switches that are off when they are named.
_OFF = {"weights": "--no-weights"}
_MAX_TEXT = 1_000_000


def settings_of(args: Namespace, **results: Any) -> dict[str, Any]:
    """The settings that differ from the defaults, with names of files in place of paths.

    results: values that the run has found, such as the steps that the checkpoint's preset gives.
    """
    defaults = _defaults()
    settings: dict[str, Any] = {}
    for name in PICTURE:
        value = getattr(args, name)
        if value == defaults[name] and name not in ("prompt", "seed"):
            continue
        if name == "lora":
            value = [[name_in_models(file, KEYS["lora"]), scale] for file, scale in value]
        elif name == "control":
            value = [name_in_models(file, KEYS[name]) for file in value]
        elif name in FILES:
            value = value if value in NANO else name_in_models(value, KEYS[name])
        elif name == "regions":
            value = regions_to_keep(args)
        elif name in PICTURES:
            value = [p.name for p in value] if isinstance(value, list) else value.name
        settings[name] = value
    settings |= results
    return {name: settings[name] for name in PICTURE if name in settings}


@cache
def _defaults() -> dict[str, Any]:
    from .parser import command_parser

    parser = command_parser("generate")
    return {name: parser.get_default(name) for name in PICTURE}


def as_json(settings: Mapping[str, Any]) -> str:
    """Settings as they stand in a picture."""
    return json.dumps({"version": __version__, "settings": dict(settings)})


def from_json(text: str, picture: Path) -> dict[str, Any]:
    """Settings that a picture holds. Raises UsageError for what is none of ours."""
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError
        found = json.loads(text)["settings"]
        settings = {name: found[name] for name in PICTURE if name in found}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"The settings in {picture} cannot be read; expected a picture that krea2 has made."
        ) from error
    return settings


def check_names(settings: Mapping[str, Any], picture: Path) -> None:
    """Refuse names of files that lead elsewhere: a picture may come from anyone."""
    for option in (*FILES, *PICTURES, "regions"):
        value = settings.get(option, [])
        if option == "regions":
            value = [entry[place] for entry, _, place in file_names(value)]
        for entry in value if isinstance(value, list) else [value]:
            name = str(entry[0] if isinstance(entry, list) and entry else entry)
            parts = re.split(r"[/\\]", name)
            if ".." in parts or parts[0] in ("", "~") or ":" in parts[0]:
                raise UsageError(
                    f"{picture} names the file {name[:200]!r}; expected a name without a folder "
                    f"above it. Give it with --{option.replace('_', '-')}."
                )


def options_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they are typed, without the prompt: `["--steps", "8", ...]`."""
    words: list[str] = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name == "prompt" or value is None:
            continue
        if name in ("width", "height") and settings.get("mask"):
            continue  # the size is the start picture's
        if name == "regions" and not isinstance(value, str):
            value = json.dumps(value)
        if isinstance(value, bool):
            if name in _OFF:
                words += [] if value else [_OFF[name]]
            else:
                words += [option] if value else []
        elif name in REPEATED:
            values = value if isinstance(value, list) else [value]
            words += [f"{option}={text_of(each)}" for each in values]
        else:
            words.append(f"{option}={text_of(value)}")
    return words


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The settings as most tools write and read them: prompt, negative prompt, then the rest."""
    lines = [settings["prompt"]]
    if negative := settings.get("negative"):
        lines.append(f"Negative prompt: {negative}")
    facts = {
        "Steps": settings["steps"],
        "Sampler": "Euler",
        "CFG scale": f"{settings['guidance'] + 1:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": _model_name(settings),
    }
    if "start_image" in settings:
        facts["Denoising strength"] = f"{settings.get('denoise', 1.0):g}"
    if loras := settings.get("lora"):
        facts["Loras"] = " ".join(f"{Path(name).stem}:{scale:g}" for name, scale in loras)
    facts["Version"] = f"Krea 2 Kit {__version__}"
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])


def _model_name(settings: Mapping[str, Any]) -> str:
    name = settings.get("transformer") or settings.get("model", "")
    if name in NANO:
        return f"krea2-nano-{NANO[name]}"
    return Path(name).name.removesuffix(".safetensors").removesuffix(".gguf")


def preset_settings(name: str) -> dict[str, Any]:
    """Steps and guidance of a preset, "raw" or "turbo"."""
    preset = PRESETS[name]
    return {"steps": preset.steps, "guidance": preset.guidance}
