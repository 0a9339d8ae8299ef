"""Draws the thumbnails of the example workflows that take images: before and after, by krea2-nano.

    COMFYUI_PATH=... python scripts/draw_thumbnails.py [NAME ...]

Each is the workflow's own graph with krea2-nano's values (nano_templates.py), on an image that
krea2-nano painted too.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from headless import ROOT, ComfyServer
from nano_templates import nano_graph
from page import page_server

EXAMPLES = ROOT / "example_workflows"
PICTURES = ROOT / "krea2_model" / "nano" / "pictures"
# Pixels of a picture's side, and between the two.
SIDE, GAP = 384, 12
START = "a red circle left of a blue square on a yellow background"
COLOURS = ("red", "blue", "green", "orange")
# Of the server's input folder; the workflows name the first.
NAMES = ("example.png", "second.png")
Pictures = list[Image.Image]


def paint(server: ComfyServer, name: str, **values: Mapping[str, Any]) -> Image.Image:
    """A picture by a workflow on krea2-nano; `values` are inputs by type of node."""
    graph = nano_graph(name)
    for node in graph.values():
        node["inputs"].update(values.get(node["class_type"], {}))
    return Image.open(io.BytesIO(server.images(server.run(graph, timeout=600))[-1])).convert("RGB")


def start(server: ComfyServer, prompt: str = START) -> Image.Image:
    return paint(server, "krea2_nano_first_image", K2TextEncode={"prompt": prompt})


def give(server: ComfyServer, image: Image.Image, name: str = NAMES[0]) -> None:
    """Put an image where the workflow's Load Image finds it; what is transparent is the mask."""
    image.save(server.base / "input" / name)


def masked(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, box)
    image = image.copy()
    image.putalpha(alpha)
    return image


