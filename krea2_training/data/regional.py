"""Prompts with regions: texts for parts of the pictures that training paints.

A row of a table names them in the column `regions`, as `krea2 generate --regions` takes them: a
list, or its JSON. Without such rows a few-step student forgets what Raw does with regions, since
tokens then see only a part of the others.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_model.checkpoints.loading import PartState
from krea2_model.config import RAW
from krea2_model.features.region_list import read_regions
from krea2_model.features.regions import Region, Regions
from krea2_model.images.region_shapes import RegionShapes
from krea2_model.transformer.model import Krea2Transformer, grid_size
from krea2_model.transformer.patches import PATCH
from krea2_model.transformer.regions import RegionPlan
from krea2_model.transformer.text_attention import TextStates
from krea2_model.transformer.token_groups import TokenGroups

from .cache import Cache, Texts
from .prompts import COLUMN, REGIONS, Prompts, Row, has_regions, in_turn, read_prompts
from .shapes import ASPECTS

# Pixels along the side of a token.
_TOKEN = 8 * PATCH


@dataclass(frozen=True)
class RegionalTexts(Texts):
    """Prompts on the device, for pictures with regions at the same places.

    regions: the texts of each region, one a picture. places: of the regions.
    """

    regions: tuple[Texts, ...] = ()
    places: Regions | None = None

    def fused(
        self, model: Krea2Transformer, latents: Tensor
    ) -> tuple[Tensor, Tensor | None, TokenGroups | None]:
        """As `joined`.

        All texts are fused in one call, as one without regions is: processes that share the weights
        call the model as often as each other, whatever their batches have.
        """
        texts = (Texts(self.taps, self.mask), *self.regions)
        longest = max(map(_length, texts))
        everything = Texts(
            torch.cat([F.pad(one.taps, (0, 0, 0, 0, 0, longest - _length(one))) for one in texts]),
            torch.cat([F.pad(_mask(one), (0, longest - _length(one))) for one in texts]),
        )
        parts = everything.fuse(model).chunk(len(texts))
        states = [part[:, : _length(one)] for part, one in zip(parts, texts, strict=True)]
        own = [
            TextStates(part, one.mask) for part, one in zip(states[1:], self.regions, strict=True)
        ]
        active = self._plan.at(1.0, grid_size(latents, PATCH), latents.device)
        assert active is not None  # `regions_of` refuses regions that do not always act
        active = replace(active, texts=tuple(own))
        return *active.join(states[0], self.mask), active.groups

    @functools.cached_property
    def _plan(self) -> RegionPlan:
        """Kept for all calls of a batch: what sees what depends on the lengths of texts alone."""
        assert self.places is not None
        unfused = [TextStates(one.taps.flatten(2), one.mask) for one in self.regions]
        settings = [region.settings for region in self.places.regions]
        shares, factor = self.places.shapes.shares, self.places.text_factor
        return RegionPlan(unfused, settings, shares, text_factor=factor)


def _length(texts: Texts) -> int:
    return texts.taps.shape[1]


def _mask(texts: Texts) -> Tensor:
    if texts.mask is not None:
        return texts.mask
    return torch.ones(texts.taps.shape[:2], dtype=torch.bool, device=texts.taps.device)


def joined(
    texts: Texts, model: Krea2Transformer, latents: Tensor
) -> tuple[Tensor, Tensor | None, TokenGroups | None]:
    """Fused text (B, L, D) and its mask for a call, and the groups of tokens that regions make."""
    if isinstance(texts, RegionalTexts):
        return texts.fused(model, latents)
    return texts.fuse(model), texts.mask, None


def regions_of(row: Row, number: int) -> Regions | None:
    """The regions of a row, None without any. Raises ValueError, with the row's number."""
    if not has_regions(row):
        return None
    found = row[REGIONS]
    text = found if isinstance(found, str) else json.dumps(_without_nulls(found), default=str)
    try:
        entries, options = read_regions(text)
        for at, entry in enumerate(entries, start=1):
            if named := [name for name in ("loras", "images", "mask") if entry.get(name)]:
                raise ValueError(f"Region {at} has {named[0]}; training takes a prompt and a box.")
        regions = Regions.read(entries, **options)
        for at, region in enumerate(regions.regions, start=1):
            _check(region, at)
        if regions.separate:
            raise ValueError(f"separate is {regions.separate:g}; expected 0 for training.")
    except ValueError as error:
        raise ValueError(f"Row {number}, {REGIONS}: {error}") from error
    return regions


