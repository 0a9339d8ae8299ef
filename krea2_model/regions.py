"""Regional prompts as arguments of a run: a text, and LoRAs, for parts of the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from .checkpoints.transformer_keys import Shape
from .checks import as_path, check_type, is_number
from .guidance import SigmaAt
from .images.pictures import Picture
from .images.region_shapes import RegionShape, RegionShapes
from .inpainting import mask_pixels
from .lora.files import read_lora, read_lora_file
from .lora.in_run import RunLora, ShareAt
from .lora.live import LiveLora, live_loras_of_text
from .run_features import RunFeatures
from .transformer.regions import RegionPlan, RegionSettings, SharesAt, check_region_options
from .transformer.text_attention import TextStates

# Fractions of the image between which a region's middle is in neither half.
_MIDDLE = (0.4, 0.6)


@dataclass(frozen=True)
class Region:
    """A region of the image.

    prompt: what is there, encoded by itself.
    box: left, top, width and height in fractions of the image, or "background" for what no other
        region covers. mask: instead, a picture of the image's aspect, white where the region is.
    strength: factor on attention to the prompt, 0 (left out) to 10.
    start, end: fractions of the schedule's time between which the region counts.
    soft: width of its edge, as a fraction of the image's shorter side.
    loras: files and their scales, which act in the region alone.

    Raises ValueError for values out of range. Later regions lie on top of earlier ones.
    """

    prompt: str
    box: Sequence[float] | str | None = None
    mask: Picture | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    soft: float = 0.0
    loras: Sequence[tuple[str | Path, float]] = ()

    def __post_init__(self):
        check_type("A region's prompt", self.prompt, str, "a text")
        self.settings  # noqa: B018 - checks the numbers
        for entry in self.loras:
            is_pair = isinstance(entry, Sequence) and not isinstance(entry, str)
            if not (is_pair and len(entry) == 2 and is_number(entry[1])):
                raise ValueError(f"A region's lora is {entry!r}; expected a pair (file, scale).")

    @property
    def settings(self) -> RegionSettings:
        return RegionSettings(self.strength, self.start, self.end)

    def shape(self) -> RegionShape:
        mask = None if self.mask is None else mask_pixels(self.mask, "A region's mask")[0]
        return RegionShape.of(self.box, mask, self.soft)


@dataclass(frozen=True)
class Regions:
    """The regions of a run, from the lowest to the one on top, and how they share the image.

    text_factor: factor on attention of a region's tokens to the prompt of the whole image.
    separate: fraction of the schedule's time up to which image tokens see only those of their own
        region.
    places: say the place of each region in its prompt ("a red circle on the left"), which a model
        follows better than its mask.

    Raises ValueError for no regions, more than 8, and values out of range.
    """

    regions: Sequence[Region]
    text_factor: float = 1.0
    separate: float = 0.0
    places: bool = True

    @classmethod
    def of(cls, regions: Regions | Sequence[Region] | Region | None) -> Regions | None:
        if regions is None or isinstance(regions, Regions):
            return regions
        return cls([regions] if isinstance(regions, Region) else list(regions))

    def __post_init__(self):
        for region in self.regions:
            check_type("An entry of regions", region, Region, "a Region")
        check_region_options(self.text_factor, self.separate)
        self.shapes  # noqa: B018 - checks them

    @functools.cached_property
    def shapes(self) -> RegionShapes:
        """Their shapes; masks are read once."""
        return RegionShapes([region.shape() for region in self.regions])

    def prepared(self, shapes: Mapping[str, Shape], grid: tuple[int, int]) -> PreparedRegions:
        """With LoRA files read for a transformer of these weights.

        grid: rows and columns of the image's tokens. Raises CheckpointError for a file that fits
        nothing, and ValueError for a region that covers no token of the image.
        """
        self.shapes.shares(*grid)
        loras = [
            [
                (read_live_lora(as_path(file, "A region's lora"), shapes), scale)
                for file, scale in region.loras
            ]
            for region in self.regions
        ]
        return PreparedRegions(self, loras)

    def prompts(self) -> list[str]:
        """The text of each region, with its place where `places` asks for it."""
        return [
            with_place(region.prompt, shape) if self.places else region.prompt
            for region, shape in zip(self.regions, self.shapes.shapes, strict=True)
        ]


@dataclass(frozen=True)
class PreparedRegions:
    """Regions with their LoRAs: of each region, pairs of LoRA and scale."""

    regions: Regions
    loras: Sequence[Sequence[tuple[LiveLora, float]]]

    def features(self, texts: Sequence[TextStates], sigma_at: SigmaAt) -> RunFeatures:
        """The features of a run. texts: of the regions, which `fuse_regions` may fuse later."""
        return region_features(
            texts,
            self.loras,
            [region.settings for region in self.regions.regions],
            self.regions.shapes.shares,
            sigma_at,
            text_factor=self.regions.text_factor,
            separate=self.regions.separate,
        )


def read_live_lora(path: Path, shapes: Mapping[str, Shape]) -> LiveLora:
    """A LoRA file for single tokens of a transformer with weights of these shapes."""
    tensors, metadata = read_lora_file(path)
    updates, _, _ = read_lora(tensors, shapes, path.name, None, metadata)
    return LiveLora(updates)


def region_features(
    texts: Sequence[TextStates] | None,
    loras: Sequence[Sequence[tuple[LiveLora, float]]],
    settings: Sequence[RegionSettings],
    shares_at: SharesAt,
    sigma_at: SigmaAt,
    *,
    for_run: Callable[[LiveLora], LiveLora] = LiveLora.for_run,
    **options: float,
) -> RunFeatures:
    """Regions in a run: of each its text, its LoRAs with their scales, and its settings.

    texts: None for the LoRAs alone, in calls of a negative. for_run: the copy of a LoRA that a run
    puts on the device. options: of `RegionPlan`.
    """

    def share_at(number: int) -> ShareAt:
        return lambda rows, columns: shares_at(rows, columns)[number]

    in_run = tuple(
        RunLora(for_run(lora), scale, settings[number].window(sigma_at), share_at(number), number)
        for number, own in enumerate(loras)
        for lora, scale in own
    )
    plan = None
    if texts is not None:
        plan = RegionPlan(texts, settings, shares_at, sigma_at, **options)
    return RunFeatures(plan, in_run)


def fuse_regions(
    features: RunFeatures, transformer: nn.Module, fuse: Callable[[TextStates], TextStates]
) -> RunFeatures:
    """The features with the texts of regions fused, each under its LoRAs."""
    if features.regions is None:
        return features
    texts = []
    for number, text in enumerate(features.regions.texts):
        with live_loras_of_text(transformer, features.uses_on_text(number)):
            texts.append(fuse(text))
    return replace(features, regions=features.regions.with_texts(texts))


def with_place(prompt: str, shape: RegionShape) -> str:
    """A region's prompt with the place of its middle in the image, as words."""
    words = place_of(shape)
    return f"{prompt.strip().rstrip('.,')} {words}" if words else prompt


def place_of(shape: RegionShape) -> str:
    """The place of a region's middle in words, empty for one in the middle of the image."""
    if shape.is_background:
        return "in the background"
    across, down = shape.centre()
    column = "left" if across < _MIDDLE[0] else "right" if across > _MIDDLE[1] else ""
    row = "top" if down < _MIDDLE[0] else "bottom" if down > _MIDDLE[1] else ""
    if row and column:
        return f"in the {row} {column}"
    if column:
        return f"on the {column}"
    return f"at the {row}" if row else ""
