"""Draws the help pages' pictures again (web/docs/pictures): nodes in the page, krea2-nano's work.

    COMFYUI_PATH=... python scripts/draw_help_pictures.py [PICTURE ...]

Without names all of them: a node's id for its picture, else the name of a file in RESULTS. Needs
playwright and Chromium, as tests/browser does; CHROMIUM names the browser where it is not found.
A new node gets its help page first, and a line in NODES where its defaults say too little.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, Playwright, sync_playwright

from headless import ROOT, ComfyServer
from page import launch_chromium, new_context, open_page, open_template, page_server

DOCS = ROOT / "web" / "docs"
PICTURES = DOCS / "pictures"
INSPECTED = ROOT / "krea2_model" / "nano" / "krea2_nano_turbo.safetensors"
WORKFLOWS = ROOT / "tests" / "workflows"
EXAMPLES = ROOT / "example_workflows"
# Their thumbnails are pictures of these nodes of the graph, since krea2-nano cannot write or see.
GRAPHS = {
    "krea2_describe": ("K2Describe",),
    "krea2_prompt_expander": ("K2PromptExpander",),
    "krea2_prompt_with_images": ("LoadImage", "K2TextEncodeImages"),
}
# The README's screenshot, in docs/, and the template that it shows.
SCREENSHOT, SCREENSHOT_OF = "graph.png", "krea2_nano_first_image"
# What their Load Image shows.
SHOWN = EXAMPLES / "krea2_lora.jpg"
# Of the server's input folder, with a mask.
PHOTO = "photo.png"
# Another one there, with settings.
KEPT = "red_circle.png"
NANO, NANO_RAW = "krea2-nano (built in)", "krea2-nano Raw (built in)"
# Pixels of the canvas around a node, and the width of nodes that ask for none.
MARGIN, WIDTH = 12, 340
SHAPES = (
    "a red star on a white background",
    "a {blue|purple} ring on a yellow background",
    "a green square on a black background",
    "an orange triangle on a purple background",
    "a pink circle left of a blue square on a white background",
    "a large {yellow|white} star on a blue background",
)


class Shot(NamedTuple):
    """How a node is shown: its widgets' values, what is connected (input: node, output), whether
    it runs first and shows what it reports, its width, and the height its report is cut to."""

    values: Mapping[str, Any] = {}
    feeds: Mapping[str, tuple[str, str]] = {}
    runs: bool = False
    width: int = WIDTH
    height: int = 0
    room: int = 0


_MODEL = {"model": ("K2Loader", "MODEL")}
_CLIP = {"clip": ("K2Loader", "CLIP")}
_LATENT = {"latent": ("K2EmptyLatent", "LATENT")}
_VAE = {"vae": ("K2Loader", "VAE")}
_TEXTS = {"positive": ("K2TextEncode", "positive"), "negative": ("K2TextEncode", "negative")}
_IMAGE, _MASK = {"image": ("LoadImage", "IMAGE")}, {"mask": ("LoadImage", "MASK")}

# What feeds the shown nodes.
SOURCES: dict[str, tuple[Mapping[str, Any], Mapping[str, tuple[str, str]]]] = {
    "K2Loader": ({"model": NANO_RAW}, {}),
    "K2TextEncode": ({"prompt": "a red circle on a white background"}, _CLIP),
    "K2EmptyLatent": ({"aspect": "custom", "width": 128, "height": 128}, {}),
    "LoadImage": ({"image": PHOTO}, {}),
}
# Nodes that are not here are shown as they come, at WIDTH.
NODES = {
    "K2Approximate": Shot({"evaluate": "every 2nd step"}),
    "K2Compile": Shot(width=280),
    "K2Composite": Shot(width=280),
    "K2ControlLora": Shot(
        {"control": "krea2-nano outlines (built in)"}, _TEXTS | _VAE | _IMAGE, runs=True, width=400
    ),
    "K2CropForInpaint": Shot({}, _IMAGE | _MASK, runs=True),
    "K2Describe": Shot({}, _CLIP | _IMAGE, width=400, room=40),
    "K2Detailer": Shot({}, _MODEL | _TEXTS | _VAE | _IMAGE | _MASK, runs=True),
    "K2Edit": Shot(
        {"prompt": "make the sky a stormy one", "family": "identity"},
        _MODEL | _CLIP | _VAE | {"image_1": ("LoadImage", "IMAGE")}, runs=True, width=420,
    ),
    "K2EmptyLatent": Shot({"aspect": "16:9", "swap": True}, runs=True),
    "K2FitImage": Shot({}, _IMAGE, runs=True),
    "K2Grid": Shot(
        {"prompt": "a red circle left of a blue square", "x_values": "1-4",
         "y_axis": "prompt part", "y_values": "circle\nstar\nring"},
        _MODEL | _CLIP | _VAE | _LATENT, runs=True, width=460,
    ),
    "K2GuidanceSchedule": Shot({"end": 0.6}),
    "K2Inpaint": Shot({}, _VAE | _IMAGE | _MASK, runs=True),
    "K2Inspect": Shot({"file": f"diffusion_models/{INSPECTED.name}"}, runs=True, width=420),
    "K2Loader": Shot({"model": "krea2_turbo_bf16.safetensors"}, width=380),
    "K2LoraLoader": Shot({"lora": "krea2-nano notebook (built in)"}, _MODEL, runs=True, width=420),
    "K2ModelLoader": Shot({"file": "krea2_turbo_bf16.safetensors"}, width=380),
    "K2ModelSampling": Shot({}, _MODEL, runs=True),
    "K2Outpaint": Shot({}, _IMAGE, runs=True),
    "K2PictureSettings": Shot({"image": KEPT}, runs=True, width=420),
    "K2PromptBatch": Shot({"prompts": "\n".join(SHAPES)}, width=420, room=80),
    "K2PromptExpander": Shot({"prompt": "a fox in the snow"}, width=400, room=40),
    "K2Reference": Shot({}, _TEXTS | _VAE | _IMAGE, runs=True, width=400),
    "K2Regions": Shot({}, _CLIP | _TEXTS | _LATENT, width=440),
    "K2Sampler": Shot({}, _MODEL | _TEXTS | _LATENT),
    "K2SelfCheck": Shot({}, _MODEL | _CLIP, runs=True, width=560, height=200),
    "K2Sigmas": Shot({}, _MODEL | _LATENT, runs=True),
    "K2Stitch": Shot(width=280),
    "K2TrainLora": Shot(
        {"folder": "krea2-nano pictures (built in)", "name": "blueprint", "rank": 8, "steps": 40,
         "learning_rate": 0.003, "resolution": 128},
        _MODEL | _CLIP | {"vae": ("K2Loader", "VAE")}, runs=True, width=400,
    ),
    "K2StyleTransfer": Shot({}, _MODEL | _VAE | _IMAGE | _CLIP, runs=True, width=400),
    "K2StyleLora": Shot(
        {"prompt": "a large purple star", "style": "krea2-nano notebook (built in)"},
        _MODEL, runs=True, width=420, room=40,
    ),
    "K2StyleMix": Shot(
        {"prompt": "a lighthouse on a cliff at dusk", "shares": "2, 1"},
        _CLIP | _VAE | {"image_1": ("LoadImage", "IMAGE"), "image_2": ("LoadImage", "IMAGE")},
        runs=True, width=400,
    ),
    "K2TextEncode": Shot(
        {"prompt": "a (red:1.3) circle left of a blue square on a yellow background"},
        _CLIP, runs=True, width=400,
    ),
    "K2TextEncodeImages": Shot(
        {"prompt": "a lighthouse on a cliff at dusk, in the style of Picture 1"},
        _CLIP | {"image_1": ("LoadImage", "IMAGE")}, runs=True, width=400,
    ),
    "K2TextEncoderLoader": Shot({"file": "qwen3vl_4b_bf16.safetensors"}, width=380),
    "K2SaveStyle": Shot(
        {"name": "My ink", "words": "loose black ink on white paper"}, width=400, room=60
    ),
    "K2Styles": Shot(
        {"prompt": "a fox in the snow", "styles": "Ink wash: 0.7\nNeon night: 0.4"},
        _MODEL | _CLIP | _VAE, width=460, room=270,
    ),
    "K2Vary": Shot({"seed": 1, "variation_seed": 100}),
    "K2Walk": Shot(
        {"end_seed": 2},
        {"start": ("K2TextEncode", "positive"), "end": ("K2TextEncode", "positive")}, runs=True,
    ),
    "K2VAEDecode": Shot(width=280),
    "K2VAEEncode": Shot(width=280),
    "K2VAELoader": Shot({"file": "qwen_image_vae.safetensors"}, width=380),
}  # fmt: skip

BUILD = """([type, shot, sources]) => {
    // Not clear(), after which nodes get the numbers, and the values, of those before.
    for (const node of [...app.rootGraph.nodes]) app.rootGraph.remove(node);
    const nodes = {};
    const add = (type, values, feeds) => {
        if (nodes[type]) return nodes[type];
        const node = nodes[type] = LiteGraph.createNode(type);
        app.rootGraph.add(node);
        for (const [name, value] of Object.entries(values))
            node.widgets.find(widget => widget.name === name).value = value;
        for (const [name, [origin, output]] of Object.entries(feeds)) {
            const source = add(origin, ...sources[origin]);
            source.connect(source.findOutputSlot(output), node, node.findInputSlot(name));
        }
        return node;
    };
    const shown = add(type, shot.values, shot.feeds);
    shown.setSize([shot.width, shown.computeSize()[1] + shot.room]);
    if (shot.runs) {
        const viewer = LiteGraph.createNode('PreviewAny');
        app.rootGraph.add(viewer);
        shown.connect(0, viewer, 0);
    }
    window.shown = shown;
}"""
# After a run: the sampler shows its settings before one.
HAS_REPORT = """() => app.nodeOutputs[shown.id]
    && shown.widgets?.some(widget => widget.name === 'report' && widget.value)"""
# The pack's name above each node.
NO_BADGES = """() => app.extensionManager.setting.set(
    'Comfy.NodeBadge.NodeSourceBadgeMode', 'None')"""
# The node alone on the canvas, at its own size; returns its box in pixels of the page.
FRAME = """height => {
    for (const node of [...app.rootGraph.nodes]) if (node !== shown) node.pos = [-9000, -9000];
    if (height) {
        const report = shown.widgets.find(widget => widget.name === 'report');
        report.options.getMinHeight = report.options.getMaxHeight = () => height - 70;
        shown.setSize([shown.size[0], height]);
    }
    const title = LiteGraph.NODE_TITLE_HEIGHT;
    shown.pos = [0, 0];
    // Neither the ring around loaders whose file is not here, nor the next run's seed.
    shown.has_errors = false;
    shown.strokeStyles = {};
    for (const widget of shown.widgets ?? []) if (widget.name === 'seed') widget.value = 0;
    app.canvas.deselectAll();
    app.canvas.links_render_mode = LiteGraph.HIDDEN_LINK;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [200, 100 + title];
    app.canvas.setDirty(true, true);
    const corner = app.canvas.canvas.getBoundingClientRect();
    return [corner.x + 200, corner.y + 100, shown.size[0], shown.size[1] + title];
}"""


# Some nodes of a graph from their tops down, at a scale at which their text is drawn.
FRAME_GRAPH = """types => {
    const nodes = app.rootGraph.nodes.filter(node => types.includes(node.type));
    const [margin, scale, top] = [20, 0.75, LiteGraph.NODE_TITLE_HEIGHT];
    const left = Math.min(...nodes.map(node => node.pos[0])) - margin;
    const upper = Math.min(...nodes.map(node => node.pos[1])) - margin - top;
    const right = Math.max(...nodes.map(node => node.pos[0] + node.size[0])) + margin;
    const lower = Math.max(...nodes.map(node => node.pos[1] + node.size[1])) + margin;
    app.canvas.deselectAll();
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [100 / scale - left, 100 / scale - upper];
    app.canvas.setDirty(true, true);
    const corner = app.canvas.canvas.getBoundingClientRect();
    return [corner.x + 100, corner.y + 100, (right - left) * scale, (lower - upper) * scale];
}"""


HAS_PICTURE = "() => app.rootGraph.nodes.some(n => n.type === 'SaveImage' && n.imgs?.length)"
# The graph as compact as it reads at a README's width; returns its box in pixels of the page.
COMPACT = """() => {
    const title = LiteGraph.NODE_TITLE_HEIGHT, graph = app.rootGraph, margin = 24, gap = 50;
    for (const group of [...graph.groups]) graph.remove(group);
    for (const node of [...graph.nodes])
        if (node.type === 'MarkdownNote' || node.type === 'Note') graph.remove(node);
    for (const reroute of [...graph.reroutes.keys()]) graph.removeReroute(reroute);
    const find = type => graph.nodes.find(node => node.type === type);
    const columns = [['K2Loader', 'K2EmptyLatent'], ['K2TextEncode'], ['K2Sampler'],
                     ['K2VAEDecode', 'SaveImage']].map(types => types.map(find));
    find('SaveImage').setSize([300, 380]);
    let x = 0, lower = 0;
    for (const column of columns) {
        let y = title;
        for (const node of column) {
            node.pos = [x, y];
            y += node.size[1] + title + 20;
        }
        lower = Math.max(lower, y - title - 20);
        x += Math.max(...column.map(node => node.size[0])) + gap;
    }
    app.canvas.deselectAll();
    app.canvas.ds.scale = 0.9;
    app.canvas.ds.offset = [100, 130];
    app.canvas.setDirty(true, true);
    const corner = app.canvas.canvas.getBoundingClientRect();
    return [corner.x + 90 - margin, corner.y + 117 - margin,
            (x - gap) * 0.9 + 2 * margin, lower * 0.9 + 2 * margin];
}"""


def draw_node(page: Page, node: str) -> None:
    shot = NODES.get(node, Shot())
    page.evaluate(BUILD, [node, shot._asdict(), SOURCES])
    if shot.runs:
        page.get_by_test_id("queue-button").click()
        page.wait_for_function(HAS_REPORT)
    x, y, width, height = page.evaluate(FRAME, shot.height)
    # The canvas is drawn by the next frames.
    page.wait_for_timeout(500)
    clip = {"x": x - MARGIN, "y": y - MARGIN,
            "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}  # fmt: skip
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip)))
    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        PICTURES / f"{node}.png", optimize=True
    )


def save_photo(path: Path) -> None:
    """An image of a camera's shape, its middle masked: Load Image takes what is transparent."""
    photo = Image.linear_gradient("L").resize((1200, 800)).convert("RGB")
    opaque = Image.new("L", photo.size, 255)
    opaque.paste(0, (500, 300, 700, 500))
    photo.putalpha(opaque)
    photo.save(path)


