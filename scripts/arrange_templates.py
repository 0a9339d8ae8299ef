"""Lays the example workflows out alike: columns of groups, nodes of one width, wires on lanes.

    python scripts/arrange_templates.py [NAME ...]

Groups whose left edges are near each other are a column; a group's nodes are those whose middle is
in it. Order in a column is from top to bottom. So a template is drawn roughly in the page, saved,
and arranged: sizes come from the table below, which leaves room for what a node shows after a run.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "example_workflows"
NOTES = ("Note", "MarkdownNote")

# LiteGraph's: a title is drawn above its node; sockets and widgets below, a row each.
TITLE, ROW, WIDGET_ROW = 30, 20, 24
CURVE_POINTS = 24
# Of a group around its nodes, its title's height, and the gaps between columns, groups and nodes.
PAD, GROUP_TITLE, COLUMN_GAP, GROUP_GAP, NODE_GAP = 15, 36, 40, 20, 16
# Distance of wires beside each other.
LANE = 14
COLUMN_TOLERANCE = 60
WIDTH = 300

# Width and height by type, with room for a report, a preview or a prompt. None takes WIDTH.
SIZES: dict[str, tuple[int | None, int]] = {
    "CLIPTextEncode": (380, 150),
    "Canny": (None, 86),
    "ImageScaleBy": (None, 82),
    "K2Approximate": (None, 86),
    "K2Composite": (None, 100),
    "K2ContactSheet": (None, 200),
    "K2ControlLora": (None, 340),
    "K2CropForInpaint": (None, 190),
    "K2Detailer": (390, 760),
    "K2Edit": (420, 660),
    "K2EmptyLatent": (None, 256),
    "K2FitImage": (None, 246),
    "K2Grid": (460, 660),
    "K2GuidanceSchedule": (None, 134),
    "K2Inpaint": (None, 226),
    "K2Loader": (390, 194),
    "K2LoraLoader": (420, 260),
    "K2ModelLoader": (390, 106),
    "K2ModelSampling": (None, 162),
    "K2NegativeGuidance": (None, 178),
    "K2Outpaint": (None, 230),
    "K2PromptBatch": (400, 380),
    "K2Describe": (400, 480),
    "K2PromptExpander": (400, 480),
    "K2Reference": (None, 350),
    "K2Regions": (440, 770),
    "K2Sampler": (None, 400),
    "K2Stitch": (None, 100),
    "K2StyleLora": (420, 380),
    "K2StyleMix": (400, 640),
    "K2StyleTransfer": (None, 500),
    "K2Styles": (460, 860),
    "K2TapWeights": (None, 326),
    "K2TextEncode": (400, 330),
    "K2TextEncodeImages": (400, 600),
    "K2TrainLora": (400, 590),
    "K2TwoStage": (None, 330),
    "K2RotaryScaling": (None, 162),
    "K2SparseAttention": (None, 154),
    "K2TiledSampling": (None, 290),
    "K2Upscale": (None, 560),
    "K2VAEDecode": (None, 46),
    "K2VAEEncode": (None, 46),
    "K2Vary": (None, 200),
    "K2Walk": (None, 280),
    "KSampler": (None, 266),
    "LoadImage": (None, 320),
    "LoraModelLoader": (None, 106),
    "PreviewImage": (None, 260),
    "RebatchImages": (None, 58),
    "SaveAnimatedWEBP": (360, 400),
    "SaveImage": (360, 400),
    "VAEDecode": (None, 46),
}

# Below a node, in its group: the page shows previews of a run there, and the node grows by them.
ROOM = {
    "K2Grid": 720,
    "K2Loader": 80,
    "K2Regions": 140,
    "K2Sampler": 200,
    "K2TrainLora": 270,
    "K2TwoStage": 230,
    "K2Upscale": 180,
    "KSampler": 230,
}
# Widgets of a sampler before start_sigma, and the height of the lines that it adds to the report.
BEFORE_SIGMA, SIGMA_LINES = 10, 44


def size_of(node: dict) -> tuple[int, int]:
    """Width and height of a node; a note's height follows its text."""
    if node["type"] in NOTES:
        return 390, note_height(node["widgets_values"][0])
    width, height = SIZES[node["type"]]
    return width or WIDTH, height


def room_of(node: dict) -> int:
    room = ROOM.get(node["type"], 0)
    if node["type"] == "K2Sampler" and any(node["widgets_values"][BEFORE_SIGMA:]):
        room += SIGMA_LINES
    return room


def note_height(text: str) -> int:
    """Height at which a note shows its text without scrolling, at the width of a loader."""
    height = 50
    for line in text.splitlines():
        if line.startswith("#"):
            height += 34
        elif line.startswith("| ---"):
            continue
        elif line.startswith("|"):
            height += 22
        elif line:
            height += 15 * math.ceil(len(line) / 66) + 10
    return height


