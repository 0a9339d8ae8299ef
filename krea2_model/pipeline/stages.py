"""The stages of a run: prompts, latents, schedule, denoising, encoding and decoding of images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import check_finite, check_type, is_number, is_whole
from ..features.arguments import (
    PromptImages,
    ReferencePicture,
    References,
    check_latents,
    prompt_list,
    start_noise,
    start_sides,
)
from ..features.controls import NO_CONTROLS, Control, Controls
from ..features.inpainting import LatentMask
from ..features.prompt_embeds import PromptEmbeds, StepTexts, encode_prompts
from ..features.regions import PreparedRegions, fuse_regions
from ..features.styles import PreparedStyle
from ..features.tiles import ENOUGH, TileSettings, TileTexts, still_tiles
from ..features.variations import Variation
from ..images.pictures import Picture, fit, pixels_of
from ..images.sizes import image_tokens, is_far
from ..memory.activations import WHOLE_PIXELS, activations
from ..memory.plan import ENCODER, TRANSFORMER, VAE
from ..sampling import denoise as denoising_steps
from ..schedule import check_guidance, resolve_mu, schedule_of, sigma_schedule
from ..text.prompt_images import PromptImage
from ..transformer.patches import PATCH, grid_size, token_count
from ..transformer.references import Reference
from ..transformer.rotary_scaling import RotaryScaling
from ..transformer.shared_calls import pays_to_share
from ..transformer.sparse_attention import SparseAttention
from ..transformer.text_attention import TextStates
from .kept_texts import KeptTexts
from .parts import LoadedParts, device_of

logger = logging.getLogger(__name__)

Callback = Callable[[int, Tensor, Tensor], None]


class PipelineStages(LoadedParts):
    """The stages of a run, for `Krea2Pipeline` and for runs of one's own."""

    _kept_texts: KeptTexts | None = None

    @torch.no_grad()
    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        *,
        images: PromptImages | Sequence[PromptImage | Picture] | None = None,
        weighted: bool = False,
        max_sequence_length: int | None = None,
    ) -> PromptEmbeds:
        """Encode a prompt or several, each with the same images in front; arguments as in a call.

        weighted: read `(word:1.3)` as weights.
        """
        group = PromptImages.of(images)
        texts = prompt_list(prompts, None)
        assert texts is not None
        prepared = group.prepared()
        tower = [self.text_encoder.unmoved_vision_tower()] if prepared else []

        def encode() -> PromptEmbeds:
            with self._offload.use(ENCODER, *tower):
                return encode_prompts(
                    self.text_encoder,
                    texts,
                    images=prepared,
                    labels=group.labels,
                    weighted=weighted,
                    max_sequence_length=max_sequence_length,
                )

        # A LoRA of the text encoder gives other encodings; those are not kept.
        if self._kept_texts is None or prepared or any(self._loras[1].updates.values()):
            return encode()
        return self._kept_texts.get((tuple(texts), weighted, max_sequence_length), encode)

    @contextmanager
    def keep_texts(self, count: int = 64) -> Iterator[None]:
        """Encode prompts that come again once: the last `count` encodings are kept meanwhile.

        Prompts with images are encoded anew. The text encoder's weights must stay as they are,
        except by `load_lora` and `unload_lora`.
        """
        if not is_whole(count) or count < 1:
            raise ValueError(f"count is {count!r}; expected a whole number from 1 up.")
        before, self._kept_texts = self._kept_texts, KeptTexts(count)
        try:
            yield
        finally:
            self._kept_texts = before

    @torch.no_grad()
    def prepare_latents(
        self,
        batch: int = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        start_image: Picture | None = None,
        sigma: float = 1.0,
        vary: Variation | Sequence[Variation] | None = None,
    ) -> Tensor:
        """Latents (B, 16, h, w) in float32 to denoise from `sigma` on; arguments as in a call.

        Noise drawn from one seed per image, or `latents`. With a start_image: its latents, noised
        to `sigma`, the first sigma of the run.
        """
        if not is_whole(batch) or batch < 1:
            raise ValueError(f"batch is {batch!r}; expected a whole number from 1 up.")
        if not (is_number(sigma) and 0 <= sigma <= 1):
            raise ValueError(f"sigma is {sigma!r}; expected a number from 0 to 1 (noise).")
        start, height, width = self._start(start_image, height, width)
        noise = self._noise(batch, height, width, seed, latents, Variation.of(vary))
        return noise if start is None else self._add_noise(start, noise, sigma)

    def schedule(
        self, latents: Tensor, steps: int | None = None, denoise: float = 1.0
    ) -> list[float]:
        """Sigmas of the checkpoint's preset for latents (B, 16, h, w), see `sigma_schedule`."""
        check_latents(latents)
        mu = resolve_mu(self.preset, token_count(latents))
        return sigma_schedule(self.preset.steps if steps is None else steps, mu, denoise)

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        positive: PromptEmbeds,
        negative: PromptEmbeds | None = None,
        *,
        sigmas: Sequence[float],
        guidance: float = 0.0,
        references: References | Sequence[Reference | Picture] | None = None,
        control: Control | Sequence[Control] | None = None,
        callback: Callback | None = None,
        **options,
    ) -> Tensor:
        """Denoise latents (B, 16, h, w) along sigmas, `schedule`'s for example.

        positive, negative: n prompts, where n divides B; each is used for B / n images in a row.
        guidance: above 0 needs a negative.
        options: partial, evaluate_every, guidance_schedule, negative_guidance, see
            `sampling.denoise`; inpaint, a `LatentMask`.
        """
        check_latents(latents)
        for name, text in (("positive", positive), ("negative", negative)):
            if text is not None or name == "positive":
                check_type(name, text, PromptEmbeds, "what encode_prompt() returns")
        guidance = check_guidance(guidance)
        group = References.of(references)
        prepared = group.prepared()
        controls = Controls.of(control, self._loras[0].shapes)
        method = controls.method(group.method if prepared else None)
        control_images = controls.images(*self._sides(latents))
        seen = [*prepared, *map(ReferencePicture, controls.seen_as_references(control_images))]
        text_tokens = positive.taps.shape[1]
        has_room = self._plan_memory(latents, text_tokens, seen, guidance > 0)
        return self._denoise(
            latents,
            positive,
            negative,
            has_room,
            callback,
            sigmas=sigmas,
            guidance=guidance,
            references=prepared,
            reference_method=method,
            cache_references=group.cache,
            controls=controls,
            control_images=control_images,
            **options,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents (B, 16, H / 8, W / 8), normalised.

        In tiles as in `decode`.
        """
        check_type("images", images, Tensor, "a tensor (B, 3, H, W) in [0, 1]")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected floating numbers in [0, 1].")
        check_finite(images, "images")
        with self._offload.use(VAE):
            weight = next(self.vae.parameters())
            images = images.to(weight) * 2 - 1
            is_large = math.prod(images.shape[-2:]) > WHOLE_PIXELS
            return self._with_tiles(images, is_large, self.vae.encode, self.vae.encode_tiled)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, h, w) to images (B, 3, H, W) in [0, 1].

        In tiles, which give the same picture, above 4 megapixels or if memory runs out.
        """
        check_latents(latents)
        with self._offload.use(VAE):
            latents = latents.to(device_of(self.vae))
            is_large = math.prod(self._sides(latents)) > WHOLE_PIXELS
            images = self._with_tiles(latents, is_large, self.vae.decode, self.vae.decode_tiled)
            return (images.float() / 2 + 0.5).clamp(0, 1)

    def _with_tiles(
        self,
        source: Tensor,
        is_large: bool,
        convert: Callable[[Tensor], Tensor],
        convert_tiled: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`convert` of a source, or in tiles where it is large or memory runs out."""
        try:
            result = None if is_large else convert(source)
        except torch.OutOfMemoryError:
            logger.warning("The VAE ran out of memory; it works in tiles instead.")
            result = None
        # Outside the except block, whose traceback holds tensors.
        return convert_tiled(source) if result is None else result

    def images_at_once(self, width: int, height: int, text_tokens: int, limit: int = 64) -> int:
        """Images of a size whose steps run in one call of the model without other offloading."""
        tokens = image_tokens(width, height)
        one = self._activations(1, tokens, text_tokens)
        count = 1
        while count < limit:
            if not self._offload.has_room(self._activations(count + 1, tokens, text_tokens), one):
                break
            count += 1
        return count

    def _tiles_that_fit(
        self,
        tiles: TileSettings | None,
        latents: Tensor,
        text_tokens: int,
        references: Sequence[Reference | ReferencePicture] = (),
    ) -> TileSettings | None:
        """Tiles with a batch of 0 resolved: as many as run without other offloading, up to 8."""
        if tiles is None or tiles.batch > 0:
            return tiles
        tokens, extra = tiles.tokens(latents), self._reference_tokens(references)
        one = self._activations(len(latents), tokens, text_tokens, extra)
        count = 1
        while count < ENOUGH:
            more = self._activations((count + 1) * len(latents), tokens, text_tokens, extra)
            if not self._offload.has_room(more, one):
                break
            count += 1
        return replace(tiles, batch=count)

    def _start(
        self, image: Picture | None, height: int | None, width: int | None
    ) -> tuple[Tensor | None, int | None, int | None]:
        """The pixels (3, H, W) of an image to change, or None, and the height and width."""
        if image is None:
            return None, height, width
        pixels = fit(pixels_of(image, "start_image"), *start_sides(width, height))
        return pixels, pixels.shape[1], pixels.shape[2]

    def _noise(
        self,
        batch: int,
        height: int | None,
        width: int | None,
        seed: int | Sequence[int],
        latents: Tensor | None,
        vary: Sequence[Variation] = (),
    ) -> Tensor:
        channels, downscale = self.transformer.config.latent_channels, self.vae.config.downscale
        size = self.preset.size
        shape, sides = (batch, channels, downscale), (height, width)
        noise = start_noise(latents, shape, sides, size, seed, vary)
        width, height = self._sides(noise)
        if is_far(width, height, size):
            logger.warning(
                "%d x %d px is far from the %d x %d this checkpoint was trained at; expect "
                "repeated or broken shapes.",
                width,
                height,
                size,
                size,
            )
        return noise

    def _add_noise(self, pixels: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Latents of an image (3, H, W) with noise as of a sigma."""
        return torch.lerp(self.encode(pixels[None]).to(noise), noise, sigma)

    def _sides(self, latents: Tensor) -> tuple[int, int]:
        """Width and height in pixels of latents (..., h, w)."""
        height, width = (self.vae.config.downscale * side for side in latents.shape[-2:])
        return width, height

    def _denoise(
        self,
        latents: Tensor,
        positive: PromptEmbeds,
        negative: PromptEmbeds | None,
        has_room: bool,
        callback: Callback | None,
        *,
        references: Sequence[Reference | ReferencePicture],
        controls: Controls = NO_CONTROLS,
        control_images: Sequence[Tensor] = (),
        inpaint: LatentMask | None = None,
        tiles: TileSettings | None = None,
        rotary: RotaryScaling | None = None,
        sparse: SparseAttention | None = None,
        regions: PreparedRegions | None = None,
        in_regions: Sequence[PromptEmbeds | None] = (),
        style: tuple[PreparedStyle, PromptEmbeds] | None = None,
        tile_texts: Sequence[PromptEmbeds] = (),
        blend: tuple[PromptEmbeds, float] | None = None,
        progress: bool = False,
        **options,
    ) -> Tensor:
        needs_vae = references or control_images or style
        with self._offload.use(VAE) if needs_vae else nullcontext():
            encoded = [
                image
                if isinstance(image, Reference)
                else Reference(self.encode(image.pixels[None]), image.settings)
                for image in references
            ]
            shown = [self.encode(image[None]) for image in control_images]
            styles = [] if style is None else [self.encode(p[None]) for p in style[0].pictures]
        encoded += controls.references_of(shown)
        with self._offload.use(TRANSFORMER):
            latents = latents.to(device_of(self.transformer))
            first = options["sigmas"][0]
            sigma_at = schedule_of(options["sigmas"], self.transformer.preset, token_count(latents))
            features = controls.features(shown, sigma_at)
            if regions is not None:
                unfused = [None if text is None else text.unfused() for text in in_regions]
                own = regions.features(unfused, sigma_at)
                own = fuse_regions(own, self.transformer, self._fused)
                features = replace(features, regions=own.regions, loras=features.loras + own.loras)
            features = replace(features, tiles=tiles, rotary=rotary, sparse=sparse)
            if style is not None:
                prepared, text = style
                run = prepared.run(styles, text.fuse(self.transformer), sigma_at)
                features = replace(features, style=run)

            def at_steps(text: PromptEmbeds) -> StepTexts:
                repeats = len(latents) // len(text.taps)
                return StepTexts(text, self.transformer, repeats, features)

            texts = [at_steps(text) for text in (positive, negative) if text is not None]
            if blend is not None:
                options["blend"] = at_steps(blend[0]), blend[1]
            tokens = len(latents) * token_count(latents)
            lengths = [text(first).states.shape[1] for text in texts]
            share_calls = has_room and pays_to_share(tokens, lengths, self._offload.streams)
            if tile_texts and tiles is not None:
                still = still_tiles(grid_size(latents, PATCH), tiles)
                own_texts = TileTexts(still, [at_steps(text) for text in tile_texts])
                features = replace(features, tile_texts=own_texts)
            steps = denoising_steps(
                self.transformer,
                latents,
                *texts,
                references=[reference.to(latents) for reference in encoded],
                share_calls=share_calls,
                inpaint=None if inpaint is None else inpaint.to(latents),
                features=features,
                **options,
            )
            total = len(options["sigmas"]) - 1
            for step, current, predicted in tqdm(steps, total=total, disable=not progress):
                latents = current
                if callback is not None:
                    callback(step, current, predicted)
        return latents

    def _encode_regions(self, regions: PreparedRegions, **options) -> list[PromptEmbeds | None]:
        """The encoded text of each region; options of `encode_prompt`."""
        pairs = zip(regions.regions.prompts(), regions.images, strict=True)
        return [
            None if text is None else self.encode_prompt(text, images=images, **options)
            for text, images in pairs
        ]

    def _fused(self, text: TextStates) -> TextStates:
        """A text of `PromptEmbeds.unfused`, fused."""
        return PromptEmbeds(text.states, text.mask, text.weights).fuse(self.transformer)

    def _plan_memory(
        self,
        latents: Tensor,
        text_tokens: int,
        references: Sequence[Reference | ReferencePicture],
        guided: bool,
        tiles: TileSettings | None = None,
        style: PreparedStyle | None = None,
    ) -> bool:
        """Plan the device's memory for a run. True if both texts fit in one call of the model.

        text_tokens: of a prompt.
        """
        at_once = 1 if tiles is None else max(1, tiles.batch)
        one, both = (
            self._activations(
                calls * at_once * len(latents),
                token_count(latents) if tiles is None else tiles.tokens(latents),
                text_tokens,
                self._reference_tokens(references),
                () if style is None else style.tokens,
            )
            for calls in (1, 2)
        )
        shares = guided and self._offload.has_room(both, instead_of=one)
        self._offload.prepare(both if shares else one)
        return shares

    def _reference_tokens(self, references: Sequence[Reference | ReferencePicture]) -> int:
        return sum(
            token_count(r.latents)
            if isinstance(r, Reference)
            else token_count(r.pixels, self.vae.config.downscale)
            for r in references
        )

    def _activations(
        self,
        batch: int,
        image: int,
        text: int,
        references: int = 0,
        styles: Sequence[int] = (),
    ) -> dict[str, int]:
        """Bytes of a run by the name of the part; see `activations`."""
        parts = (self.transformer, self.text_encoder, self.vae)
        return activations(
            *parts, batch=batch, image=image, text=text, references=references, styles=styles
        )
