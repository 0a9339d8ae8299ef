"""The example workflows, read without the page: wires, values, files. Layout: test_layout.py.

Each has a twin of the same name in tests/workflows, written in the API's format. The twin's inputs
stand in the order of the node's schema, which is the order of a workflow's positional values.
"""

import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
PACK = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
# Shown on the page alone, never part of a prompt.
NOTES = {"Note", "MarkdownNote"}
# What stands for a subgraph's outputs, inside it.
OUTPUT_NODE = -20
SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize"}
# These seeds stay from run to run: another one would not resume a training, and would be that of
# another picture.
WITHOUT_CONTROL = {"K2TrainLora": {"seed"}, "K2Vary": {"seed"}, "K2Walk": {"end_seed"}}


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request) -> Path:
    return request.param


@pytest.fixture
def workflow(example) -> dict:
    return json.loads(example.read_text(encoding="utf-8"))


@pytest.fixture
def twin(example) -> dict:
    return json.loads((ROOT / "tests" / "workflows" / example.name).read_text(encoding="utf-8"))


def test_there_are_examples():
    twins = (ROOT / "tests" / "workflows").glob("*.json")
    assert {path.stem for path in EXAMPLES} == {path.stem for path in twins}
    assert {path.stem for path in EXAMPLES} >= {
        "krea2_control",
        "krea2_describe",
        "krea2_edit",
        "krea2_image_to_image",
        "krea2_inpaint",
        "krea2_detailer",
        "krea2_inpaint_detail",
        "krea2_lora",
        "krea2_nano_first_image",
        "krea2_outpaint",
        "krea2_prompt_batch",
        "krea2_prompt_expander",
        "krea2_prompt_weights",
        "krea2_prompt_with_images",
        "krea2_raw_faster",
        "krea2_raw_text_to_image",
        "krea2_raw_then_turbo",
        "krea2_reference",
        "krea2_regions",
        "krea2_stock_nodes",
        "krea2_style_mix",
        "krea2_styles",
        "krea2_tiled_sampling",
        "krea2_turbo_negative",
        "krea2_upscale",
        "krea2_vary",
        "krea2_walk",
        "krea2_turbo_text_to_image",
    }


def test_there_is_a_blueprint():
    assert "Krea 2 text to image" in {path.stem for path in BLUEPRINTS}


def test_links_join_sockets_of_their_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]), "a node id is used twice"
    assert len(links) == len(workflow["links"]), "a link id is used twice"
    assert workflow["last_node_id"] >= max(nodes)
    assert workflow["last_link_id"] >= max(links)
    for number, origin, origin_slot, target, target_slot, kind in links.values():
        output = nodes[origin]["outputs"][origin_slot]
        assert output["type"] == kind and number in output["links"]
        socket = nodes[target]["inputs"][target_slot]
        assert socket["type"] == kind and socket["link"] == number
    for node in nodes.values():
        for socket in node["inputs"]:
            assert socket["link"] is None or socket["link"] in links
        for output in node["outputs"]:
            assert set(output["links"] or ()) <= set(links)


def test_reroutes_belong_to_links(workflow):
    """A link names its last reroute, and each reroute the one before it."""
    links = {link[0] for link in workflow["links"]}
    reroutes = {reroute["id"]: reroute for reroute in workflow["extra"].get("reroutes", ())}
    reached = set()
    for extension in workflow["extra"].get("linkExtensions", ()):
        assert extension["id"] in links
        parent = extension["parentId"]
        while parent is not None:
            assert extension["id"] in reroutes[parent]["linkIds"]
            reached.add(parent)
            parent = reroutes[parent].get("parentId")
    assert reached == set(reroutes)


def test_values_equal_the_api_twin(workflow, twin):
    prompt = {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": _linked(node, workflow["links"])
            | _by_position(node, twin[str(node["id"])]["inputs"]),
        }
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    }
    assert prompt == twin


def test_thumbnail_is_a_small_jpeg(example):
    thumbnail = example.with_suffix(".jpg")
    with Image.open(thumbnail) as image:
        image.load()
        assert image.format == "JPEG"
        assert 320 <= image.width <= 1024
    assert thumbnail.stat().st_size < 150_000