def save_kept(path: Path) -> None:
    """A picture that keeps its settings, as krea2 writes it."""
    settings = {
        "model": "krea2_turbo_bf16.safetensors", "lora": [["ink.safetensors", 0.8]],
        "prompt": "a red circle left of a blue square on a yellow background", "width": 1344,
        "height": 768, "steps": 8, "seed": 7, "guidance": 0.0,
    }  # fmt: skip
    picture = Image.open(EXAMPLES / "krea2_nano_first_image.jpg").resize((384, 220))
    chunks = PngInfo()
    chunks.add_text("krea2", json.dumps({"settings": settings}))
    picture.save(path, pnginfo=chunks)


def nano_graph(workflow: str, **values: Mapping[str, Any]) -> dict:
    """A twin of an example on krea2-nano, at its size; `values` are inputs by type of node."""
    graph = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        inputs = node["inputs"]
        for name in ("model", "file"):
            if str(inputs.get(name)).endswith(".safetensors"):
                inputs[name] = NANO_RAW if "raw" in inputs[name] else NANO
        if node["class_type"] == "K2Loader":
            inputs.update(text_encoder="auto", vae="auto")
        if node["class_type"] == "K2EmptyLatent":
            inputs.update(aspect="custom", width=128, height=128)
        inputs.update(values.get(node["class_type"], {}))
    return graph


