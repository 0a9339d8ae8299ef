"""The settings inside a picture, as outputs and for the widgets of the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
from comfy_api.latest import io, ui
from PIL import Image

from ..krea2_model.cli.kept import checked_in, text_of
from ..krea2_model.images.picture_files import PICTURES
from . import inputs, model_files
from .inputs import AUTO, CUSTOM, FIXED, TURBO_MU
from .training_files import name_parts

# Key of the node's output that tells the page the picture's nodes (web/js/picture_settings.js).
KEY = "k2_settings"
_DROP = "Drop the picture on the page to open its graph."
# Values that ComfyUI's page puts behind the names of files.
_FOLDER = " [input]"
_SAMPLER = "K2Sampler"


class Found(NamedTuple):
    """settings: by names of options, checked. others: values that no option has. nodes: of the
    graph, from the loader to the sampler: types and widgets' values. size: of the picture."""

    settings: dict[str, Any]
    others: dict[str, Any]
    nodes: list[dict[str, Any]]
    size: tuple[int, int]


class K2PictureSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2PictureSettings",
            display_name="Krea 2 Picture Settings",
            category="Krea 2",
            description=(
                "Reads how a picture was made: prompt, seed, steps, LoRAs and the rest, from "
                "pictures of this pack's nodes and of krea2. Its button writes them into the nodes "
                "of the graph."
            ),
            search_aliases=inputs.aliases(
                "metadata, png info, read prompt, image info, load settings, remix"
            ),
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "image",
                    options=list_pictures(),
                    upload=io.UploadType.image,
                    tooltip="A picture in ComfyUI's input folder: PNG, JPEG or WebP.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt."),
                io.String.Output(display_name="negative", tooltip="The negative prompt."),
                io.Int.Output(display_name="seed", tooltip="The seed."),
                io.Int.Output(display_name="steps", tooltip="Number of steps, for preset custom."),
                io.Float.Output(
                    display_name="guidance", tooltip="Guidance in Krea's convention, likewise."
                ),
                io.AnyType.Output(display_name="shift", tooltip="Choice of shift of the sampler."),
                io.Float.Output(
                    display_name="mu", tooltip="Exponent of the shift, for shift fixed."
                ),
                io.Int.Output(display_name="width", tooltip="Pixels."),
                io.Int.Output(display_name="height", tooltip="Pixels."),
                io.AnyType.Output(display_name="sampler", tooltip="Name of the sampler."),
                io.AnyType.Output(
                    display_name="preset",
                    tooltip="custom, or auto where the picture leaves steps to the checkpoint.",
                ),
                io.String.Output(display_name="loras", tooltip="The LoRAs, a line each: FILE:0.8."),
                io.String.Output(display_name="settings", tooltip="All settings, a line each."),
            ],
        )

    @classmethod
    def validate_inputs(cls, image=None):
        return inputs.verdict(cls, lambda: image is None or read_picture(image))

    @classmethod
    def fingerprint_inputs(cls, image=None):
        return None if image is None else model_files.fingerprint(find_picture(image))

    @classmethod
    def execute(cls, image):
        found = read_picture(image)
        settings, others = found.settings, found.others
        steps, guidance, mu = (settings.get(name) for name in ("steps", "guidance", "mu"))
        is_known = steps is not None and guidance is not None
        report = report_of(found)
        return io.NodeOutput(
            settings.get("prompt", ""),
            settings.get("negative", ""),
            settings.get("seed", 0),
            28 if steps is None else steps,
            4.5 if guidance is None else guidance,
            others.get("shift", AUTO if mu is None else FIXED),
            TURBO_MU if mu is None else mu,
            settings.get("width") or found.size[0],
            settings.get("height") or found.size[1],
            others.get("sampler", "euler"),
            CUSTOM if is_known else AUTO,
            "\n".join(map(text_of, settings.get("lora", ()))),
            report,
            ui=ui.PreviewText(report).as_dict() | {KEY: [{"nodes": found.nodes}]},
        )


def list_pictures() -> list[str]:
    """Names of the pictures in the input folder, as Load Image has them: none of folders below."""
    root = Path(folder_paths.get_input_directory())
    return sorted(p.name for p in root.iterdir() if p.suffix.lower() in PICTURES and p.is_file())


def find_picture(name: str) -> Path:
    """The picture of a name below the input folder.

    Raises ValueError for a name that leads out of it, and where there is no such picture.
    """
    model_files.check_text(name)
    name = name.removesuffix(_FOLDER)
    parts = name_parts(name, "image", "ComfyUI's input folder")
    path = Path(folder_paths.get_input_directory(), *parts)
    if path.suffix.lower() not in PICTURES or not path.is_file():
        raise ValueError(
            f"There is no picture {name!r} in ComfyUI's input folder; expected a name from the "
            "list. Upload the picture, or refresh."
        )
    return path


def read_picture(name: str) -> Found:
    """The settings in a picture of the input folder. Raises ValueError where there are none."""
    path = find_picture(name)
    # In the words of the page, and without the folders of this machine.
    kept = checked_in(path, name, _DROP)
    with Image.open(path) as picture:
        size = picture.size
    others = _checked_others(kept.others)
    return Found(kept.settings, others, nodes_of(kept.graph or {}), size)


def _checked_others(others: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a sampler that no option has, if they are such."""
    known = {"sampler": inputs.SAMPLER.options, "shift": [inputs.BY_SIZE]}
    checked = {}
    for name, value in others.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value in known.get(name, ()) or (name not in known and is_number):
            checked[name] = value
        else:
            raise ValueError(
                f"The settings in the picture are wrong: {name} is {str(value)[:200]}."
            )
    return checked


def nodes_of(graph: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Types and widgets' values of the nodes before a graph's sampler, and of it, loaders first."""
    samplers = [key for key, node in graph.items() if node.get("class_type") == _SAMPLER]
    found: dict[str, dict[str, Any]] = {}
    begun: set[str] = set()

    def add(key: str) -> None:
        if key in begun or not isinstance(graph.get(key), Mapping):
            return
        begun.add(key)
        values = {}
        for name, value in dict(graph[key].get("inputs") or {}).items():
            if isinstance(value, list):
                add(str(value[0]) if value else "")
            elif isinstance(value, (str, int, float, bool)):
                values[name] = value
        found[key] = {"type": str(graph[key].get("class_type")), "values": values}

    for key in samplers[:1]:
        add(key)
    return [node for node in found.values() if node["type"].startswith("K2")]


def report_of(found: Found) -> str:
    """The settings as text: the prompts, then the rest a line each."""
    values = {**found.settings, **found.others}
    width, height = found.size
    lines = [values.pop("prompt", "")]
    if negative := values.pop("negative", ""):
        lines.append(f"negative: {negative}")
    loras = values.pop("lora", ())
    lines += [
        f"{name}: {text}"
        for name, value in values.items()
        if value is not None and (text := _text(value))
    ]
    lines += [f"lora: {text_of(lora)}" for lora in loras]
    return "\n".join([*lines, f"picture: {width} x {height} px"])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return text_of(value)