def _without_nulls(value: Any) -> Any:
    """A cell of a table without what it lacks: Parquet gives all regions the keys of any."""
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without_nulls(own) for key, own in value.items() if own is not None}
    return value


def _check(region: Region, number: int) -> None:
    if not region.strength:
        raise ValueError(f"Region {number} has strength 0, which does nothing. Leave it out.")
    if (region.start, region.end) != (0.0, 1.0):
        raise ValueError(
            f"Region {number} acts in a part of the run, from {region.start:g} to {region.end:g}; "
            "training takes whole runs. Leave start and end out."
        )


class PromptBatches:
    """Which prompts a batch has: rows with regions at the same places, or rows without any."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.prompts = [row[COLUMN] for row in rows]
        self.regions = [regions_of(row, number) for number, row in enumerate(rows, start=1)]
        places = [None if own is None else _places(own) for own in self.regions]
        self._alike: dict[Any, list[int]] = {}
        for index, place in enumerate(places):
            self._alike.setdefault(place, []).append(index)
        self._group = [self._alike[place] for place in places]

    def check_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Raise ValueError, with the row's number, for regions without a place in a picture.

        sizes: of the pictures, width and height in pixels. The rule is that of a run.
        """
        firsts = [rows[0] for rows in self._alike.values()]
        for (width, height), row in itertools.product(sizes, firsts):
            if (own := self.regions[row]) is None:
                continue
            try:
                # By shapes that keep none of what they compute.
                RegionShapes(own.shapes.shapes).shares(height // _TOKEN, width // _TOKEN)
            except ValueError as error:
                raise ValueError(
                    f"Row {row + 1}, {REGIONS}: {error} Or paint larger pictures (prompts.size) or "
                    "other shapes (prompts.aspects)."
                ) from error

    @property
    def texts(self) -> list[str]:
        """All texts that have to be encoded."""
        return list(dict.fromkeys((*self.prompts, *(text for _, text in self.named))))

    @property
    def named(self) -> list[tuple[str, str]]:
        """The texts of regions, each after the words for where it stands."""
        return [
            (f"region {at} of row {number}", text)
            for number, own in enumerate(self.regions, start=1)
            for at, text in enumerate(own.prompts() if own else (), start=1)
            if text
        ]

    def draw(self, batch: int, number: int, seed: int) -> list[int]:
        """The rows of a batch by its number. The first is the next in turn; it decides the rest."""
        chosen = in_turn(len(self.prompts), batch, number, seed)
        if len(self._alike) == 1:
            return chosen
        alike, random = self._group[chosen[0]], Random(f"regions {seed} {number}")
        return [chosen[0], *random.choices(alike, k=batch - 1)]

    def read(
        self, rows: Sequence[int], prompts: Sequence[str], cache: Cache, device: torch.device
    ) -> Texts:
        """The texts of a batch. prompts: of the rows, some left empty."""
        texts, first = cache.texts(prompts, device), self.regions[rows[0]]
        if first is None:
            return texts
        own = [self.regions[row] for row in rows]
        of_rows = [regions.prompts() for regions in own if regions is not None]
        regions = tuple(
            cache.texts([t or "" for t in column], device) for column in zip(*of_rows, strict=True)
        )
        return RegionalTexts(texts.taps, texts.mask, regions, first)


def read_batches(prompts: Prompts, state: PartState) -> PromptBatches:
    """The prompts of distillation, for a model by its header.

    Raises ValueError for prompts that cannot be used, and for regions without a place in one of the
    pictures.
    """
    assert prompts.path is not None
    batches = PromptBatches(read_prompts(prompts.path, regions=True))
    batches.check_sizes(prompts.sizes(prompts.size or (state.preset or RAW).size, ASPECTS))
    return batches


def _places(regions: Regions) -> tuple:
    """A key that regions at the same places share."""
    places = tuple(
        (region.box if isinstance(region.box, str) else tuple(region.box or ()), region.strength,
         region.soft) for region in regions.regions
    )  # fmt: skip
    return places, regions.text_factor, regions.soft