def paint(server: ComfyServer, graph: dict) -> Image.Image:
    """What the graph's last output saves."""
    images = server.images(server.run(graph, timeout=600))
    return Image.open(io.BytesIO(images[-1])).convert("RGB")


def save_row(pictures: list[Image.Image], name: str) -> None:
    """Pictures side by side, the width of a help page."""
    gap, side = 12, (600 - 12 * (len(pictures) - 1)) // len(pictures)
    row = Image.new("RGB", (600, side), "white")
    for index, picture in enumerate(pictures):
        row.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (index * (side + gap), 0))
    row.save(PICTURES / name, quality=90, optimize=True)


def draw_guidance_schedule(server: ComfyServer) -> None:
    """A seed of Raw with guidance over the whole run, up to 0.6 of it, and nowhere."""
    prompt = {"prompt": "a pink ring above a green triangle on a black background", "negative": ""}
    pictures = [
        paint(server, nano_graph(
            "krea2_raw_faster", K2TextEncode=prompt, K2Sampler={"seed": 2},
            K2GuidanceSchedule={"start": start, "end": end},
            K2Approximate={"evaluate": "every step"},
        ))
        for start, end in ((0.0, 1.0), (0.0, 0.6), (0.0, 0.0))
    ]  # fmt: skip
    save_row(pictures, "guidance_schedule.jpg")