def test_loaders_say_where_their_files_come_from(workflow):
    loaders = [node for node in workflow["nodes"] if _files(node)]
    assert loaders or "built in" in json.dumps(workflow)
    notes = "\n".join(
        node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES
    )
    for node in loaders:
        models = node["properties"]["models"]
        assert set(_files(node)) <= {model["name"] for model in models}
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            # Other people's repositories have folders of their own.
            folder = f"{model['directory']}/" if "/Comfy-Org/" in model["url"] else ""
            assert "/resolve/main/" in model["url"]
            assert model["url"].endswith(f"/{folder}{model['name']}")
            assert model["directory"] in {"diffusion_models", "text_encoders", "vae", "loras"}
            assert f"[{model['name']}]({model['url']}) | `{model['directory']}` |" in notes


def test_nodes_name_their_pack(workflow):
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        properties = node["properties"]
        assert properties["Node name for S&R"] == node["type"]
        assert properties["cnr_id"] == (PACK if node["type"].startswith("K2") else "comfy-core")
        assert properties["ver"]


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_blueprint_is_one_node_whose_inputs_lead_inside(file):
    """The page lists a blueprint by the name of its file."""
    blueprint = json.loads(file.read_text(encoding="utf-8"))
    (node,), (inside,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == inside["id"]
    assert node["title"] == inside["name"] == file.stem
    assert inside["category"] and inside["description"]
    assert [i["name"] for i in node["inputs"]] == [i["name"] for i in inside["inputs"]]
    nodes = {each["id"]: each for each in inside["nodes"]}
    links = {link["id"]: link for link in inside["links"]}
    widgets = []
    for given in inside["inputs"]:
        (link,) = (links[number] for number in given["linkIds"])
        socket = nodes[link["target_id"]]["inputs"][link["target_slot"]]
        assert socket["link"] == link["id"] and socket["type"] == given["type"]
        widgets.append([str(link["target_id"]), socket["widget"]["name"]])
    assert node["properties"]["proxyWidgets"] == widgets
    for each in nodes.values():
        names = [i["name"] for i in each["inputs"] if "widget" in i]
        controls = [name for name in names if name.endswith("seed")]
        # Values go by position, so none may be left out before the last.
        assert names == _widgets_of(each["type"])[: len(names)], each["type"]
        assert len(each.get("widgets_values", ())) == len(names) + len(controls), each["type"]
    (output,) = inside["outputs"]
    assert [links[number]["target_id"] for number in output["linkIds"]] == [OUTPUT_NODE]


def _linked(node: dict, links: list) -> dict:
    """A node's linked inputs as the API writes them."""
    origins = {link[0]: [str(link[1]), link[2]] for link in links}
    return {i["name"]: origins[i["link"]] for i in node["inputs"] if i["link"] is not None}


def _by_position(node: dict, inputs: dict) -> dict:
    """A node's widget values by name, without those that a wire or a button stands for."""
    widgets = [i for i in node["inputs"] if "widget" in i]
    names = [i["name"] for i in widgets]
    values = list(node.get("widgets_values", ()))
    stay = WITHOUT_CONTROL.get(node["type"], set())
    seeds = [name for name in names if name.endswith("seed") and name not in stay]
    for seed in seeds:
        assert values.pop(names.index(seed) + 1) in SEED_CONTROLS
    given = dict(zip(names, values, strict=True))
    for unused in widgets:
        if unused["link"] is not None or unused["type"] == "IMAGEUPLOAD":
            del given[unused["name"]]
    assert list(given) == [name for name, value in inputs.items() if not isinstance(value, list)]
    return given


def _widgets_of(node_type: str) -> list[str]:
    """Every widget of a type of node, in order, as the twins of the examples have them."""
    twins = (json.loads(path.read_text("utf-8")) for path in (ROOT / "tests/workflows").iterdir())
    nodes = (node for twin in twins for node in twin.values() if node["class_type"] == node_type)
    values = ([k for k, v in node["inputs"].items() if not isinstance(v, list)] for node in nodes)
    return max(values, key=len, default=[])


def _files(node: dict) -> list[str]:
    values = () if node["type"] in NOTES else node.get("widgets_values", ())
    return [v for v in values if isinstance(v, str) and v.endswith((".safetensors", ".sft"))]
