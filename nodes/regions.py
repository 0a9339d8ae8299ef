"""Prompts, and LoRAs, for parts of the image."""

import json
from typing import Any

from comfy_api.latest import io, ui

from ..krea2_model.images.region_shapes import RegionShape, RegionShapes, check_count
from ..krea2_model.regions import read_live_lora, with_place
from ..krea2_model.transformer.patches import PATCH, grid_size
from ..krea2_model.transformer.regions import RegionSettings
from . import inputs, model_files
from .inputs import check_limits, verdict
from .managed.lora import transformer_shapes
from .managed.regions import REGIONS, Region, Regions
from .prompts import encode
from .sampler_run import check_ours, start_of

_KEYS = ("prompt", "box", "mask", "strength", "start", "end", "soft", "loras")
_EXAMPLE = (
    '[{"prompt": "a red fox", "box": [0, 0, 0.5, 1]}, '
    '{"prompt": "a blue owl", "box": [0.5, 0, 0.5, 1]}]'
)
# A report's line has so many characters at most.
_SHOWN = 30


class K2Regions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Regions",
            display_name="Krea 2 Regions",
            category="Krea 2",
            description=(
                "Gives parts of the image prompts of their own, beside the prompt of the whole, "
                "and LoRAs that act in a part alone: up to 8 rectangles or masks."
            ),
            search_aliases=inputs.aliases(
                "regional prompt, area, attention couple, mask, bounding box, region lora"
            ),
            inputs=[
                inputs.CLIP,
                io.Conditioning.Input(
                    "positive",
                    tooltip=(
                        "The prompt of the whole image; empty, or of what is common to all "
                        "regions, such as the style."
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
                    default=_EXAMPLE,
                    tooltip=(
                        "A JSON list, the lowest region first. Each has a prompt and a box (left, "
                        "top, width, height as fractions of the image, or background), or a mask "
                        "(its number in masks, from 1); and perhaps strength, start, end, soft "
                        "and loras ([[file, strength]])."
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
                    tooltip="The sampler's latent: regions are checked against its size.",
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
                    default=1.0,
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
                    0.0,
                    "Until this part of the schedule (0 to 1) a region's image tokens see only "
                    "each other; more than a little leaves seams.",
                    advanced=True,
                ),
                inputs.WEIGHTS,
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with the regions."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative with the regions' LoRAs."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, regions=None, text_factor=None, separate=None):
        def check():
            if regions is not None:
                for number, entry in enumerate(_entries(regions), 1):
                    _settings(entry)
                    if "mask" not in entry:
                        RegionShape.of(_box(entry), soft=entry.get("soft", 0.0), name=_name(number))

        return verdict(cls, check, text_factor=text_factor, separate=separate)

    @classmethod
    def execute(
        cls,
        clip,
        positive,
        negative=None,
        regions=_EXAMPLE,
        masks=None,
        model=None,
        latent=None,
        places=True,
        text_factor=1.0,
        separate=0.0,
        weights=True,
    ):
        check_limits(cls, text_factor=text_factor, separate=separate)
        entries = _entries(regions)
        settings = [_settings(entry) for entry in entries]
        shapes = RegionShapes(
            [_shape(number, entry, masks) for number, entry in enumerate(entries, 1)]
        )
        if model is not None:
            check_ours(model, "where regions have no effect")
        if model is not None and latent is not None:
            shapes.shares(*grid_size(start_of(model, latent), PATCH))
        elif latent is not None:
            shapes.shares(*grid_size(latent["samples"], PATCH))
        loras = [_loras(entry, model) for entry in entries]
        report, made = [], []
        for number, entry in enumerate(entries):
            shape = shapes.shapes[number]
            text = with_place(entry["prompt"], shape) if places else entry["prompt"]
            encoded = encode(clip, [text], weights)
            if len(encoded) != 1:
                raise ValueError(f"{_name(number + 1)} has {len(encoded)} parts; expected one.")
            made.append(Region(tuple(encoded[0]), settings[number], tuple(loras[number])))
            report.append(f"{number + 1}: {_shown(text)}{_left_out(loras[number])}")
        group = Regions(tuple(made), shapes.shares, text_factor, separate)
        results = [
            None if each is None else [[states, extra | {REGIONS: added}] for states, extra in each]
            for each, added in ((positive, group), (negative, group.for_negative()))
        ]
        return io.NodeOutput(*results, ui=ui.PreviewText("\n".join(report)))


def _entries(text: str) -> list[dict[str, Any]]:
    """Regions of a JSON list. Raises ValueError for anything else."""
    expected = "a JSON list of regions such as " + _EXAMPLE
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"regions cannot be read ({error}); expected {expected}.") from error
    if not isinstance(entries, list):
        raise ValueError(f"regions is {type(entries).__name__}; expected {expected}.")
    check_count(len(entries))
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"{_name(number)} is {entry!r}; expected {expected}.")
        for key in entry.keys() - set(_KEYS):
            raise ValueError(f"{_name(number)} has {key!r}; expected only {', '.join(_KEYS)}.")
        if not isinstance(entry.get("prompt"), str):
            raise ValueError(f'{_name(number)} has no prompt; expected a text under "prompt".')
    return entries


def _settings(entry: dict) -> RegionSettings:
    return RegionSettings(
        entry.get("strength", 1.0), entry.get("start", 0.0), entry.get("end", 1.0)
    )


def _box(entry: dict):
    box = entry.get("box")
    return tuple(box) if isinstance(box, list) else box


def _shape(number: int, entry: dict, masks) -> RegionShape:
    mask, name = entry.get("mask"), _name(number)
    if mask is not None:
        count = 0 if masks is None else len(masks)
        if isinstance(mask, bool) or not isinstance(mask, int) or not 1 <= mask <= count:
            raise ValueError(
                f"{name} has mask {mask!r}, and {count} masks are connected; expected a number "
                "from 1 up to theirs. Connect masks, or give the region a box."
            )
        mask = masks[mask - 1]
    return RegionShape.of(_box(entry), mask, entry.get("soft", 0.0), name)


def _loras(entry: dict, model) -> list:
    """LoRAs of a region with their strengths, read for a MODEL."""
    wanted = entry.get("loras", [])
    is_list = isinstance(wanted, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        and isinstance(pair[1], (int, float)) and abs(pair[1]) <= 100
        for pair in wanted
    )  # fmt: skip
    if not is_list:
        raise ValueError(f"loras is {wanted!r}; expected a list of [file, strength].")
    if wanted and model is None:
        raise ValueError(
            "A region has LoRAs, which need the model. Connect the sampler's MODEL to model."
        )
    return [
        (read_live_lora(model_files.find_lora(name), transformer_shapes(model)), float(strength))
        for name, strength in wanted
    ]


def _left_out(loras: list) -> str:
    """A line on the weights of a region's LoRAs that cannot act on single tokens."""
    count = sum(len(lora.left_out) for lora, _ in loras)
    return f"\n   not used: {count} weights of all tokens" if count else ""


def _name(number: int) -> str:
    return f"Region {number}"


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}\N{HORIZONTAL ELLIPSIS}"