def draw_contact_sheet(server: ComfyServer) -> None:
    batch = {"prompts": "\n".join(SHAPES), "wildcard_seed": 0}
    graph = nano_graph(
        "krea2_prompt_batch", K2PromptBatch=batch, K2Sampler={"seed": 1},
        K2ContactSheet={"text_size": 11},
    )  # fmt: skip
    paint(server, graph).save(PICTURES / "contact_sheet.jpg", quality=90, optimize=True)


def draw_lora_strength(server: ComfyServer) -> None:
    pictures = [
        paint(server, nano_graph("krea2_lora", K2LoraLoader={"strength": strength}))
        for strength in (0.0, 0.5, 1.0)
    ]
    save_row(pictures, "lora_strength.jpg")


def draw_denoise(server: ComfyServer) -> None:
    """An image, and what image to image makes of it with more and more noise."""
    prompt = {"prompt": "a red circle on a yellow background"}
    start = paint(server, nano_graph("krea2_turbo_text_to_image", K2TextEncode=prompt))
    encoded = io.BytesIO()
    start.save(encoded, "PNG")
    image = server.upload("start.png", encoded.getvalue())
    prompt = {"prompt": "a blue square on a pink background"}
    changed = [
        paint(server, nano_graph(
            "krea2_image_to_image", K2TextEncode=prompt, K2Sampler={"denoise": denoise},
            LoadImage={"image": image}, K2FitImage={"megapixels": 128**2 / 1024**2},
        ))
        for denoise in (0.2, 0.3, 0.4, 0.75)
    ]  # fmt: skip
    save_row([start, *changed], "denoise.jpg")


