"""A ComfyUI graph in API form as a template: columns of a table fill its inputs.

A column is `seed` where one node has an input of that name, or `NODE.seed` with a node's id, title
or class. Links between nodes stay as they are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from krea2_model.cli.errors import UsageError, suggestion

Graph = dict[str, dict[str, Any]]
# An input by its node's id and its name.
Input = tuple[str, str]


def read_graph(path: Path) -> Graph:
    """A graph of a file. Raises UsageError for what is none, or is the page's form of one."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--workflow {path} cannot be read: {error}.") from error
    if isinstance(graph, dict) and "nodes" in graph:
        raise UsageError(
            f"--workflow {path} is the page's form of a workflow; expected the API form. In "
            "ComfyUI: File, Export (API)."
        )
    is_graph = isinstance(graph, dict) and all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict)
        for node in graph.values()
    )
    if not graph or not is_graph:
        raise UsageError(f"--workflow {path} is no graph of ComfyUI; expected its API form.")
    return graph


class Template:
    """Finds the inputs that columns name, and fills them."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._found: dict[str, Input] = {}

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises UsageError for a column that names no input, or several."""
        for column in columns:
            self._input(column)

    def fill(self, values: Mapping[str, Any]) -> Graph:
        """The graph of a row. Raises UsageError for values that do not fit."""
        graph = copy.deepcopy(self._graph)
        for column, value in values.items():
            node, name = self._input(column)
            graph[node]["inputs"][name] = _as(self._graph[node]["inputs"][name], value, column)
        return graph

    def _input(self, column: str) -> Input:
        if column not in self._found:
            self._found[column] = self._find(column)
        return self._found[column]

    def _find(self, column: str) -> Input:
        node_name, dot, name = column.rpartition(".")
        inputs = [
            (node, key)
            for node, entry in self._graph.items()
            for key, value in entry["inputs"].items()
            if not isinstance(value, list)  # a link
        ]
        found = [
            (n, key) for n, key in inputs if key == name and (not dot or self._is(n, node_name))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f"{node}.{key}" for node, key in found)
            raise UsageError(f"The column {column} may be any of {names}; name one of them.")
        known = sorted({key for _, key in inputs} | {f"{node}.{key}" for node, key in inputs})
        raise UsageError(
            f"The column {column} is no input of the workflow; expected one such as "
            f"{', '.join(known[-3:])}.{suggestion(column, known)}"
        )

    def _is(self, node: str, name: str) -> bool:
        entry = self._graph[node]
        title = entry.get("_meta", {}).get("title")
        return name in (node, entry["class_type"], title)


def _as(default: Any, value: Any, column: str) -> Any:
    """A value of a table, where all may be text, as what the graph has there."""
    try:
        if isinstance(default, bool):
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return value if isinstance(value, bool) else words[str(value).strip().lower()]
        if isinstance(default, int):
            return int(value) if float(value) == int(float(value)) else float(value)
        if isinstance(default, float):
            return float(value)
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{column} is {value!r}; expected a {type(default).__name__}, as in the workflow."
        ) from None
    return str(value) if isinstance(default, str) else value