def arrange(workflow: dict) -> int:
    """Place groups, nodes and wires of a workflow; returns the number of wires that cross."""
    x = bottom = 0
    for groups in columns_of(workflow):
        members = [(group, nodes_of(workflow, group)) for group in groups]
        width = max(size_of(node)[0] for _, nodes in members for node in nodes)
        y = 0
        for group, nodes in members:
            top = y
            y += GROUP_TITLE
            for node in nodes:
                y += TITLE
                node["pos"], node["size"] = [x + PAD, y], [width, size_of(node)[1]]
                y += node["size"][1] + room_of(node) + NODE_GAP
            y += PAD - NODE_GAP
            group["bounding"] = [x, top, width + 2 * PAD, y - top]
            bottom = max(bottom, y)
            y += GROUP_GAP
        x += width + 2 * PAD + COLUMN_GAP
    workflow["extra"] = {
        key: value
        for key, value in workflow["extra"].items()
        if key not in ("reroutes", "linkExtensions")
    }
    crossings = route(workflow)
    # The page fits the view itself; this is for older ones.
    workflow["extra"]["ds"] = {"scale": 0.7, "offset": [110, 120]}
    return crossings


def columns_of(workflow: dict) -> list[list[dict]]:
    columns: list[list[dict]] = []
    for group in sorted(workflow["groups"], key=lambda group: group["bounding"][0]):
        left = group["bounding"][0]
        if not columns or left - columns[-1][0]["bounding"][0] > COLUMN_TOLERANCE:
            columns.append([])
        columns[-1].append(group)
    return [sorted(column, key=lambda group: group["bounding"][1]) for column in columns]


def nodes_of(workflow: dict, group: dict) -> list[dict]:
    left, top, width, height = group["bounding"]
    nodes = []
    for node in workflow["nodes"]:
        (x, y), (node_width, node_height) = node["pos"], node["size"]
        if (
            left <= x + node_width / 2 <= left + width
            and top <= y + node_height / 2 <= top + height
        ):
            nodes.append(node)
    return sorted(nodes, key=lambda node: node["pos"][1])


def route(workflow: dict) -> int:
    """Give wires reroutes where they would run through nodes or cross.

    Wires are placed one after the other, short ones first; where some still cross, each of them in
    turn is placed before all others. Returns the faults that remain, 0 where there are none.
    """
    links = sorted(workflow["links"], key=lambda link: _span(workflow, link))
    best = _place(workflow, links)
    for first in links:
        if not best[0]:
            break
        rest = [link for link in links if link is not first]
        best = min(best, _place(workflow, [first, *rest]), key=lambda each: each[0])
    for link, stations in best[1]:
        _write_reroutes(workflow, link, stations)
    return best[0]


def _place(workflow: dict, links: list) -> tuple[int, list[tuple[int, list]]]:
    """Stations of each link, for the order of placing; with the number of faults before them."""
    placed: list[dict] = []
    ways, total = [], 0
    for link in links:
        best = None
        for stations in _ways(workflow, link):
            wire = wire_of(workflow, link, stations)
            through = sum(passes(wire, node) for node in workflow["nodes"])
            faults = 10 * through + sum(
                crosses(wire, other) + overlap(wire, other) for other in placed
            )
            if best is None or faults < best[0]:
                best = faults, wire, stations
            if not faults:
                break
        assert best is not None
        placed.append(best[1])
        ways.append((link[0], best[2]))
        total += best[0]
    return total, ways


def _span(workflow: dict, link: list) -> tuple[float, int]:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    return nodes[link[3]]["pos"][0] - nodes[link[1]]["pos"][0], link[0]


