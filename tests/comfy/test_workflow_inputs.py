"""The workflows name every widget of their nodes, since the page sends them all."""

import json
from pathlib import Path

import pytest
from comfy_api.latest import io

from in_process import NODES

TWINS = sorted((Path(__file__).parents[1] / "workflows").glob("*.json"))


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_a_twin_has_every_widget(twin):
    for node in json.loads(twin.read_text(encoding="utf-8")).values():
        if node["class_type"] not in NODES:
            continue
        inputs = NODES[node["class_type"]].GET_SCHEMA().inputs
        # The page shows optional inputs behind the others.
        widgets = [
            entry.id
            for entry in sorted(inputs, key=lambda entry: bool(entry.optional))
            if isinstance(entry, io.WidgetInput) and not entry.force_input
        ]
        named = [name for name in node["inputs"] if name in widgets]
        assert named == widgets, node["class_type"]
