"""How the example workflows lie on the canvas: nodes apart and in groups, wires forward and apart.

Sizes and sockets are LiteGraph's, the page's canvas. Its curves around reroutes are taken for
straight lines.
"""

import itertools
import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
# A node's title is drawn above its position; sockets and widgets below, a row each.
TITLE, ROW, WIDGET_ROW = 30, 20, 24
CURVE_POINTS = 24


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def workflow(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_nodes_do_not_overlap(workflow):
    for one, other in itertools.combinations(workflow["nodes"], 2):
        (left, top, right, bottom), (x, y, x_end, y_end) = box(one), box(other)
        apart = right <= x or x_end <= left or bottom <= y or y_end <= top
        assert apart, f"{one['type']} overlaps {other['type']}"


def test_nodes_lie_in_a_titled_group(workflow):
    for node in workflow["nodes"]:
        assert any(group["title"] and holds(group, box(node)) for group in workflow["groups"]), (
            f"{node['type']} lies in no group"
        )


def test_groups_do_not_overlap(workflow):
    for one, other in itertools.combinations(workflow["groups"], 2):
        (left, top, width, height), (x, y, x_width, y_height) = one["bounding"], other["bounding"]
        apart = left + width <= x or x + x_width <= left or top + height <= y or y + y_height <= top
        assert apart, f"{one['title']} overlaps {other['title']}"


def test_wires_run_forward(workflow):
    for wire in wires(workflow):
        for (x, _), (x_next, _) in itertools.pairwise(wire["stations"]):
            assert x <= x_next, f"{wire['name']} runs backwards"


def test_wires_pass_no_node(workflow):
    for wire in wires(workflow):
        for node in workflow["nodes"]:
            if node["id"] in wire["ends"]:
                continue
            left, top, right, bottom = box(node)
            inside = [(x, y) for x, y in wire["path"] if left <= x <= right and top <= y <= bottom]
            assert not inside, f"{wire['name']} runs through {node['type']}"


def test_wires_between_different_nodes_do_not_cross(workflow):
    """Into or out of one node they may: the order of its sockets is not ours to choose."""
    for one, other in itertools.combinations(wires(workflow), 2):
        if one["target"] == other["target"] or one["origin"] == other["origin"]:
            continue
        pairs = itertools.product(
            itertools.pairwise(one["path"]), itertools.pairwise(other["path"])
        )
        assert not any(cross(*a, *b) for a, b in pairs), f"{one['name']} crosses {other['name']}"


def test_a_crossing_is_seen():
    assert cross((0, 0), (10, 10), (0, 10), (10, 0))
    assert not cross((0, 0), (10, 0), (0, 10), (10, 10))


def box(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def holds(group: dict, inner: tuple[float, float, float, float]) -> bool:
    (x, y, width, height), (left, top, right, bottom) = group["bounding"], inner
    return x <= left and y <= top and right <= x + width and bottom <= y + height


def wires(workflow: dict) -> list[dict]:
    """Each link with its ends, the stations on its way and the points of its drawn path."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    reroutes = {each["id"]: each for each in workflow["extra"].get("reroutes", ())}
    last = {e["id"]: e["parentId"] for e in workflow["extra"].get("linkExtensions", ())}
    found = []
    for number, origin, origin_slot, target, target_slot, kind in workflow["links"]:
        between = []
        parent = last.get(number)
        while parent is not None:
            between.insert(0, tuple(reroutes[parent]["pos"]))
            parent = reroutes[parent].get("parentId")
        start, end = outgoing(nodes[origin], origin_slot), incoming(nodes[target], target_slot)
        stations = [start, *between, end]
        found.append(
            {
                "name": f"{kind} from {nodes[origin]['type']} to {nodes[target]['type']}",
                "origin": origin,
                "target": target,
                "ends": {origin, target},
                "stations": stations,
                "path": stations if between else curve(start, end),
            }
        )
    return found


def outgoing(node: dict, slot: int) -> tuple[float, float]:
    return node["pos"][0] + node["size"][0], node["pos"][1] + ROW * (slot + 0.7)


def incoming(node: dict, slot: int) -> tuple[float, float]:
    """A socket's place; those that stand for a widget are beside it."""
    x, y = node["pos"]
    widgets = [i for i in node["inputs"] if "widget" in i]
    if node["inputs"][slot] in widgets:
        rows = max(len(node["inputs"]) - len(widgets), len(node["outputs"]))
        return x, y + ROW * rows + WIDGET_ROW * widgets.index(node["inputs"][slot]) + 16
    return x, y + ROW * (slot + 0.7)


def curve(start, end) -> list[tuple[float, float]]:
    """Points of the cubic curve that the page draws between two sockets."""
    (x, y), (x_end, y_end) = start, end
    pull = math.dist(start, end) / 4
    points = [(x, y), (x + pull, y), (x_end - pull, y_end), (x_end, y_end)]
    return [
        tuple(
            sum(
                math.comb(3, k) * t**k * (1 - t) ** (3 - k) * point[axis]
                for k, point in enumerate(points)
            )
            for axis in (0, 1)
        )
        for t in (step / CURVE_POINTS for step in range(CURVE_POINTS + 1))
    ]


def cross(a, b, c, d) -> bool:
    """Whether the lines a-b and c-d have a point in common other than by touching."""

    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
