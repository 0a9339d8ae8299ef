"""How the example workflows lie on the canvas: readable as they open, groups that hold their nodes
after a run, wires forward and apart. scripts/arrange_templates.py lays them out.

Sizes and sockets are LiteGraph's, the page's canvas. Its curves around reroutes are taken for
straight lines.
"""

import copy
import itertools
import json
from pathlib import Path

import pytest

from arrange_templates import (
    NOTES,
    SIZES,
    arrange,
    box,
    cross,
    crosses,
    overlap,
    passes,
    room_of,
    scale_of,
    size_of,
    wires,
)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
# Below this zoom the page draws no text: 8 px of letters of 14.
LEAST_ZOOM = 0.6


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def workflow(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_text_is_drawn_as_a_template_opens(workflow):
    """On a screen of 1920 x 1080."""
    assert scale_of(workflow) >= LEAST_ZOOM


def test_the_zoom_follows_the_larger_side():
    node = {"pos": [0, 30], "size": [2380, 100]}
    assert scale_of({"nodes": [node]}) == pytest.approx(0.6)
    node = {"pos": [0, 30], "size": [100, 1025]}
    assert scale_of({"nodes": [node]}) == pytest.approx(0.75)


def test_nodes_have_room_for_what_they_show_after_a_run(workflow):
    """The tool's sizes, which a run was seen to need; tests/browser measures it."""
    for node in workflow["nodes"]:
        width, height = size_of(node)
        assert node["size"][0] >= width and node["size"][1] >= height, node["type"]


def test_what_shows_a_picture_is_of_modest_size(workflow):
    for node in workflow["nodes"]:
        if node["type"] in ("SaveImage", "PreviewImage", "LoadImage"):
            assert max(node["size"]) <= 450


def test_notes_are_markdown_in_a_readable_colour(workflow):
    notes = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert notes
    for note in notes:
        assert note["type"] == "MarkdownNote"
        # The page's own for notes; black has no edge on its canvas.
        assert (note["color"], note["bgcolor"]) == ("#432", "#653")


def test_titles_are_short(workflow):
    titles = [group["title"] for group in workflow["groups"]]
    titles += [node["title"] for node in workflow["nodes"] if "title" in node]
    assert all(0 < len(title) <= 26 for title in titles), titles


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


def test_groups_are_filled(workflow):
    """A group ends where its last node does after a run."""
    for group in workflow["groups"]:
        inside = [node for node in workflow["nodes"] if holds(group, box(node))]
        assert inside, f"{group['title']} is empty"
        x, y, width, height = group["bounding"]
        right = max(box(node)[2] for node in inside)
        bottom = max(box(node)[3] + room_of(node) for node in inside)
        assert 0 <= x + width - right <= 20
        assert 0 <= y + height - bottom <= 20


def test_groups_do_not_overlap(workflow):
    for one, other in itertools.combinations(workflow["groups"], 2):
        (left, top, width, height), (x, y, x_width, y_height) = one["bounding"], other["bounding"]
        apart = left + width <= x or x + x_width <= left or top + height <= y or y + y_height <= top
        assert apart, f"{one['title']} overlaps {other['title']}"


def test_wires_run_forward(workflow):
    """To a column further right, or to the node right below."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for wire in wires(workflow):
        if wire["turns"]:
            origin, target = nodes[wire["origin"]], nodes[wire["target"]]
            assert origin["pos"][1] < target["pos"][1], f"{wire['name']} runs up"
            continue
        for (x, _), (x_next, _) in itertools.pairwise(wire["stations"]):
            assert x <= x_next, f"{wire['name']} runs backwards"


def test_wires_pass_no_node(workflow):
    for wire in wires(workflow):
        for node in workflow["nodes"]:
            assert not passes(wire, node), f"{wire['name']} runs through {node['type']}"


def test_wires_between_different_nodes_do_not_cross(workflow):
    for one, other in itertools.combinations(wires(workflow), 2):
        assert not crosses(one, other), f"{one['name']} crosses {other['name']}"


def test_wires_have_lanes_of_their_own(workflow):
    for one, other in itertools.combinations(wires(workflow), 2):
        assert not overlap(one, other), f"{one['name']} lies on {other['name']}"


def test_a_crossing_is_seen():
    assert cross((0, 0), (10, 10), (0, 10), (10, 0))
    assert not cross((0, 0), (10, 0), (0, 10), (10, 10))


def test_arranging_again_changes_nothing(workflow):
    again = copy.deepcopy(workflow)
    assert arrange(again) == 0
    assert again == workflow


def test_every_type_has_a_size(workflow):
    assert {node["type"] for node in workflow["nodes"]} <= {*SIZES, *NOTES}


def holds(group: dict, inner: tuple[float, float, float, float]) -> bool:
    (x, y, width, height), (left, top, right, bottom) = group["bounding"], inner
    return x <= left and y <= top and right <= x + width and bottom <= y + height
