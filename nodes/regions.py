"""Prompts, and LoRAs, for parts of the image."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.features.arguments import PromptImages
from ..krea2_model.features.region_list import EXAMPLE, read_regions
from ..krea2_model.features.regions import SEPARATE, SOFT, TEXT_FACTOR
from ..krea2_model.features.regions import Regions as RegionArguments
from ..krea2_model.images.masks import without_noise
from ..krea2_model.images.region_picture import draw_regions
from ..krea2_model.images.region_shapes import MAX_SOFT
from ..krea2_model.lora.live_files import read_live_lora
from ..krea2_model.text.prompt_images import MAX_SIDE, PromptImage
from ..krea2_model.transformer.patches import PATCH, grid_size
from . import inputs, model_files
from .inputs import check_limits, verdict
from .managed.encode import encode_with_images
from .managed.lora import transformer_shapes
from .managed.regions import Region, Regions, add_regions
from .managed.vision import pictures, resize_all
from .prompts import advised, check_clip, encode
from .reports import region_report
from .sampler_run import check_ours, start_of

_REMEDY = (
    "Leave regions out, shorten their prompts, load a smaller file of the text encoder "
    "(fp8_scaled), or close what else uses the device."
)
# Rows and columns of tokens of a large image, for checks before its size is known.
_LARGE = (256, 256)
# Key of the picture that the canvas of the page draws rectangles on (web/js/regions.js).
_DRAWN = "k2_regions"


class K2Regions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Regions",
            display_name="Krea 2 Regions",
            category="Krea 2",
            description=(
                "Gives parts of the image prompts of their own, beside the prompt of the whole, "
                "and LoRAs that act in a part alone: up to 8 rectangles or masks, drawn on a "
                "canvas."
            ),
            search_aliases=inputs.aliases(
                "regional prompt, region, area, regional lora, attention couple, conditioning set "
                "area, conditioning set mask, mask, layout, compositor"
            ),
            inputs=[
                inputs.CLIP,
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip=(
                        "The prompt of the whole image; empty, or of what is common to all "
                        "regions, such as the style. Not beside prompt."
                    ),
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Gets the regions' LoRAs, so that guidance does not amplify them.",
                ),
                io.String.Input(
                    "regions",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip=(
                        "The regions as a JSON list, the lowest first, which the canvas writes. "
                        "Each has a prompt and a box (left, top, width, height as fractions of "
                        "the image, or background) or the number of a mask; the help page has "
                        "what else."
                    ),
                ),
                io.Mask.Input(
                    "masks", optional=True, tooltip="Masks of regions, white inside, as a batch."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Needed for LoRAs in regions: Krea 2, as it goes to the sampler.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The sampler's latent: gives the canvas its shape, and regions are checked "
                        "against its size."
                    ),
                ),
                io.Boolean.Input(
                    "places",
                    default=True,
                    tooltip=(
                        "Say each region's place in its prompt ('on the left'), which the model "
                        "follows better than its shape."
                    ),
                ),
                io.Float.Input(
                    "text_factor",
                    default=TEXT_FACTOR,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip=(
                        "Attention inside regions to the prompt of the whole image: 0 hides it "
                        "there, 1 is as much as to the region's own."
                    ),
                ),
                inputs.window(
                    "separate",
                    SEPARATE,
                    "Until this part of the schedule (0 to 1) a region's image tokens see only "
                    "each other; more than a little leaves seams.",
                    advanced=True,
                ),
                inputs.WEIGHTS,
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The prompt of the whole image, in place of positive: what the regions "
                        "show, and where, is added to it."
                    ),
                ),
                io.Float.Input(
                    "soft",
                    default=SOFT,
                    min=0.0,
                    max=MAX_SOFT,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Width of soft edges, as a fraction of the image's shorter side, where a "
                        "region says nothing else."
                    ),
                ),
                io.Image.Input(
                    "picture",
                    optional=True,
                    tooltip="A picture to draw the regions on; it does not change the image.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip=(
                        "Images for regions' prompts, as a batch, for LoRAs that read images; "
                        "regions name them by number."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with the regions."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative with the regions' LoRAs."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The area and tokens of each region, and its LoRAs.",
                ),
                io.Image.Output(
                    display_name="preview",
                    tooltip="The regions in colours with their numbers, on picture or on grey.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, regions=None, text_factor=None, separate=None, soft=None):
        def check():
            if regions is not None:
                _check_text(regions, SOFT if soft is None else soft)

        return verdict(cls, check, text_factor=text_factor, separate=separate, soft=soft)

    @classmethod
    def fingerprint_inputs(cls, regions=None, **others):
        try:
            return model_files.fingerprint(*_lora_files(read_regions(regions, by_number=True)[0]))
        except (ValueError, OSError):
            return None

    @classmethod
    def execute(
        cls,
        clip,
        positive=None,
        negative=None,
        regions=EXAMPLE,
        masks=None,
        model=None,
        latent=None,
        places=True,
        text_factor=TEXT_FACTOR,
        separate=SEPARATE,
        weights=True,
        prompt="",
        soft=SOFT,
        picture=None,
        images=None,
    ):
        check_clip(clip)
        check_limits(cls, text_factor=text_factor, separate=separate, soft=soft)
        if (positive is None) == (not prompt.strip()):
            found = "Both positive and prompt" if positive is not None else "Neither of the two"
            raise ValueError(
                f"{found}: connect positive, or write the prompt of the whole image into prompt."
            )
        if model is not None:
            check_ours(model, "where regions have no effect")
        chosen = RegionArguments.read(
            _with_inputs(read_regions(regions, by_number=True)[0], masks, images),
            text_factor=text_factor,
            separate=separate,
            places=places,
            soft=soft,
            in_prompt=positive is None,
        )
        if latent is not None:
            samples = latent["samples"] if model is None else start_of(model, latent)
            chosen.shapes.shares(*grid_size(samples, PATCH))
        loras, reports = _read_loras(chosen.regions, model)
        size, below = _size(latent, masks, picture), _first(picture)
        drawn = draw_regions(chosen.shapes, *size, below)

        if positive is None:
            positive = encode(clip, chosen.whole([prompt]), weights)
        texts = [
            None if text is None else _encode(clip, text, region.images, weights)
            for text, region in zip(chosen.prompts(), chosen.regions, strict=True)
        ]
        parts = zip(texts, chosen.regions, loras, strict=True)
        group = Regions(
            tuple(
                Region(None if text is None else tuple(text[0]), region.settings, own)
                for text, region, own in parts
            ),
            chosen.shapes.shares,
            text_factor,
            separate,
        )
        lines = [
            region_report(f"Region {number}", area, text)
            for number, (area, text) in enumerate(zip(drawn.areas, texts, strict=True), start=1)
        ]
        report = "\n".join([*lines, *reports])
        shown = ui.PreviewText(report).as_dict()
        if any(shape.box is None for shape in chosen.shapes.shapes):
            # Masks and the background, which the canvas does not draw itself.
            below = draw_regions(chosen.shapes, *size, below, boxes=False).picture
            shown |= {_DRAWN: ui.PreviewImage(below, cls=cls).as_dict()["images"]}
        return io.NodeOutput(
            add_regions(positive, group),
            add_regions(negative, group.for_negative()),
            report,
            drawn.picture,
            ui=shown,
        )


def _check_text(regions: str, soft: float) -> None:
    """Raise ValueError for what is wrong with regions before masks and sizes are known."""
    entries, _ = read_regions(regions, by_number=True)
    _lora_files(entries)
    blank = torch.ones(*_LARGE)
    known = [
        {key: blank if key == "mask" else value for key, value in entry.items() if key != "images"}
        for entry in entries
    ]
    shapes = RegionArguments.read(known, soft=soft).shapes
    if not any("mask" in entry for entry in entries):
        shapes.shares(*_LARGE)


def _with_inputs(entries: list[dict], masks, images) -> list[dict]:
    """The regions with their masks and images of the node's inputs, in place of numbers."""
    seen = [] if images is None else resize_all(images, MAX_SIDE)
    flat = [] if masks is None else list(masks.reshape(-1, *masks.shape[-2:]).float().cpu())

    def pick(kind: str, several: list, number: int, region: int):
        if number > len(several):
            found = f"{kind}s has {len(several)}" if several else f"{kind}s is not connected"
            raise ValueError(
                f"Region {region} has {kind} {number}, but {found}. Connect a batch with it, or "
                "choose another."
            )
        return several[number - 1]

    filled = []
    for number, entry in enumerate(entries, start=1):
        added: dict = {}
        if "mask" in entry:
            added["mask"] = without_noise(pick("mask", flat, entry["mask"], number))
        if "images" in entry:
            found = [pick("image", seen, image, number) for image in entry["images"]]
            added["images"] = [PromptImage(pixels) for pixels in found]
        filled.append(entry | added)
    return filled


