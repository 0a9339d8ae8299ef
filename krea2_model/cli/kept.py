"""The settings or the graph of ComfyUI that a picture's file keeps of how it was made.

The nodes read and write them too, and import nothing else of the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..images.picture_texts import read_texts
from .errors import UsageError
from .graph import (
    ELSEWHERE,
    Graph,
    graph_of,
    not_in_graph,
    read_graph,
    refuse_others,
    settings_of_graph,
)
from .parser import command_parser
from .picture_options import PICTURE
from .settings import as_json, check_names, from_json, options_of, parameters_text
from .values import text_of as text_of  # for the nodes

# Settings without which there is no graph, and those that are files.
_OF_GRAPHS = {"prompt", "seed", "steps", "guidance", "width", "height"}
_FILES = ("model", "transformer", "text_encoder", "vae", "tokenizer", "control")


class Kept(NamedTuple):
    """settings: by names of options. others: values that no option expresses. graph: ComfyUI's, in
    the API form; None where the settings are krea2's."""

    settings: dict[str, Any]
    others: dict[str, Any]
    graph: Graph | None


def settings_in(picture: Path) -> dict[str, Any]:
    """The settings in a picture's file. Raises UsageError where it has none that we can use."""
    kept = kept_in(picture)
    refuse_others(kept.others)
    return kept.settings


def kept_in(picture: Path) -> Kept:
    """The settings in a picture's file. Raises UsageError for a file without any that we read."""
    try:
        texts = read_texts(picture)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if "krea2" in texts:
        return Kept(from_json(texts["krea2"], picture), {}, None)
    try:
        graph = json.loads(texts.get("prompt", "null"))
    except (ValueError, RecursionError):
        graph = None
    if isinstance(graph, dict) and graph:
        settings, others = read_graph(graph)
        return Kept(settings, others, graph)
    raise UsageError(
        f"{picture} holds no settings; expected a picture that krea2 has made, or ComfyUI with "
        "this pack's nodes. Image editors and sites for sharing often remove them."
    )


def checked_in(picture: Path, name: str, remedy: str) -> Kept:
    """The checked settings in a picture's file, which anyone may have made, with a graph.

    name, remedy: what messages call the picture, and what to do where the command line cannot.
    Raises ValueError.
    """
    try:
        kept = kept_in(picture)
        check_names(kept.settings, picture)
        settings = _checked(kept.settings, picture)
    except UsageError as error:
        message = str(error).replace(ELSEWHERE, remedy).replace(str(picture), name)
        raise ValueError(message) from error
    graph = kept.graph
    known = {name: value for name, value in settings.items() if value is not None}
    if graph is None and known.keys() >= _OF_GRAPHS and not not_in_graph(known):
        graph = graph_of(known)
    return Kept(settings, kept.others, graph)


def _checked(settings: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    """Settings as the command line reads them."""
    prompt, negative = settings.get("prompt", ""), settings.get("negative", "")
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise UsageError(f"The settings in {picture} are wrong: its prompts are no texts.")
    try:
        read = vars(command_parser("generate").parse_args([*options_of(settings), "--", prompt]))
    except (ValueError, TypeError) as error:
        raise UsageError(f"The settings in {picture} are wrong: {error}") from error
    found = {name: read[name] for name in settings if name in read}
    files = {name: str(found[name]) for name in _FILES if found.get(name) is not None}
    loras = [[str(name), scale] for name, scale in found.get("lora", ())]
    found |= files | ({"lora": loras} if loras else {})
    return found | {"prompt": prompt}


def texts_of_graph(graph: Graph, width: int, height: int) -> dict[str, str]:
    """The texts that a picture of a graph keeps: the graph, and its settings where options exist.

    width, height: of the picture, in pixels.
    """
    texts = {"prompt": json.dumps(graph)}
    try:
        found = settings_of_graph(graph) | {"width": width, "height": height}
    except UsageError:
        return texts  # nodes that the command line has no options for
    settings = {name: found[name] for name in PICTURE if name in found}
    return {"krea2": as_json(settings), "parameters": parameters_text(settings), **texts}
