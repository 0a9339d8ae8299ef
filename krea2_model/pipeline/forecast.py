"""`Krea2Pipeline.forecast`: the arguments of a run, and what it will take before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from ..checks import check_type, is_whole
from ..config import Preset, TransformerConfig
from ..features.controls import Control, Controls
from ..features.regions import Region, Regions
from ..features.styles import PreparedStyle, StyleTransfer
from ..features.tile_prompts import picture_tokens
from ..features.tiles import TileSettings, still_tiles, tiles_at
from ..features.upscaling import Upscale
from ..features.variations import PromptBlend
from ..guidance import SigmaAt
from ..images.sizes import MULTIPLE, image_tokens, round_size
from ..memory.activations import TEXT_TOKENS
from ..memory.forecast import Forecast, call_operations, pair_operations, style_operations
from ..memory.offload import Offload
from ..memory.plan import TRANSFORMER, VAE
from ..schedule import check_guidance, resolve_mu, schedule_of, sigma_schedule
from ..text.encoder import Qwen3VLTextEncoder
from ..text.prompt_tokens import tokenize_prompt
from ..transformer.model import Krea2Transformer
from ..transformer.sparse_attention import SparseAttention


class Parts(Protocol):
    """The parts of a pipeline that a forecast reads; see `Krea2Pipeline`."""

    @property
    def transformer(self) -> Krea2Transformer: ...
    @property
    def text_encoder(self) -> Qwen3VLTextEncoder: ...
    @property
    def _offload(self) -> Offload: ...
    @property
    def _loras(self) -> Sequence[Any]: ...
    @property
    def preset(self) -> Preset: ...
    def _activations(
        self, batch: int, image: int, text: int, references: int = 0, styles: Sequence[int] = ()
    ) -> dict[str, int]: ...


def forecast(
    self: Parts,
    width: int | None = None,
    height: int | None = None,
    *,
    num_images: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    references: Sequence[tuple[int, int]] = (),
    text_tokens: int = TEXT_TOKENS,
    tiles: TileSettings | None = None,
    regions: Regions | Sequence[Region] | None = None,
    control: Control | Sequence[Control] | None = None,
    upscale: Upscale | float | None = None,
    style: StyleTransfer | None = None,
    denoise: float = 1.0,
    sparse: SparseAttention | None = None,
    blend: PromptBlend | None = None,
) -> Forecast:
    """What a run with these arguments of a call will take; nothing is computed or moved.

    references: width and height of each reference image, as `References` encodes it.
    text_tokens: of a prompt; the official length where it is not known yet.
    regions, control, upscale, style, denoise, sparse, blend: as in a call. The second stage is the
        `second` of the result, or with denoise=0 the result.
    """
    preset = self.preset
    width, height = (
        round_size(name, preset.size if side is None else side)
        for name, side in (("width", width), ("height", height))
    )
    for name, count in (("num_images", num_images), ("text_tokens", text_tokens)):
        if not is_whole(count) or count < 1:
            raise ValueError(f"{name} is {count!r}; expected a whole number from 1 up.")
    steps = preset.steps if steps is None else steps
    enlarged = Upscale.of(upscale)
    alone = denoise == 0 and enlarged is not None
    sigmas = sigma_schedule(
        steps, resolve_mu(preset, image_tokens(width, height)), 1.0 if alone else denoise
    )
    if style is not None:
        check_type("style", style, StyleTransfer, "a StyleTransfer")
    guided = check_guidance(preset.guidance if guidance is None else guidance) > 0
    if tiles is not None:
        check_type("tiles", tiles, TileSettings, "a TileSettings, or None")
    tokenizer = self.text_encoder.get_tokenizer()
    places, text = Regions.of(regions), text_tokens
    if places is not None:
        prompts = [prompt for prompt in places.prompts() if prompt is not None]
        text += sum(len(tokenize_prompt(tokenizer, one).weight_row) for one in prompts)
    controls = Controls.of(control, self._loras[0].shapes)
    if blend is not None:
        check_type("blend", blend, PromptBlend, "a PromptBlend")
    others: list[int] = []  # tokens of the other prompt, which has calls of its own
    if blend is not None and blend.share > 0:
        others = [len(tokenize_prompt(tokenizer, blend.prompt).weight_row)]
        if blend.share == 1:  # and is the only one
            text, text_tokens, others = text - text_tokens + others[0], others[0], []

    def stage(
        width: int,
        height: int,
        sigmas: Sequence[float],
        tiles: TileSettings | None,
        text: int = text,
    ) -> Forecast:
        steps = len(sigmas) - 1
        shown = controls.seen_as_references(controls.images(width, height))
        sizes = [*references, *((image.shape[2], image.shape[1]) for image in shown)]
        extra = sum(image_tokens(*size) for size in sizes)
        grid = height // MULTIPLE, width // MULTIPLE
        cut = [grid] if tiles is None else [tile.grid for tile, _ in tiles_at(grid, tiles, 1.0)]
        image = cut[0][0] * cut[0][1]
        if tiles is not None and tiles.prompts is not None:
            tiles.prompts.texts_of(still_tiles(grid, tiles), [])
        text += picture_tokens(tiles, grid)
        texts = [text, *(each + text - text_tokens for each in others), *[text_tokens] * guided]
        longest = max(texts)
        at_once = 1 if tiles is None else max(1, tiles.batch)
        styled = None if style is None else style.prepared(width, height)
        shown_styles = [] if styled is None else styled.tokens
        # The negative text has no regions, and takes no more than the positive.
        one, both = (
            self._activations(count * at_once * num_images, image, longest, extra, shown_styles)
            for count in (1, 2)
        )
        # Both texts in one call, as a run decides it.
        needed = both if guided and self._offload.has_room(both, instead_of=one) else one
        if tiles is not None and tiles.prompts is not None:  # whose texts are held
            held = len(cut) * num_images * text * self.transformer.config.hidden_size
            needed[TRANSFORMER] += held * self.transformer.compute_dtype.itemsize
        needed[VAE] = self._activations(1, grid[0] * grid[1], longest, 0, shown_styles)[VAE]
        plan, peak, free = self._offload.forecast(needed)
        config = self.transformer.config
        operations = len(cut) * sum(
            call_operations(config, image, each, extra, num_images) for each in texts
        )
        saved, dense = 0, 0  # in a sparse step, and steps that are exact
        if sparse is not None:
            pairs = image**2 - sparse.pairs(cut[0])
            saved = len(cut) * len(texts) * pair_operations(config, pairs, num_images)
            dense = sum(not sparse.acts_at(sigma) for sigma in sigmas[:-1])
        cost = _StyleCost()
        if styled is not None:
            own = len(tokenize_prompt(tokenizer, styled.prompt).weight_row)
            sigma_at = schedule_of(sigmas, preset, grid[0] * grid[1])
            counts = image, len(cut) * num_images
            cost = _style_cost(config, styled, own, sigmas, sigma_at, counts)
        return Forecast(
            width=width,
            height=height,
            batch=num_images,
            image=grid[0] * grid[1],
            text=text,
            references=extra,
            steps=steps,
            tiles=len(cut),
            calls=steps * len(texts) * len(cut) + cost.calls,
            step_operations=operations - saved + cost.step,
            operations=steps * operations - (steps - dense) * saved + cost.whole,
            peak=peak,
            free=free,
            plan=plan,
            activations=needed,
            styles=sum(shown_styles),
            style_calls=cost.calls,
        )

    if enlarged is None:
        return stage(width, height, sigmas, tiles)
    sides = enlarged.size(width, height)
    second = stage(*sides, enlarged.sigmas(*sides, preset), enlarged.tiles(*sides, preset))
    if alone:
        return second
    return replace(stage(width, height, sigmas, tiles), second=second)


class _StyleCost(NamedTuple):
    """The cost of style pictures: calls of the model, operations of a step with them and a run."""

    calls: int = 0
    step: int = 0
    whole: int = 0


def _style_cost(
    config: TransformerConfig,
    style: PreparedStyle,
    text: int,
    sigmas: Sequence[float],
    sigma_at: SigmaAt,
    images: tuple[int, int],
) -> _StyleCost:
    """The cost of style pictures in a run. text: tokens of their prompt. images: tokens of each of
    the sequences that attend to them in a step, and their number."""
    tokens = [own for own, share in zip(style.tokens, style.shares, strict=True) if share > 0]
    passes = sum(call_operations(config, own, text) for own in tokens)
    calls, steps = style.settings.passes(sigmas, sigma_at)
    first, end = style.settings.blocks(config.num_layers)
    attended = style_operations(config, images[0], sum(tokens), end - first, images[1])
    step = passes + attended if steps else 0
    return _StyleCost(len(tokens) * calls, step, calls * passes + steps * attended)