def _ways(workflow: dict, link: list) -> Iterator[list[tuple[int, int]]]:
    """Ways of a wire, the shortest first: straight, or along a lane between groups."""
    yield []
    nodes = {node["id"]: node for node in workflow["nodes"]}
    origin, target = nodes[link[1]], nodes[link[3]]
    left = origin["pos"][0] + origin["size"][0] + PAD
    right = target["pos"][0] - PAD
    boxes = [group["bounding"] for group in workflow["groups"]]
    between = [box for box in boxes if left < box[0] + box[2] and box[0] < right]
    if right <= left or not between:
        return
    upper, lower = min(b[1] for b in between), max(b[1] + b[3] for b in between)
    gaps = [upper - LANE * n for n in range(1, 6)] + [lower + LANE * n for n in range(1, 6)]
    edges = sorted((box[1] + box[3], other[1]) for box in between for other in between)
    gaps += [(a + b) // 2 for a, b in edges if 0 < b - a <= GROUP_GAP]
    start, end = outgoing(origin, link[2])[1], incoming(target, link[4])[1]
    gaps.sort(key=lambda y: abs(y - start) + abs(y - end))
    offsets = range(8, COLUMN_GAP - 4, 8)
    for y in gaps:
        for first, last in itertools.product(offsets, offsets):
            yield [(round(left + first), round(y)), (round(right - last), round(y))]


def _write_reroutes(workflow: dict, link: int, stations: list[tuple[int, int]]) -> None:
    if not stations:
        return
    reroutes = workflow["extra"].setdefault("reroutes", [])
    for index, (x, y) in enumerate(stations):
        number = len(reroutes) + 1
        parent = {"parentId": number - 1} if index else {}
        reroutes.append({"id": number, **parent, "pos": [x, y], "linkIds": [link]})
    extensions = workflow["extra"].setdefault("linkExtensions", [])
    extensions.append({"id": link, "parentId": len(reroutes)})


def wires(workflow: dict) -> list[dict]:
    """Each link with its ends, the stations on its way and the points of its drawn path."""
    reroutes = {each["id"]: each for each in workflow["extra"].get("reroutes", ())}
    last = {e["id"]: e["parentId"] for e in workflow["extra"].get("linkExtensions", ())}
    found = []
    for link in workflow["links"]:
        between: list[tuple[int, int]] = []
        parent = last.get(link[0])
        while parent is not None:
            between.insert(0, tuple(reroutes[parent]["pos"]))
            parent = reroutes[parent].get("parentId")
        found.append(wire_of(workflow, link, between))
    return found


def wire_of(workflow: dict, link: list, between: list[tuple[int, int]]) -> dict:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    _, origin, origin_slot, target, target_slot, kind = link
    start, end = outgoing(nodes[origin], origin_slot), incoming(nodes[target], target_slot)
    stations = [start, *between, end]
    return {
        "name": f"{kind} from {nodes[origin]['type']} to {nodes[target]['type']}",
        "origin": origin,
        "target": target,
        "ends": {origin, target},
        # A node feeds the next one below it in its column.
        "turns": nodes[origin]["pos"][0] == nodes[target]["pos"][0],
        "stations": stations,
        "path": stations if between else curve(start, end),
    }


def passes(wire: dict, node: dict) -> bool:
    """True if a wire runs through a node that is neither of its ends."""
    if node["id"] in wire["ends"]:
        return False
    left, top, right, bottom = box(node)
    points = [
        (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t)
        for a, b in itertools.pairwise(wire["path"])
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    return any(left < x < right and top < y < bottom for x, y in points)


def crosses(one: dict, other: dict) -> bool:
    """True if wires between different nodes cross; the order of sockets is not ours to choose.

    A wire that turns back to the node below may cross one into the node that it leaves.
    """
    if one["target"] == other["target"] or one["origin"] == other["origin"]:
        return False
    for turning, entering in ((one, other), (other, one)):
        if turning["turns"] and turning["origin"] == entering["target"]:
            return False
    pairs = itertools.product(itertools.pairwise(one["path"]), itertools.pairwise(other["path"]))
    return any(cross(*a, *b) for a, b in pairs)


def overlap(one: dict, other: dict) -> bool:
    """True if two wires share a lane."""
    for (x, y), (x_end, y_end) in itertools.pairwise(one["stations"][1:-1]):
        for (u, v), (u_end, v_end) in itertools.pairwise(other["stations"][1:-1]):
            is_flat = abs(y - y_end) < 2 and abs(v - v_end) < 2
            if is_flat and abs(y - v) < LANE / 2 and max(x, u) < min(x_end, u_end):
                return True
    return False


def box(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


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
        (
            sum(_weight(k, t) * point[0] for k, point in enumerate(points)),
            sum(_weight(k, t) * point[1] for k, point in enumerate(points)),
        )
        for t in (step / CURVE_POINTS for step in range(CURVE_POINTS + 1))
    ]


def _weight(k: int, t: float) -> float:
    return math.comb(3, k) * t**k * (1 - t) ** (3 - k)


def cross(a, b, c, d) -> bool:
    """True if the lines a-b and c-d have a point in common other than by touching."""

    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def scale_of(workflow: dict, width: int = 1920, height: int = 1075) -> float:
    """Zoom at which a page of this size opens a workflow: its nodes fill three quarters."""
    boxes = [box(node) for node in workflow["nodes"]]
    nodes_width = max(b[2] for b in boxes) - min(b[0] for b in boxes) + 20
    nodes_height = max(b[3] for b in boxes) - min(b[1] for b in boxes) + 20
    return 0.75 * min(width / nodes_width, height / nodes_height)


def dump(value, indent: int = 0, before: int = 0) -> str:
    """JSON with what fits on a line of 100 columns on one; before: columns already used."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + before + len(line) < 100 or not isinstance(value, (dict, list)) or not value:
        return line
    inner = " " * (indent + 2)
    if isinstance(value, dict):
        keys = {key: json.dumps(key, ensure_ascii=False) + ": " for key in value}
        lines = [keys[k] + dump(v, indent + 2, len(keys[k])) for k, v in value.items()]
    else:
        lines = [dump(each, indent + 2) for each in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return start + "\n" + ",\n".join(inner + each for each in lines) + "\n" + " " * indent + end


def main(names: list[str]) -> None:
    for path in sorted(EXAMPLES.glob("*.json")):
        if names and path.stem not in names:
            continue
        workflow = json.loads(path.read_text(encoding="utf-8"))
        crossings = arrange(workflow)
        path.write_text(dump(workflow) + "\n", encoding="utf-8")
        print(f"{path.stem}: opens at {scale_of(workflow):.2f}, faults of wires: {crossings}")


if __name__ == "__main__":
    main(sys.argv[1:])
