"""Features of a run that act on single steps and tokens: regions, controls, LoRAs on some tokens.

Both hosts of the transformer, `sampling` and ComfyUI's, ask for those of a step (`RunFeatures.at`)
and call the model within `StepFeatures.live`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.in_run import RunLora
from ..lora.live import LoraUse, TokenLayout, live_loras
from ..transformer.model import Krea2Transformer
from ..transformer.references import Reference, ReferencePlan, boost_factors
from ..transformer.regions import ActiveRegions, RegionPlan
from ..transformer.rotary_scaling import RotaryScaling, Stretch
from ..transformer.sparse_attention import ImageGroup, SparseAttention
from ..transformer.style_attention import StyleKeys
from ..transformer.text_attention import TextStates
from ..transformer.token_groups import TokenGroups
from .control_run import RunControl, live_controls
from .style_transfer import StyleRun
from .tiles import Tile, TileSettings, TileTexts, tiles_at

# A control LoRA in a run: its control channels, and the LoRA beside them, each or None.
ControlPair = tuple[RunControl | None, RunLora | None]


@dataclass(frozen=True)
class RunFeatures:
    """The features of a run.

    loras and controls: act on the calls of both texts. tiles: of a large image, None for the image
    in one. rotary: scaling of rotary positions. style: style pictures, for calls of the positive
    text. tile_texts: of single tiles, in place of the positive text. sparse: attention among image
    tokens at high noise.
    """

    regions: RegionPlan | None = None
    loras: tuple[RunLora, ...] = ()
    controls: tuple[RunControl, ...] = ()
    tiles: TileSettings | None = None
    rotary: RotaryScaling | None = None
    style: StyleRun | None = None
    tile_texts: TileTexts | None = None
    sparse: SparseAttention | None = None

    def __bool__(self) -> bool:
        others = (self.tiles, self.rotary, self.style, self.tile_texts, self.sparse)
        return any((self.regions, self.loras, self.controls, *others))

    def with_controls(self, controls: tuple[ControlPair, ...]) -> RunFeatures:
        """The features with control LoRAs added."""
        loras = tuple(lora for _, lora in controls if lora is not None)
        channels = tuple(control for control, _ in controls if control is not None)
        return replace(self, loras=self.loras + loras, controls=self.controls + channels)

    def uses_on_all_text(self, sigma: float) -> list[LoraUse]:
        """LoRAs on all text in a step that begins at a sigma, for its fusion."""
        return [
            LoraUse(own.lora, own.strength)
            for own in self.loras
            if own.region is None and own.lora.changes_text and own.acts_at(sigma)
        ]

    def uses_on_text(self, number: int) -> list[LoraUse]:
        """LoRAs on the text of a region, for its fusion."""
        return [LoraUse(own.lora, own.strength) for own in self.loras if own.region == number]

    def tiles_at(self, sigma: float, grid: tuple[int, int]) -> list[tuple[Tile, Tensor]] | None:
        """Tiles and their weights at a step, see `tiles`; None where one covers the image."""
        if self.tiles is None:
            return None
        tiles = tiles_at(grid, self.tiles, sigma)
        return tiles if len(tiles) > 1 else None

    def tiles_at_once(self, plan: ReferencePlan) -> int:
        """Tiles in one call: one where tiles differ in more than their latents.

        0 is for as many as fit. plan: of the run's references.
        """
        if self.tiles is None or self.tiles.true_places or plan.has_boosts:
            return 1
        differ = any((self.regions, self.style, self.tile_texts))
        differ |= any(lora.share_at is not None for lora in self.loras)
        differ |= bool(plan.settings) and (self.tiles.cut_references or plan.caches is not None)
        return 1 if differ else self.tiles.batch

    def check_tiles(self, plan: ReferencePlan) -> None:
        """Raise ValueError for tiles that do not go with the run's references."""
        if self.tiles is not None and self.tiles.cut_references and plan.caches is not None:
            raise ValueError(
                "Cached references are the same for all tiles, and cut_references gives each tile "
                "its own part. Set cache_references=False (input apart of Krea 2 Reference), or "
                "leave cut_references out."
            )

    def references_of(
        self, references: list[Reference], tile: Tile | None, image: tuple[int, int]
    ) -> list[Reference]:
        """The references that a tile sees. image: rows and columns of the image's tokens."""
        if tile is None or self.tiles is None or not self.tiles.cut_references:
            return references
        return [replace(r, latents=tile.cut_other(r.latents, image)) for r in references]

    def at(
        self,
        sigma: float,
        grid: tuple[int, int],
        device: torch.device,
        tiles: Sequence[Tile] = (),
    ) -> StepFeatures:
        """The features of a step that begins at a sigma, of all of an image or of tiles.

        grid: rows and columns of the image's tokens. tiles: of one call; several differ in their
        latents and in control images alone.
        """
        tile = tiles[0] if tiles else None
        cut = None if tile is None else functools.partial(tile.cut_tokens, grid=grid)
        active = None if self.regions is None else self.regions.at(sigma, grid, device, cut)
        stretch = None if self.rotary is None else self.rotary.at(grid, sigma)
        return StepFeatures(
            sigma,
            grid,
            device,
            active,
            self.loras,
            self.controls,
            tiles=tuple(tiles),
            at_true_place=self.tiles is not None and self.tiles.true_places,
            stretch=stretch,
            style=self.style,
            sparse=self._sparse_at(sigma, grid if tile is None else tile.grid, device),
        )

    def _sparse_at(self, sigma: float, grid: tuple[int, int], device: torch.device):
        return None if self.sparse is None else self.sparse.at(grid, sigma, device)