RESULTS: dict[str, Callable[[ComfyServer], None]] = {
    "contact_sheet.jpg": draw_contact_sheet,
    "denoise.jpg": draw_denoise,
    "guidance_schedule.jpg": draw_guidance_schedule,
    "lora_strength.jpg": draw_lora_strength,
}


def draw_graph(page: Page, server: ComfyServer, name: str) -> None:
    """The thumbnail of an example that krea2-nano cannot run: some of its nodes."""
    open_template(page, server, name)
    x, y, width, height = page.evaluate(FRAME_GRAPH, GRAPHS[name])
    page.wait_for_timeout(500)
    clip = {"x": x, "y": y, "width": width, "height": height}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.save(EXAMPLES / f"{name}.jpg", quality=85, optimize=True)


def draw_screenshot(page: Page, server: ComfyServer) -> None:
    """The README's screenshot: a template in the page after a run."""
    page.set_viewport_size({"width": 1720, "height": 1200})
    open_template(page, server, SCREENSHOT_OF)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(HAS_PICTURE)
    x, y, width, height = page.evaluate(COMPACT)
    page.wait_for_timeout(8000)  # until the page's own message has gone
    clip = {"x": x, "y": y, "width": width, "height": height}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(ROOT / "docs" / SCREENSHOT, optimize=True)


def main(names: list[str]) -> None:
    nodes = sorted(path.stem for path in DOCS.glob("*.md"))
    known = [*nodes, *RESULTS, *GRAPHS, SCREENSHOT]
    if unknown := set(names) - set(known):
        sys.exit(f"Unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(known)}.")
    with tempfile.TemporaryDirectory() as base:
        server = page_server(Path(base) / "server", "none")
        # A file to inspect.
        folder = server.base / "models" / "diffusion_models"
        folder.mkdir(parents=True)
        shutil.copy(INSPECTED, folder)
        save_photo(server.base / "input" / PHOTO)
        Image.open(SHOWN).save(server.base / "input" / "example.png")
        save_kept(server.base / "input" / KEPT)
        with server:
            wanted = names or known
            # Outside playwright, whose event loop the client's does not stand.
            for name in filter(RESULTS.get, wanted):
                print(name, flush=True)
                RESULTS[name](server)
            with sync_playwright() as playwright:
                draw(server, playwright, [name for name in wanted if name not in RESULTS])


def draw(server: ComfyServer, playwright: Playwright, names: list[str]) -> None:
    # High enough for every node at its own size.
    page = new_context(launch_chromium(playwright), 1280, 1600).new_page()
    page.set_default_timeout(120_000)
    open_page(page, server)
    page.evaluate(NO_BADGES)
    for name in names:
        print(name, flush=True)
        if name == SCREENSHOT:
            draw_screenshot(page, server)
        elif name in GRAPHS:
            draw_graph(page, server, name)
        else:
            draw_node(page, name)


if __name__ == "__main__":
    main(sys.argv[1:])
