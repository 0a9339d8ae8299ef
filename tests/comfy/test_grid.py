"""Krea 2 Grid: each cell is a run of Krea 2 Sampler; what it writes, keeps and refuses."""

import json

import comfy.model_management
import comfy.utils
import numpy as np
import pytest
import torch
from comfy_api.latest import io
from PIL import Image
from safetensors.torch import load_file, save_file

from headless import JobError
from in_process import NODES

NANO, NANO_RAW = "krea2-nano (built in)", "krea2-nano Raw (built in)"
STYLE, REFERENCE = "krea2-nano notebook (built in)", "krea2-nano reference (built in)"
PROMPT = "a red circle on white"
SIZE = {"aspect": "custom", "width": 64, "height": 48}
# A grid is posted so.
GRAPH = {
    "1": {"class_type": "K2Loader", "inputs": {
        "model": NANO, "text_encoder": "auto", "vae": "auto", "dtype": "auto"}},
    "2": {"class_type": "K2LoraLoader", "inputs": {
        "model": ["1", 0], "clip": ["1", 1], "lora": REFERENCE, "strength": 0.5,
        "clip_strength": 1.0}},
    "3": {"class_type": "K2EmptyLatent", "inputs": SIZE | {"megapixels": 1.0, "batch": 1}},
    "7": {"class_type": "K2Grid", "inputs": {
        "model": ["2", 0], "clip": ["1", 1], "vae": ["1", 2], "latent": ["3", 0],
        "prompt": PROMPT, "negative": "", "preset": "custom", "seed": 3, "steps": 2,
        "guidance": 0.0, "denoise": 1.0, "sampler": "euler", "shift": "auto", "mu": 1.15,
        "x_axis": "seed", "x_values": "4\n9", "y_axis": "prompt part",
        "y_values": "circle\nstar", "z_axis": "none", "z_values": "", "lora": "none",
        "filename_prefix": "krea2_grid/posted", "max_cells": 100}},
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(run):
    """MODEL, CLIP, VAE and latent."""
    return (*run("K2Loader", model=NANO), run("K2EmptyLatent", **SIZE)[0])


@pytest.fixture
def grid(run, parts):
    """The node on krea2-nano, two steps; images as a list of batches."""
    names = dict(zip(("model", "clip", "vae", "latent"), parts, strict=True))
    options = {"prompt": PROMPT, "preset": "custom", "steps": 2, "guidance": 0.0, "seed": 3}
    return lambda **own: run("K2Grid", **(names | options | own))


@pytest.fixture
def single(run, parts):
    """The picture (H, W, 3) of Krea 2 Sampler."""

    def call(
        prompt=PROMPT,
        negative="",
        loras=(),
        weights=None,
        model=None,
        latent=None,
        styles="",
        **sampler,
    ):
        wired, clip, vae, empty = parts
        wired = wired if model is None else run("K2ModelLoader", file=model)[0]
        for lora, strength in loras:
            wired, clip, _ = run(
                "K2LoraLoader", model=wired, clip=clip, lora=lora, strength=strength,
                clip_strength=strength,
            )  # fmt: skip
        positive, without = run("K2TextEncode", clip=clip, prompt=prompt, negative=negative)
        if styles:
            wired, positive, without, *_ = run(
                "K2Styles", model=wired, clip=clip, vae=vae, prompt=prompt, negative=negative,
                styles=styles,
            )  # fmt: skip
        if weights:
            (positive,) = run("K2TapWeights", conditioning=positive, **weights)
        options = {"preset": "custom", "steps": 2, "guidance": 0.0, "seed": 3} | sampler
        (samples,) = run(
            "K2Sampler", model=wired, positive=positive, negative=without,
            latent=latent or empty, **options,
        )  # fmt: skip
        return run("K2VAEDecode", samples=samples, vae=vae)[0][0]

    return call


def latent_of(width, height):
    return {"samples": torch.zeros(1, 16, 1, height // 8, width // 8)}


AXES = {
    "prompt": ("a blue star\na green ring", [{"prompt": "a blue star"},
                                             {"prompt": "a green ring"}]),
    "prompt part": ("red circle\nblue star", [{}, {"prompt": "a blue star on white"}]),
    "negative": ('""\nblue', [{"guidance": 2.0}, {"negative": "blue", "guidance": 2.0}]),
    "seed": ("1-2\n7", [{"seed": 1}, {"seed": 2}, {"seed": 7}]),
    "steps": ("1\n3", [{"steps": 1}, {"steps": 3}]),
    "guidance": ("0\n1.5", [{"guidance": 0.0}, {"guidance": 1.5}]),
    "mu": ("0.5-1:0.5", [{"shift": "fixed", "mu": 0.5}, {"shift": "fixed", "mu": 1.0}]),
    "denoise": ("0.5\n1", [{"denoise": 0.5}, {"denoise": 1.0}]),
    "sampler": ("euler\ndpmpp_2m", [{}, {"sampler": "dpmpp_2m"}]),
    "size": ("48 x 64\n64x64", [{"latent": latent_of(48, 64)}, {"latent": latent_of(64, 64)}]),
    "lora": (f"none\n{STYLE}:0.5;{REFERENCE}", [{}, {"loras": [(STYLE, 0.5), (REFERENCE, 1.0)]}]),
    "layer weights": (
        "35=4, 2=0\n" + ",".join(["1"] * 11 + ["2"]),
        [{"weights": {"layer_35": 4.0, "layer_2": 0.0}}, {"weights": {"layer_35": 2.0}}],
    ),
    "checkpoint": (f"{NANO_RAW}\n{NANO}", [{"model": NANO_RAW}, {}]),
    "style": (
        "none\nnano notebook:0.7; nano black ground",
        [{}, {"styles": "nano notebook: 0.7\nnano black ground"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", AXES)
def test_a_cell_is_a_run_of_the_sampler(grid, single, kind):
    text, expected = AXES[kind]
    options = {"guidance": 2.0} if kind == "negative" else {}
    _, images, report = grid(x_axis=kind, x_values=text, **options)
    pictures = [picture for batch in images for picture in batch]
    singles = [single(**one) for one in expected]
    for picture, one in zip(pictures, singles, strict=True):
        assert torch.equal(picture, one)
    assert singles[0].shape != singles[1].shape or not torch.equal(*singles[:2])
    # A batch where all are of one size.
    assert len(images) == len({one.shape for one in singles})
    numbers = [line.partition(":")[0] for line in report.splitlines()[-len(expected) :]]
    assert numbers == [str(number) for number in range(1, len(expected) + 1)]


def test_every_kind_of_axis_is_tested(run):
    (entry,) = [e for e in NODES["K2Grid"].GET_SCHEMA().inputs if e.id == "x_axis"]
    assert set(entry.options) == {"none", "lora strength", *AXES}


def test_three_axes_and_the_strength_of_a_lora(grid, single, pack):
    """In their order: x to the right, y down, z in blocks; with the node's own LoRA."""
    sheet, (images,), report = grid(
        x_axis="lora strength", x_values="0\n1", y_axis="prompt part", y_values="red\nblue",
        z_axis="seed", z_values="5-6", lora=STYLE,
    )  # fmt: skip
    cells = [(s, c, n) for n in (5, 6) for c in ("red", "blue") for s in (0.0, 1.0)]
    assert len(images) == len(cells)
    for image, (strength, colour, seed) in zip(images, cells, strict=True):
        prompt = f"a {colour} circle on white"
        assert torch.equal(image, single(prompt=prompt, loras=[(STYLE, strength)], seed=seed))
    assert report.splitlines()[-1] == "8: lora strength: 1, red: blue, seed: 6"
    places = [(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
    small = {
        place: Image.fromarray((255 * image.numpy()).clip(0, 255).astype(np.uint8))
        for place, image in zip(places, images, strict=True)
    }
    labels = (
        ["lora strength: 0", "lora strength: 1"], ["red: red", "red: blue"], ["seed: 5", "seed: 6"]
    )  # fmt: skip
    expected = pack("krea2_model.images.grid_sheet").grid_sheet(small, *labels)
    assert ((255 * sheet[0]).round().numpy() == np.asarray(expected)).all()


def test_presets_give_what_no_axis_does(grid, single):
    _, images, _ = grid(x_axis="steps", x_values="2", preset="auto", guidance=3.0)
    assert torch.equal(images[0][0], single(steps=2))
    _, images, _ = grid(x_axis="guidance", x_values="1", preset="auto", steps=3)
    assert torch.equal(images[0][0], single(steps=8, guidance=1.0))


def test_texts_are_encoded_and_models_made_once(grid, monkeypatch, pack):
    counts = {"texts": [], "loras": [], "models": []}

    def counted(module, name, kind, argument):
        before = getattr(pack(module), name)

        def call(*arguments, **options):
            counts[kind].append(arguments[argument])
            return before(*arguments, **options)

        monkeypatch.setattr(pack(module), name, call)

    counted("nodes.grid_run", "encode", "texts", 1)
    counted("nodes.grid_run", "load_model", "models", 0)
    grid(
        x_axis="seed", x_values="1-3", y_axis="checkpoint", y_values=f"{NANO}\n{NANO_RAW}",
        z_axis="prompt", z_values="a blue star\na red ring",
    )  # fmt: skip
    assert len(counts["models"]) == 2
    assert sorted(counts["texts"]) == [[""], ["a blue star"], ["a red ring"]]
    counts["texts"].clear()
    counted("nodes.grid_run", "apply_lora", "loras", 2)
    grid(x_axis="seed", x_values="1-3", y_axis="lora", y_values=f"none\n{STYLE}\n{REFERENCE}")
    # Once to check it before the first step, and once for its cells.
    assert len(counts["loras"]) == 4 and len(set(counts["loras"])) == 2
    assert sorted(counts["texts"]) == [[""], [PROMPT]]


BAD = {
    "no axis": ({}, "x_axis is none; expected at least one axis"),
    "no values": ({"x_values": " \n"}, "x_values is empty; expected values of seed"),
    "seed": ({"x_values": "1\n\nx"}, "x_values, line 3, is 'x': expected a whole number from 0"),
    "commas": ({"x_values": "1,2"}, "Write each value on a line of its own"),
    "range": ({"x_values": "4-1"}, "x_values, line 1, is '4-1': expected a range that rises"),
    "twice": ({"x_values": "1\n1"}, "x_values has 1 twice"),
    "steps": ({"x_axis": "steps", "x_values": "0"}, "expected a whole number from 1 to 1000"),
    "guidance": ({"x_axis": "guidance", "x_values": "nan"}, "expected a number from 0 to 100"),
    "size": ({"x_axis": "size", "x_values": "100x100"}, "expected width x height in multiples"),
    "sampler": ({"x_axis": "sampler", "x_values": "eule"}, "one of ComfyUI's samplers"),
    "weights": ({"x_axis": "layer weights", "x_values": "1,2"}, "expected 12 numbers"),
    "layer": ({"x_axis": "layer weights", "x_values": "3=1"}, "layers are 2, 5"),
    "no weights": ({"x_axis": "layer weights", "x_values": ",".join("0" * 12)}, "not all 0"),
    "lora": ({"x_axis": "lora", "x_values": f"{STYLE}\nmine.safetensors"},
             "x_values, line 2, is 'mine.safetensors': There is no 'mine.safetensors'"),
    "strength": ({"x_axis": "lora", "x_values": f"{STYLE}:1000"}, "a strength from -100 to 100"),
    "no lora": ({"x_axis": "lora strength", "x_values": "1"}, "lora strength without a LoRA"),
    "checkpoint": ({"x_axis": "checkpoint", "x_values": "none.gguf"}, "There is no 'none.gguf'"),
    "style": ({"x_axis": "style", "x_values": "Ink wash:0.5;Ink was"}, "Ink was"),
    "style weight": ({"x_axis": "style", "x_values": "Ink wash:3"}, "is 3.0; expected 0 (off)"),
    "part": ({"x_axis": "prompt part", "x_values": "Circle\nstar"},
             "x_values begins with 'Circle', which is not in the prompt"),
    "empty part": ({"x_axis": "prompt part", "x_values": '""\nstar'}, "is empty; expected a part"),
    "same": ({"y_axis": "seed", "y_values": "1"}, "x_axis and y_axis are both seed"),
    "cells": ({"y_axis": "steps", "y_values": "1-51"}, "102 cells, 2 of seed x 51 of steps; "
              "expected at most 100"),
    "kind": ({"x_axis": "cfg"}, "x_axis is 'cfg'; expected one of none, prompt"),
    "prefix": ({"filename_prefix": "../out"}, "filename_prefix is '../out'; expected a name in"),
    "absolute": ({"filename_prefix": "/tmp/out"}, "filename_prefix is '/tmp/out'; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_before_sampling(grid, pack, monkeypatch, case):
    options, message = BAD[case]
    options = {"x_axis": "seed", "x_values": "1-2"} | options
    if case == "no axis":
        options["x_axis"] = "none"
    others = {"y_axis": "none", "y_values": "", "z_axis": "none", "z_values": "", "lora": "none"}
    known = {"prompt": PROMPT, "filename_prefix": "grid", "max_cells": 100, **others, **options}
    verdict = NODES["K2Grid"].validate_inputs(**known)
    assert verdict is not True and message in verdict
    monkeypatch.setattr(pack("nodes.prepared_run").Run, "sample", None)
    with pytest.raises(ValueError) as raised:
        grid(**options)
    assert message in str(raised.value)


def test_inputs_that_do_not_fit_are_refused_before_sampling(
    grid, parts, run, models, pack, monkeypatch
):
    monkeypatch.setattr(pack("nodes.prepared_run").Run, "sample", None)
    seeds = {"x_axis": "seed", "x_values": "1-2"}
    with pytest.raises(ValueError, match="has 2 images; a cell has one"):
        grid(latent={"samples": torch.zeros(2, 16, 1, 6, 8)}, **seeds)
    with pytest.raises(ValueError, match="the latent is an image"):
        grid(x_axis="size", x_values="64x64", latent={"samples": torch.ones(1, 16, 1, 6, 8)})
    wired = run("K2LoraLoader", model=parts[0], lora=STYLE)[0]
    with pytest.raises(ValueError, match="the model has a LoRA or another change"):
        grid(model=wired, x_axis="checkpoint", x_values=NANO)
    tensors = load_file(models / "diffusion_models" / "krea2_tiny_raw.safetensors")
    tensors["txtfusion.layerwise_blocks.0.prenorm.scale"] = torch.ones(64)
    wide = models / "diffusion_models" / "other_text_raw.safetensors"
    save_file(tensors, wide)
    try:
        with pytest.raises(ValueError, match="clip gives text of width 160; .* needs 64"):
            grid(x_axis="checkpoint", x_values=f"{NANO}\n{wide.name}")
    finally:
        wide.unlink()
    with pytest.raises(ValueError, match="tokens; expected at most 10000"):
        grid(negative="red fox " * 25_000, **seeds)
    with pytest.raises(ValueError, match="vae is empty"):
        grid(vae=None, **seeds)
    with pytest.raises(ValueError, match="max_cells is 1001"):
        grid(max_cells=1001, **seeds)


def test_an_axis_of_a_link_is_checked_in_the_run(grid):
    """ComfyUI gives None for what is not known yet."""
    node = NODES["K2Grid"]
    assert node.validate_inputs(x_axis="seed", x_values=None, prompt="x") is True
    with pytest.raises(ValueError, match="x_values is 5; expected a text"):
        grid(x_axis="seed", x_values=5)


def test_another_file_of_the_name_is_another_grid(models, run, tmp_path):
    file = models / "loras" / "changed.safetensors"
    file.parent.mkdir(exist_ok=True)
    values = GRAPH["7"]["inputs"] | {"x_axis": "lora", "x_values": file.name}
    try:
        prints = set()
        for size in (1, 2):
            save_file({"a": torch.zeros(size)}, file)
            prints.add(NODES["K2Grid"].fingerprint_inputs(**values))
        assert len(prints) == 2 and None not in prints
    finally:
        file.unlink()
    assert NODES["K2Grid"].fingerprint_inputs(**values | {"prompt": None}) is None


@pytest.fixture
def posted(run, parts, base):
    """The grid of GRAPH with other values, as ComfyUI calls it; its files by number."""

    def call(**values):
        graph = json.loads(json.dumps(GRAPH))
        graph["7"]["inputs"] |= values
        inputs = {k: v for k, v in graph["7"]["inputs"].items() if not isinstance(v, list)}
        is_bare = graph["7"]["inputs"]["model"] == ["1", 0]
        # As the executor does, on a class of its own.
        hidden = io.HiddenHolder.from_dict({
            io.Hidden.prompt: graph, io.Hidden.unique_id: "7",
            io.Hidden.extra_pnginfo: {"workflow": {"nodes": []}},
        })  # fmt: skip
        node = type("K2Grid", (NODES["K2Grid"],), {"hidden": hidden})
        model = parts[0]
        if not is_bare:
            model = run("K2LoraLoader", model=model, lora=REFERENCE, strength=0.5)[0]
        prefix = graph["7"]["inputs"]["filename_prefix"]
        before = set((base / "output").glob(f"{prefix}*"))
        try:
            node.execute(model=model, clip=parts[1], vae=parts[2], latent=parts[3], **inputs)
        finally:
            files = sorted(set((base / "output").glob(f"{prefix}*")) - before)
            call.files = {file.stem.split("_")[-1]: file for file in files}
        return call.files

    return call


def play(run, graph):
    """The pictures that a graph in the API form saves, by running its nodes."""
    made = {}

    def value(link):
        is_link = isinstance(link, list) and len(link) == 2 and str(link[0]) in graph
        return result(str(link[0]))[link[1]] if is_link else link

    def result(key):
        if key not in made:
            node = graph[key]
            inputs = {name: value(entry) for name, entry in node["inputs"].items()}
            made[key] = run(node["class_type"], **inputs)
        return made[key]

    (save,) = [node for node in graph.values() if node["class_type"] == "SaveImage"]
    return value(save["inputs"]["images"])


CELLS = {
    "loras": {"x_axis": "lora", "x_values": f"none\n{STYLE}:0.5"},
    "sizes and mu": {"x_axis": "size", "x_values": "48x64\n64x64", "y_axis": "mu",
                     "y_values": "0.5\n1.5"},
    "preset raw": {"preset": "raw", "x_axis": "steps", "x_values": "2\n3", "y_axis": "negative",
                   "y_values": '""\nblue'},
    "layers and samplers": {"x_axis": "layer weights", "x_values": "35=4\n2=0", "shift": "fixed",
                            "mu": 0.7, "y_axis": "sampler", "y_values": "euler\ndpmpp_2m"},
    "styles with words, a LoRA and a picture": {
        "x_axis": "style", "x_values": "nano notebook:0.7;nano yellow ring:0.8\nnone",
        "y_axis": "lora", "y_values": f"{STYLE}:0.5\nnone"},
}  # fmt: skip


@pytest.mark.parametrize("case", CELLS)
def test_a_picture_keeps_the_graph_that_makes_it_alone(posted, run, case):
    """To the pixel, as ComfyUI's Save Image writes it."""
    files = posted(**CELLS[case])
    assert sorted(files) == ["001", "002", "003", "004", "sheet"]
    for name in ("001", "004"):
        with Image.open(files[name]) as picture:
            graph, pixels = json.loads(picture.text["prompt"]), np.asarray(picture)
        kinds = [node["class_type"] for node in graph.values()]
        assert "K2Grid" not in kinds and kinds.count("K2Sampler") == 1
        again = np.clip(255.0 * play(run, graph)[0].numpy(), 0, 255).astype(np.uint8)
        assert (pixels == again).all()
    with Image.open(files["sheet"]) as sheet:
        assert json.loads(sheet.text["workflow"]) == {"nodes": []}
        assert json.loads(sheet.text["prompt"])["7"]["class_type"] == "K2Grid"


def test_the_settings_of_a_picture_are_what_krea2_again_reads(posted, pack):
    settings_in = pack("krea2_model.cli.generate").settings_in
    files = posted(x_axis="lora", x_values=f"none\n{STYLE}:0.5")
    loras = [[f"krea2_nano_{name}_lora.safetensors", 0.5] for name in ("reference", "notebook")]
    found = settings_in(files["004"])
    assert found == {
        "model": "nano", "lora": loras, "prompt": "a red star on white",
        "negative": "", "weights": True, "width": 64, "height": 48, "steps": 2, "seed": 3,
        "guidance": 0.0,
    }  # fmt: skip
    with Image.open(files["004"]) as picture:
        assert picture.text["parameters"].startswith("a red star on white\nSteps: 2, ")
    loader = {"x_axis": "checkpoint", "x_values": NANO_RAW, "y_axis": "none", "preset": "auto"}
    assert settings_in(posted(model=["1", 0], **loader)["001"])["model"] == "nano-raw"


@pytest.fixture
def hooked(monkeypatch):
    """Calls of ComfyUI's progress bar: `hooked(function)`. Those of fast steps come too."""
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
    yield lambda function: monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", function)
    comfy.model_management.interrupt_current_processing(False)


def test_cancelling_keeps_what_is_painted(posted, hooked):
    """The third of four pictures is stopped at its second step; progress is of the whole."""
    seen = []

    def stop(value, total, preview, node_id=None):
        seen.append((value, total))
        if value == 6:
            comfy.model_management.interrupt_current_processing(True)
            comfy.model_management.throw_exception_if_processing_interrupted()

    hooked(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        posted(steps=2)
    assert seen[-1] == (6, 8) and {total for _, total in seen} == {8}
    assert sorted(posted.files) == ["001", "002", "sheet"]
    with Image.open(posted.files["002"]) as picture:
        assert json.loads(picture.text["krea2"])["settings"]["seed"] == 9


def test_an_error_in_a_cell_keeps_those_before_it(posted, pack, monkeypatch):
    run_class, calls = pack("nodes.prepared_run").Run, []
    before = run_class.sample

    def failing(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return before(self, *arguments, **options)

    monkeypatch.setattr(run_class, "sample", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        posted()
    assert sorted(posted.files) == ["001", "sheet"]


def test_through_a_server(server):
    """Posted: files that are told in the outputs; cancelled, and the queue goes on."""
    outputs = server.run(GRAPH, timeout=300)
    state = outputs["7"]["k2_grid"][0]
    places = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert [cell["place"] for cell in state["cells"]] == places
    folder = server.base / "output" / "krea2_grid"
    assert all((folder / cell["file"]["filename"]).is_file() for cell in state["cells"])
    (sheet,) = server.images({"7": {"images": outputs["7"]["images"]}})
    assert sheet == (folder / state["sheet"]["filename"]).read_bytes()

    long = json.loads(json.dumps(GRAPH))
    long["7"]["inputs"] |= {"steps": 40, "filename_prefix": "krea2_grid/long", "seed": 4}
    asked = []

    def stop(node, step, total):
        if node == "7" and step > 45 and not asked:
            asked.append(step)
            server.interrupt()

    with pytest.raises(JobError, match="interrupted"):
        server.run(long, stop, timeout=300)
    made = sorted(path.name for path in folder.glob("long_*"))
    assert made[-1].endswith("sheet.png") and 2 <= len(made) <= 4
    short = json.loads(json.dumps(GRAPH))
    short["7"]["inputs"] |= {"x_values": "77", "y_axis": "none"}
    assert len(server.run(short, timeout=300)["7"]["k2_grid"][0]["cells"]) == 1