@dataclass(frozen=True)
class StepFeatures:
    """The features of one step.

    image: rows and columns of the image's tokens. references: active ones, for their boosts.
    """

    sigma: float
    image: tuple[int, int]
    device: torch.device
    regions: ActiveRegions | None = None
    loras: tuple[RunLora, ...] = ()
    controls: tuple[RunControl, ...] = ()
    references: tuple[Reference, ...] = ()
    tiles: tuple[Tile, ...] = ()
    at_true_place: bool = False
    stretch: Stretch | None = None
    style: StyleRun | None = None
    sparse: tuple[ImageGroup, ...] | None = None

    @property
    def tile(self) -> Tile | None:
        """The first tile of the call, None for all of the image."""
        return self.tiles[0] if self.tiles else None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of the call: the tile's, or the image's."""
        return self.image if self.tile is None else self.tile.grid

    @property
    def places(self) -> dict[str, Any]:
        """Arguments of the transformer that say where the tokens of the call are."""
        places: dict[str, Any] = {}
        if self.tile is not None and self.at_true_place:
            places["origin"] = (self.tile.rows[0], self.tile.columns[0])
        if self.stretch is not None:
            places["stretch"] = self.stretch
        return places

    def cut(self, shares: Tensor) -> Tensor:
        """Values (..., I) of the image's tokens, for those of the call."""
        return shares if self.tile is None else self.tile.cut_tokens(shares, self.image)

    def with_references(self, references: Sequence[Reference]) -> StepFeatures:
        return replace(self, references=tuple(references))

    def for_negative(self) -> StepFeatures:
        """The features of the negative text's call, which has no regions and no style.

        With guidance the image then moves away from what it would be without the style.
        """
        return replace(self, regions=None, style=None)

    @property
    def texts(self) -> tuple[TextStates, ...]:
        """Texts in front of the call's own."""
        return () if self.regions is None else self.regions.texts

    @property
    def groups(self) -> TokenGroups | None:
        """Groups of tokens that see different keys, None where all see all alike."""
        groups = None if self.regions is None else self.regions.groups
        if self.sparse is not None:
            groups = (groups or TokenGroups(self.grid[0] * self.grid[1])).with_sparse(self.sparse)
        boosts = [
            (first, count, self.cut(factors))
            for first, count, factors in boost_factors(self.references, *self.image)
        ]
        if not boosts:
            return groups
        groups = groups or TokenGroups(self.grid[0] * self.grid[1])
        return groups.with_references(boosts, self.device)

    def style_keys(self, model: Krea2Transformer) -> StyleKeys | None:
        """Keys and values of the style pictures, prepared for this step; None without any."""
        if self.style is None:
            return None
        return self.style.keys(self.sigma, model, self.image, self.device, self.tile)

    def join(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The text (B, L, width) and its mask with the texts of regions in front."""
        return (states, mask) if self.regions is None else self.regions.join(states, mask)

    @contextmanager
    def live(
        self, model: nn.Module, text: int, references: int = 0, front: int = 0
    ) -> Iterator[None]:
        """Apply the LoRAs and controls to calls of a transformer.

        text: tokens of the joined text. references: tokens of references in the sequence. front:
        tokens before the text, of a negative.
        """
        layout = TokenLayout(front + text, self.grid[0] * self.grid[1], references)
        texts = {} if self.regions is None else self.regions.text_tokens(front)
        uses = [
            lora.use_at(self.sigma, layout, self.image, texts, self.device, self.cut)
            for lora in self.loras
        ]
        controls = [control for control in self.controls if control.acts_at(self.sigma)]
        with (
            live_controls(model, controls, self.tiles),
            live_loras(model, [use for use in uses if use is not None], layout),
        ):
            yield
