"""Regional prompts as arguments of a run: a text, and LoRAs, for parts of the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import nano
from ..checkpoints.transformer_keys import Shape
from ..checks import as_path, check_type, is_number
from ..guidance import SigmaAt
from ..images.pictures import Picture
from ..images.region_shapes import MAX_SOFT, RegionShape, RegionShapes
from ..lora.in_run import RunLora, ShareAt
from ..lora.live import LiveLora, live_loras_of_text
from ..lora.live_files import read_live_lora
from ..text.prompt_images import PromptImage
from ..transformer.regions import RegionPlan, RegionSettings, SharesAt, check_region_options
from ..transformer.text_attention import TextStates
from .arguments import PromptImages
from .inpainting import mask_pixels
from .region_places import with_place, with_regions
from .run_features import RunFeatures

# Defaults of `Regions`, by which krea2-nano keeps two and three things apart.
TEXT_FACTOR, SEPARATE, SOFT = 1.0, 0.0, 0.0

# The largest scale of a region's LoRA, either way.
MAX_LORA_SCALE = 100.0

# In place of the number of a region's text, for a region without one.
NO_TEXT = -1


@dataclass(frozen=True)
class Region:
    """A region of the image.

    prompt: the text for it, encoded by itself. May be empty where the region has LoRAs.
    box: left, top, width and height in fractions of the image, or "background" for what no other
        region covers. mask: instead, a picture of the image's aspect, white where the region is.
    strength: factor on attention to the prompt, 0 (left out) to 10.
    start, end: fractions of the schedule's time between which the region counts.
    soft: width of its edge, as a fraction of the image's shorter side; None is that of `Regions`.
    loras: files and their scales, which act in the region alone.
    images: in front of its prompt, as the argument `images` of a run.

    Raises ValueError for values out of range. Later regions lie on top of earlier ones.
    """

    prompt: str = ""
    box: Sequence[float] | str | None = None
    mask: Picture | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    soft: float | None = None
    loras: Sequence[tuple[str | Path, float]] = ()
    images: PromptImages | Sequence[PromptImage | Picture] | None = None

    def __post_init__(self):
        check_type("A region's prompt", self.prompt, str, "a text")
        self.settings  # noqa: B018 - checks the numbers
        if not isinstance(self.loras, Sequence) or isinstance(self.loras, str):
            raise ValueError(f"A region's loras is {self.loras!r}; expected pairs (file, scale).")
        for entry in self.loras:
            is_pair = isinstance(entry, Sequence) and not isinstance(entry, str)
            if not (is_pair and len(entry) == 2 and is_number(entry[1])):
                raise ValueError(f"A region's lora is {entry!r}; expected a pair (file, scale).")
            if not abs(entry[1]) <= MAX_LORA_SCALE:
                raise ValueError(
                    f"A region's lora has scale {entry[1]}; expected -{MAX_LORA_SCALE:g} to "
                    f"{MAX_LORA_SCALE:g}, 1 as trained."
                )
        if not self.has_text and not self.loras:
            raise ValueError(
                "A region has no prompt. Say what it shows, give it a LoRA, or leave it out."
            )
        if not self.has_text and PromptImages.of(self.images).images:
            raise ValueError("A region has images but no prompt. Say what it shows.")

    @property
    def has_text(self) -> bool:
        return bool(self.prompt.strip())

    @property
    def settings(self) -> RegionSettings:
        return RegionSettings(self.strength, self.start, self.end)

    def shape(self, name: str = "A region", soft: float = SOFT) -> RegionShape:
        """Its shape. name: for errors. soft: of a region that has no soft edge of its own."""
        mask = None if self.mask is None else mask_pixels(self.mask, f"{name}'s mask")[0]
        return RegionShape.of(self.box, mask, soft if self.soft is None else self.soft, name)


@dataclass(frozen=True)
class Regions:
    """The regions of a run, from the lowest to the one on top, and how they share the image.

    text_factor: factor on attention of a region's tokens to the prompt of the whole image.
    separate: fraction of the schedule's time up to which image tokens see only those of their own
        region.
    places: say the place of each region in its prompt ("a red circle on the left"), which a model
        follows better than its mask.
    soft: soft edge of regions that have none of their own, see `Region`.
    in_prompt: say in the prompt of the whole image too what the regions show, and where.

    Raises ValueError for no regions, more than 8, and values out of range.
    """

    regions: Sequence[Region]
    text_factor: float = TEXT_FACTOR
    separate: float = SEPARATE
    places: bool = True
    soft: float = SOFT
    in_prompt: bool = False

    @classmethod
    def of(cls, regions: Regions | Sequence[Region] | Region | None) -> Regions | None:
        if regions is None or isinstance(regions, Regions):
            return regions
        return cls([regions] if isinstance(regions, Region) else list(regions))

    @classmethod
    def read(cls, entries: Sequence[Mapping[str, Any]], **options: Any) -> Regions:
        """Regions of arguments, such as those of `region_list.read_regions`.

        Raises ValueError with the number of the region that is wrong.
        """
        regions = []
        for number, entry in enumerate(entries, start=1):
            try:
                regions.append(Region(**entry))
            except ValueError as error:
                text = str(error).removeprefix("A region")
                raise ValueError(f"Region {number}{text}") from error
        return cls(regions, **options)

    def __post_init__(self):
        for region in self.regions:
            check_type("An entry of regions", region, Region, "a Region")
        check_region_options(self.text_factor, self.separate)
        if not (is_number(self.soft) and 0 <= self.soft <= MAX_SOFT):
            raise ValueError(
                f"soft is {self.soft!r}; expected 0 (hard edges) to {MAX_SOFT:g}, as a fraction of "
                "the image's shorter side."
            )
        self.shapes  # noqa: B018 - checks them

    @functools.cached_property
    def shapes(self) -> RegionShapes:
        """Their shapes; masks are read once."""
        named = enumerate(self.regions, start=1)
        return RegionShapes([region.shape(f"Region {n}", self.soft) for n, region in named])

    def prepared(self, shapes: Mapping[str, Shape], grid: tuple[int, int]) -> PreparedRegions:
        """With LoRA files and images read, for a transformer of these weights.

        grid: rows and columns of the image's tokens. Raises CheckpointError for a file that fits
        nothing, and ValueError for a region that covers no token of the image.
        """
        self.shapes.shares(*grid)
        loras, reports = [], []
        for number, region in enumerate(self.regions, start=1):
            own = []
            for file, scale in region.loras:
                path = nano.lora_file(as_path(file, "A region's lora"))
                lora, report = read_live_lora(path, shapes)
                own.append((lora, scale))
                reports.append(f"Region {number}: {report}")
            loras.append(own)
        groups = [PromptImages.of(region.images) for region in self.regions]
        images = [replace(group, images=group.prepared()) for group in groups]
        return PreparedRegions(self, loras, images, reports)

    def prompts(self) -> list[str | None]:
        """The text of each region, with its place where `places` asks for it; None without one."""
        return [
            None
            if not region.has_text
            else with_place(region.prompt, shape)
            if self.places
            else region.prompt
            for region, shape in zip(self.regions, self.shapes.shapes, strict=True)
        ]

    def whole(self, prompts: Sequence[str]) -> list[str]:
        """Prompts of the whole image, with the regions where `in_prompt` asks for them."""
        if not self.in_prompt:
            return list(prompts)
        pairs = zip(self.regions, self.shapes.shapes, strict=True)
        texts = [(region.prompt, shape) for region, shape in pairs if region.has_text]
        return [with_regions(prompt, texts) for prompt in prompts]


@dataclass(frozen=True)
class PreparedRegions:
    """Regions with their files read.

    loras: of each region, pairs of LoRA and scale. images: of each, at the size that the vision
    tower reads. reports: of LoRA files.
    """

    regions: Regions
    loras: Sequence[Sequence[tuple[LiveLora, float]]]
    images: Sequence[PromptImages]
    reports: Sequence[str] = ()

    def features(self, texts: Sequence[TextStates | None], sigma_at: SigmaAt) -> RunFeatures:
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


def region_features(
    texts: Sequence[TextStates | None],
    loras: Sequence[Sequence[tuple[LiveLora, float]]],
    settings: Sequence[RegionSettings],
    shares_at: SharesAt,
    sigma_at: SigmaAt,
    *,
    for_run: Callable[[LiveLora], LiveLora] = LiveLora.for_run,
    **options: float,
) -> RunFeatures:
    """Regions in a run: of each its text, its LoRAs with their scales, and its settings.

    texts: None for a region of LoRAs alone, as all are in calls of a negative. for_run: the copy of
    a LoRA that a run puts on the device. options: of `RegionPlan`.
    """
    numbers = [number for number, text in enumerate(texts) if text is not None]

    def share_at(number: int) -> ShareAt:
        return lambda rows, columns: shares_at(rows, columns)[number]

    in_run = tuple(
        RunLora(
            for_run(lora),
            scale,
            settings[number].window(sigma_at),
            share_at(number),
            numbers.index(number) if number in numbers else NO_TEXT,
        )
        for number, own in enumerate(loras)
        for lora, scale in own
    )
    plan = None
    if numbers:
        plan = RegionPlan(
            [text for text in texts if text is not None],
            [settings[number] for number in numbers],
            lambda rows, columns: shares_at(rows, columns)[numbers],
            sigma_at,
            **options,
        )
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
