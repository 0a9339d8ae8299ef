"""What a picture's file keeps of how it was made: settings of `krea2`, or a graph of ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..images.picture_texts import read_texts
from .errors import UsageError
from .graph import Graph, read_graph, refuse_others
from .settings import from_json


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
    """What a picture's file keeps. Raises UsageError where it has nothing that we can read."""
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