def _lora_files(entries: list[dict]) -> list:
    """The LoRA files of all regions. Raises CheckpointError for one that is not there."""
    names = [name for entry in entries for name, _ in entry.get("loras", ())]
    return [model_files.find_lora(name) for name in dict.fromkeys(names)]


def _read_loras(regions, model) -> tuple[list[tuple], list[str]]:
    """The LoRAs of each region with their scales, each file read once, and reports on them."""
    if not any(region.loras for region in regions):
        return [()] * len(regions), []
    if model is None:
        raise ValueError(
            "A region has LoRAs, which need the model. Connect the sampler's MODEL to model."
        )
    shapes, files, reports = transformer_shapes(model), {}, []
    for number, region in enumerate(regions, start=1):
        for name, scale in region.loras:
            if name not in files:
                files[name] = read_live_lora(model_files.find_lora(name), shapes)
            reports.append(f"Region {number}: strength {scale:g}, {files[name][1]}")
    loras = [tuple((files[name][0], scale) for name, scale in each.loras) for each in regions]
    return loras, reports


def _encode(clip, text: str, images, weights: bool):
    prepared = PromptImages.of(images).prepared()
    if not prepared:
        return encode(clip, [text], weights)
    with advised(_REMEDY):
        return encode_with_images(clip, text, prepared, labels=True, weighted=weights)


def _first(picture):
    """The first picture of an input as (1, H, W, 3), transparent ones on white; None without."""
    return None if picture is None else pictures(picture)[0].movedim(0, -1)[None]


def _size(latent, masks, picture) -> tuple[int, int]:
    """Width and height to draw the regions at: of the image, or a shape like it."""
    if latent is not None:
        height, width = latent["samples"].shape[-2:]
    elif masks is not None:
        height, width = masks.shape[-2:]
    elif picture is not None:
        height, width = pictures(picture)[0].shape[-2:]
    else:
        height = width = 1
    return width, height