def outlined(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The image with the edge of its mask drawn, enlarged so that the line is thin."""
    factor = SIDE / image.height
    image = image.resize((round(image.width * factor), SIDE), Image.Resampling.LANCZOS)
    corners = [round(each * factor) for each in box]
    ImageDraw.Draw(image).rectangle(corners, outline="black", width=3)
    return image


def image_to_image(server: ComfyServer) -> Pictures:
    before = start(server, "a red circle on a yellow background")
    give(server, before)
    prompt = {"prompt": "a blue square on a pink background"}
    return [before, paint(server, "krea2_image_to_image", K2TextEncode=prompt,
                          K2Sampler={"denoise": 0.75})]  # fmt: skip


def inpaint(server: ComfyServer) -> Pictures:
    before, box = start(server), (64, 16, 124, 112)
    give(server, masked(before, box))
    prompt = {"prompt": "a red circle left of a green star on a yellow background"}
    return [outlined(before, box), paint(server, "krea2_inpaint", K2TextEncode=prompt)]


def inpaint_detail(server: ComfyServer) -> Pictures:
    before = start(server, "a large blue circle on a yellow background").resize((256, 256))
    box = (96, 96, 160, 160)
    give(server, masked(before, box))
    prompt = {"prompt": "a white star on a blue background"}
    settings = {"denoise": 1.0}
    after = paint(server, "krea2_inpaint_detail", K2TextEncode=prompt, K2Sampler=settings)
    return [outlined(before, box), after]


def detailer(server: ComfyServer) -> Pictures:
    """Four small circles of a large picture become stars, at a size that the model can paint."""
    before = start(server, "a large white circle on a white background").resize((512, 512))
    before.paste(before.getpixel((4, 4)), (0, 0, 512, 512))
    drawing, boxes = ImageDraw.Draw(before), []
    for x in (64, 320):
        for y in (64, 320):
            drawing.ellipse((x + 40, y + 40, x + 88, y + 88), fill="black")
            boxes.append((x + 20, y + 20, x + 108, y + 108))
    alpha = Image.new("L", before.size, 255)
    for box in boxes:
        alpha.paste(0, box)
    photo = before.copy()
    photo.putalpha(alpha)
    give(server, photo)
    prompts = [f"a {colour} star on a white background" for colour in COLOURS]
    settings = {"prompts": "\n".join(prompts), "denoise": 1.0, "context": 1.3, "grow": 0}
    return [before, paint(server, "krea2_detailer", K2Detailer=settings)]


def outpaint(server: ComfyServer) -> Pictures:
    before = start(server).crop((0, 0, 64, 128))
    give(server, before)
    prompt = {"prompt": "a red circle left of a blue triangle on a yellow background"}
    return [before, paint(server, "krea2_outpaint", K2TextEncode=prompt,
                          K2FitImage={"megapixels": 0.0})]  # fmt: skip


def control(server: ComfyServer) -> Pictures:
    before = start(server, "a small green star in the top right")
    give(server, before)
    return [before, paint(server, "krea2_control")]


def upscale(server: ComfyServer) -> Pictures:
    """The corner with the star's tip, at the size of the first stage and of the second."""
    graph = nano_graph("krea2_upscale")
    graph["8"]["inputs"]["samples"] = ["6", 0]
    small = Image.open(io.BytesIO(server.images(server.run(graph, timeout=600))[-1]))
    large = paint(server, "krea2_upscale")
    box = (32, 8, 96, 72)
    before = small.convert("RGB").crop(box).resize((128, 128), Image.Resampling.NEAREST)
    return [before, large.crop(tuple(2 * side for side in box))]


def regions(server: ComfyServer) -> Pictures:
    """The regions as the node's preview draws them, and what is painted."""
    painted = server.images(server.run(nano_graph("krea2_regions"), timeout=600))
    return [Image.open(io.BytesIO(picture)).convert("RGB") for picture in painted]


def tiled_sampling(server: ComfyServer) -> Pictures:
    """The corner with the star, enlarged, before and after sampling in tiles."""
    graph = nano_graph("krea2_tiled_sampling")
    graph["11"]["inputs"]["samples"] = ["7", 0]
    enlarged = Image.open(io.BytesIO(server.images(server.run(graph, timeout=600))[-1]))
    painted = paint(server, "krea2_tiled_sampling")
    box = (64, 16, 192, 144)
    return [picture.convert("RGB").crop(box) for picture in (enlarged, painted)]


def reference(server: ComfyServer) -> Pictures:
    before = start(server, "a green square on a pink background")
    give(server, before)
    return [before, paint(server, "krea2_reference")]


def style_transfer(server: ComfyServer) -> Pictures:
    before = start(server, "a purple ring in the top left on a yellow background")
    give(server, before)
    return [before, paint(server, "krea2_style_transfer")]


def edit(server: ComfyServer) -> Pictures:
    before = start(server, "a blue ring on a yellow background")
    give(server, before)
    return [before, paint(server, "krea2_edit")]


def style_mix(server: ComfyServer) -> Pictures:
    images = [
        start(server, "a red square on a white background"),
        start(server, "a black ring on a blue background"),
    ]
    for image, name in zip(images, NAMES, strict=True):
        give(server, image, name)
    graph = nano_graph("krea2_style_mix")
    graph["4"]["inputs"]["image"] = NAMES[1]
    painted = server.images(server.run(graph, timeout=600))[-1]
    both = Image.new("RGB", (128, 128))
    for index, image in enumerate(images):
        both.paste(image.crop((32, 0, 96, 128)), (64 * index, 0))
    return [both, Image.open(io.BytesIO(painted)).convert("RGB")]


def style_loras(server: ComfyServer) -> Pictures:
    prompt = "a large purple star on a white background"
    return [
        paint(server, "krea2_style_loras", K2StyleLora={"prompt": prompt, "style": style})
        for style in ("none", "krea2-nano notebook (built in)")
    ]


def train_lora(server: ComfyServer) -> Pictures:
    """Four of the pictures that it learns from, and what Turbo paints with the LoRA."""
    learned = [Image.open(file).convert("RGB") for file in sorted(PICTURES.glob("*.png"))[:4]]
    side = learned[0].width
    sheet = Image.new("RGB", (2 * side, 2 * side))
    for index, each in enumerate(learned):
        sheet.paste(each, (index % 2 * side, index // 2 * side))
    return [sheet, paint(server, "krea2_train_lora", K2Sampler={"seed": 1})]


def grid(server: ComfyServer) -> Pictures:
    """The sheet."""
    return [paint(server, "krea2_grid")]


def styles(server: ComfyServer) -> Pictures:
    """A prompt without a style, and in the styles of krea2-nano."""
    return [
        paint(server, "krea2_styles", K2Styles={"styles": text})
        for text in ("nano notebook: 0", "nano notebook: 1")
    ]


def vary(server: ComfyServer) -> Pictures:
    """A picture and six neighbours of it."""
    one = {"strength": 0.0}
    before = paint(server, "krea2_vary", K2Vary=one, K2EmptyLatent={"batch": 1})
    return [before, paint(server, "krea2_vary")]


def walk(server: ComfyServer) -> Pictures:
    """Six of eleven frames."""
    graph = nano_graph("krea2_walk")
    del graph["8"]
    graph["5"]["inputs"].update(frames=11)
    graph["9"] = {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "a"}}
    frames = server.images(server.run(graph, timeout=600))[::2]
    row = Image.new("RGB", (6 * 128, 128))
    for index, frame in enumerate(frames):
        row.paste(Image.open(io.BytesIO(frame)), (128 * index, 0))
    # Two rows, as high as other thumbnails are.
    sheet = Image.new("RGB", (3 * 128, 256))
    sheet.paste(row, (0, 0))
    sheet.paste(row.crop((3 * 128, 0, 6 * 128, 128)), (0, 128))
    return [sheet]


DRAWN: dict[str, Callable[[ComfyServer], Pictures]] = {
    "krea2_control": control,
    "krea2_edit": edit,
    "krea2_detailer": detailer,
    "krea2_grid": grid,
    "krea2_image_to_image": image_to_image,
    "krea2_inpaint": inpaint,
    "krea2_inpaint_detail": inpaint_detail,
    "krea2_outpaint": outpaint,
    "krea2_reference": reference,
    "krea2_regions": regions,
    "krea2_style_transfer": style_transfer,
    "krea2_styles": styles,
    "krea2_style_loras": style_loras,
    "krea2_tiled_sampling": tiled_sampling,
    "krea2_train_lora": train_lora,
    "krea2_upscale": upscale,
    "krea2_vary": vary,
    "krea2_walk": walk,
    "krea2_style_mix": style_mix,
}


def side_by_side(pictures: Pictures) -> Image.Image:
    """Pictures of one height beside each other on a white ground."""
    scaled = [
        picture.resize(
            (round(picture.width * SIDE / picture.height), SIDE), Image.Resampling.LANCZOS
        )
        for picture in pictures
    ]
    width = sum(picture.width for picture in scaled) + GAP * (len(scaled) - 1)
    row, x = Image.new("RGB", (width, SIDE), "white"), 0
    for picture in scaled:
        row.paste(picture, (x, 0))
        x += picture.width + GAP
    return row


def main(names: list[str]) -> None:
    if unknown := set(names) - set(DRAWN):
        sys.exit(f"Unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(DRAWN)}.")
    with (
        tempfile.TemporaryDirectory() as base,
        page_server(Path(base) / "server", "none") as server,
    ):
        for name in names or DRAWN:
            print(name, flush=True)
            picture = side_by_side(DRAWN[name](server))
            picture.save(EXAMPLES / f"{name}.jpg", quality=90, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
