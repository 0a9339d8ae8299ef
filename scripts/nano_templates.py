"""The example workflows on krea2-nano, as the page makes them when it is picked in Load Krea 2.

A workflow carries the values (`extra.krea2_nano`); web/js/nano.js puts them in.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NANO, NANO_RAW = "krea2-nano (built in)", "krea2-nano Raw (built in)"


def nano_graph(name: str) -> dict:
    """The API form of a workflow with krea2-nano's values."""
    workflow = _read("example_workflows", name)
    graph = _read("tests/workflows", name)
    for number, values in workflow["extra"].get("krea2_nano", {}).items():
        for widget, (own, nano) in values.items():
            inputs = graph[number]["inputs"]
            if inputs[widget] != own:
                raise ValueError(f"{name}: {number}.{widget} is {inputs[widget]!r}, not {own!r}.")
            inputs[widget] = nano
    for node in graph.values():
        if node["class_type"] == "K2Loader" and node["inputs"]["model"].endswith(".safetensors"):
            node["inputs"]["model"] = NANO_RAW if "_raw_" in node["inputs"]["model"] else NANO
    return graph


def _read(folder: str, name: str) -> dict:
    return json.loads((ROOT / folder / f"{name}.json").read_text(encoding="utf-8"))
