"""Prompt to image without ComfyUI."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .arguments import (
    PromptImages,
    References,
    canvas_of,
    check_embeds,
    check_latents,
    check_options,
    negative_list,
    prompt_list,
    start_noise,
    start_sides,
)
from .checks import check_type, is_number, is_whole
from .detail import detail
from .diffusers_names import accept_diffusers_names
from .guidance import ALWAYS, GuidanceSchedule
from .images.pictures import OUTPUT_TYPES, Images, Picture, fit, pixels_of, to_output
from .images.sizes import image_tokens, is_far, round_size, tiles_of
from .inpainting import Inpaint, LatentMask
from .memory.activations import TEXT_TOKENS, WHOLE_PIXELS, activations
from .memory.forecast import Forecast, call_operations
from .memory.plan import ENCODER, TRANSFORMER, VAE
from .parts import LoadedParts, device_of
from .prompt_embeds import PromptEmbeds, encode_prompts
from .sampling import denoise as denoising_steps
from .schedule import check_guidance, check_sigmas, resolve_mu, sigma_schedule
from .text.prompt_images import PromptImage, grid_of
from .transformer.patches import token_count
from .transformer.references import Reference
from .transformer.shared_calls import pays_to_share
from .transformer.text_attention import NegativeGuidance

logger = logging.getLogger(__name__)

Callback = Callable[[int, Tensor, Tensor], None]


class Krea2Pipeline(LoadedParts):
    """From a prompt to images: the stages of a run, and all of them in one call.

    Each part runs on the device and in the dtype of its own weights; with `offload` parts are on
    the device only while they run, see `from_files`.
    """

    @torch.no_grad()
    @accept_diffusers_names
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        *,
        prompt_weights: bool = False,
        layer_weights: Sequence[float] | None = None,
        images: PromptImages | Sequence[PromptImage | Picture] | None = None,
        start_image: Picture | None = None,
        denoise: float = 1.0,
        inpaint: Inpaint | Picture | None = None,
        references: References | Sequence[Reference | Picture] | None = None,
        negative_guidance: NegativeGuidance | None = None,
        guidance_schedule: GuidanceSchedule = ALWAYS,
        evaluate_every: int = 1,
        progress: bool = False,
    ) -> Images:
        """Generate images.

        prompt: one or several; each gives `num_images` images, in order.
        negative_prompt: one for all prompts, or one per prompt; None is the empty prompt.
        height, width: pixels, rounded up to multiples of 16; None is the checkpoint's size, 1024.
        steps, guidance: None takes the checkpoint's preset. guidance is in Krea's convention,
            `v = cond + guidance * (cond - uncond)`, 0 to 100; ComfyUI's cfg is guidance + 1.
        seed: an int from 0 to 2**64 - 1 (image i uses seed + i), or one per image.
        latents: noise to start from, (B, 16, height / 8, width / 8), instead of seeds; gives the
            size where height and width are None.
        prompt_embeds, negative_prompt_embeds: taps (B, L, 12, text width) instead of prompts,
            with masks (B, L) bool or None where all tokens are real.
        sigmas: final (shifted) values that end in 0, instead of steps.
        max_sequence_length: cuts prompts; 512 is the official length, None never cuts.
        output_type: "pil": a list of images; "np": (B, H, W, 3) float32 in [0, 1]; "pt":
            (B, 3, H, W) in [0, 1]; "latent": (B, 16, h, w), normalised.
        callback: called as `callback(step, latents, predicted)` after each step.

        prompt_weights: read `(word:1.3)` in prompts as weights, see `text.prompt_weights`; else
            brackets are text.
        layer_weights: 12 weights of the tapped encoder layers, see `text.layer_weights`.
        images: up to eight images in front of every prompt, not of negatives, that the text encoder
            reads: PIL images, paths, tensors (3 or 4, H, W) in [0, 1], or `PromptImage` with role
            and strength; or `PromptImages` with options. The vision tower is loaded on first use.
        start_image: an image to change; cropped to height and width, or at its own size.
        denoise: how much of start_image to change, above 0 to 1 (all of it).
        inpaint: a mask whose white part of start_image is painted anew, or `Inpaint` with options;
            the rest of the picture stays to the bit, and so does its size.
        references: images that the transformer attends to, or `Reference` with latents and
            settings; or `References` with options.
        negative_guidance: NAG: the negative prompt counts also at guidance 0 (Turbo).
        guidance_schedule: a factor on guidance along the run.
        evaluate_every: 2 or more skips the model at later steps: faster and not exact.
        progress: show a bar of the steps on stderr.

        Arguments with diffusers' names are taken too, such as num_inference_steps.
        Raises ValueError that names the argument, what was expected and the remedy.
        """
        # Bad arguments and images are refused before anything is computed.
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected one of {OUTPUT_TYPES}.")
        if not is_whole(num_images) or num_images < 1:
            raise ValueError(f"num_images is {num_images!r}; expected a whole number from 1 up.")
        check_options(callback, negative_guidance, guidance_schedule)
        check_embeds("prompt_embeds", prompt_embeds, prompt_embeds_mask)
        check_embeds("negative_prompt_embeds", negative_prompt_embeds, negative_prompt_embeds_mask)
        prompts = prompt_list(prompt, prompt_embeds)
        count = len(prompts) if prompts is not None else len(prompt_embeds)  # type: ignore[arg-type]
        batch = count * num_images
        images = PromptImages.of(images)
        images = replace(images, images=(prompt_images := images.prepared()))
        if prompt_images and prompts is None:
            raise ValueError("images stand in front of a prompt; with prompt_embeds give none.")
        references = References.of(references)
        reference_images = references.prepared()
        if start_image is None and denoise != 1 and sigmas is None:
            raise ValueError(f"denoise is {denoise} without an image to change: give start_image.")
        canvas = None
        if inpaint is not None:
            canvas = canvas_of(start_image, inpaint, (height, width))
            start_image = canvas.start
        start, height, width = self._start(start_image, height, width)
        noise = self._noise(batch, height, width, seed, latents)
        guidance = check_guidance(self.preset.guidance if guidance is None else guidance)
        sigmas = self.schedule(noise, steps, denoise) if sigmas is None else check_sigmas(sigmas)
        if negative_guidance is not None and negative_guidance.is_off:
            negative_guidance = None
        positive = negative = negatives = None
        if prompt_embeds is not None:
            positive = PromptEmbeds(prompt_embeds, prompt_embeds_mask)
        texts = negative_list(negative_prompt, negative_prompt_embeds, count)
        if guidance > 0 or negative_guidance is not None:
            negatives = texts
            if negative_prompt_embeds is not None:
                negative = PromptEmbeds(negative_prompt_embeds, negative_prompt_embeds_mask)

        text_tokens = TEXT_TOKENS if positive is None else positive.taps.shape[1]
        text_tokens += sum(math.prod(grid_of(image.pixels)) for image in prompt_images)
        has_room = self._plan_memory(noise, text_tokens, reference_images, guidance > 0)
        options: dict[str, Any] = {
            "weighted": prompt_weights,
            "max_sequence_length": max_sequence_length,
        }
        if prompts is not None:
            positive = self.encode_prompt(prompts, images=images, **options)
        if negatives is not None:
            negative = self.encode_prompt(negatives, **options)
        assert positive is not None  # of prompts or of embeddings
        result, area = noise, None  # where the run starts, and the part that it paints
        if start is not None:
            encoded = self.encode(start[None]).to(noise)
            result = torch.lerp(encoded, noise, sigmas[0])
            if canvas is not None:
                area = LatentMask(canvas.cells, encoded, noise, canvas.soft)
        result = self._denoise(
            result,
            positive.with_layer_weights(layer_weights),
            negative,
            has_room,
            callback,
            sigmas=sigmas,
            guidance=guidance,
            references=reference_images,
            reference_method=references.method,
            cache_references=references.cache,
            negative_guidance=negative_guidance,
            guidance_schedule=guidance_schedule,
            evaluate_every=evaluate_every,
            inpaint=area,
            progress=progress,
        )
        if output_type == "latent":
            return result
        pictures = self.decode(result)
        return to_output(pictures if canvas is None else canvas.paste(pictures), output_type)

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
        with self._offload.use(ENCODER, *tower):
            return encode_prompts(
                self.text_encoder,
                texts,
                images=prepared,
                labels=group.labels,
                weighted=weighted,
                max_sequence_length=max_sequence_length,
            )

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
        noise = self._noise(batch, height, width, seed, latents)
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
        group = References.of(references)
        prepared = group.prepared()
        text_tokens = positive.taps.shape[1]
        has_room = self._plan_memory(latents, text_tokens, prepared, guidance > 0)
        return self._denoise(
            latents,
            positive,
            negative,
            has_room,
            callback,
            sigmas=sigmas,
            guidance=guidance,
            references=prepared,
            reference_method=group.method,
            cache_references=group.cache,
            **options,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents (B, 16, H / 8, W / 8), normalised."""
        check_type("images", images, Tensor, "a tensor (B, 3, H, W) in [0, 1]")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected floating numbers in [0, 1].")
        with self._offload.use(VAE):
            weight = next(self.vae.parameters())
            return self.vae.encode(images.to(weight) * 2 - 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, h, w) to images (B, 3, H, W) in [0, 1].

        In tiles, which give the same picture, above 4 megapixels or if memory runs out.
        """
        check_latents(latents)
        with self._offload.use(VAE):
            latents = latents.to(device_of(self.vae))
            cell = self.vae.config.downscale
            is_large = math.prod(latents.shape[-2:]) * cell**2 > WHOLE_PIXELS
            try:
                images = None if is_large else self.vae.decode(latents)
            except torch.OutOfMemoryError:
                logger.warning("Decoding ran out of memory; decoding in tiles instead.")
                images = None
            if images is None:  # outside the except block, whose traceback holds tensors
                images = self.vae.decode_tiled(latents)
            return (images.float() / 2 + 0.5).clamp(0, 1)

    detail = detail

    def forecast(
        self,
        width: int | None = None,
        height: int | None = None,
        *,
        num_images: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        references: Sequence[tuple[int, int]] = (),
        text_tokens: int = TEXT_TOKENS,
        tile: int | None = None,
        overlap: int = 128,
    ) -> Forecast:
        """What a run with these arguments of a call will take; nothing is computed or moved.

        references: width and height of each reference image, as `References` encodes it.
        text_tokens: of a prompt; the official length where it is not known yet.
        tile, overlap: pixels along a side of tiles that the model is called for, and that
            neighbours share; None is the whole image.
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
        sigma_schedule(steps, 1.0)  # checks steps
        guided = check_guidance(preset.guidance if guidance is None else guidance) > 0
        sides, tiles = tiles_of(width, height, tile, overlap)
        image, extra = image_tokens(*sides), sum(image_tokens(*each) for each in references)
        one, both = (
            self._activations(count * num_images, image, text_tokens, extra) for count in (1, 2)
        )
        # Both texts in one call, as a run decides it.
        needed = both if guided and self._offload.has_room(both, instead_of=one) else one
        needed[VAE] = self._activations(1, image_tokens(width, height), text_tokens)[VAE]
        plan, peak, free = self._offload.forecast(needed)
        calls = (2 if guided else 1) * tiles
        operations = call_operations(self.transformer.config, image, text_tokens, extra, num_images)
        return Forecast(
            width=width,
            height=height,
            batch=num_images,
            image=image_tokens(width, height),
            text=text_tokens,
            references=extra,
            steps=steps,
            tiles=tiles,
            calls=steps * calls,
            step_operations=calls * operations,
            operations=steps * calls * operations,
            peak=peak,
            free=free,
            plan=plan,
            activations=needed,
        )

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
    ) -> Tensor:
        channels, downscale = self.transformer.config.latent_channels, self.vae.config.downscale
        size = self.preset.size
        noise = start_noise(latents, (batch, channels, downscale), (height, width), size, seed)
        height, width = (downscale * side for side in noise.shape[-2:])
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

    def _denoise(
        self,
        latents: Tensor,
        positive: PromptEmbeds,
        negative: PromptEmbeds | None,
        has_room: bool,
        callback: Callback | None,
        *,
        references: Sequence[Reference | Tensor],
        inpaint: LatentMask | None = None,
        progress: bool = False,
        **options,
    ) -> Tensor:
        with self._offload.use(VAE) if references else nullcontext():
            encoded = [
                image if isinstance(image, Reference) else Reference(self.encode(image[None]))
                for image in references
            ]
        with self._offload.use(TRANSFORMER):
            latents = latents.to(device_of(self.transformer))
            texts = [
                text.fuse(self.transformer, len(latents) // len(text.taps))
                for text in (positive, negative)
                if text is not None
            ]
            tokens = len(latents) * token_count(latents)
            lengths = [text.states.shape[1] for text in texts]
            share_calls = has_room and pays_to_share(tokens, lengths, self._offload.streams)
            steps = denoising_steps(
                self.transformer,
                latents,
                *texts,
                references=[reference.to(latents) for reference in encoded],
                share_calls=share_calls,
                inpaint=None if inpaint is None else inpaint.to(latents),
                **options,
            )
            total = len(options["sigmas"]) - 1
            for step, current, predicted in tqdm(steps, total=total, disable=not progress):
                latents = current
                if callback is not None:
                    callback(step, current, predicted)
        return latents

    def _plan_memory(
        self,
        latents: Tensor,
        text_tokens: int,
        references: Sequence[Reference | Tensor],
        guided: bool,
    ) -> bool:
        """Plan the device's memory for a run. True if both texts fit in one call of the model.

        text_tokens: of a prompt.
        """
        sizes = [
            token_count(r.latents)
            if isinstance(r, Reference)
            else token_count(r, self.vae.config.downscale)
            for r in references
        ]
        one, both = (
            self._activations(calls * len(latents), token_count(latents), text_tokens, sum(sizes))
            for calls in (1, 2)
        )
        shares = guided and self._offload.has_room(both, instead_of=one)
        self._offload.prepare(both if shares else one)
        return shares

    def _activations(
        self, batch: int, image: int, text: int, references: int = 0
    ) -> dict[str, int]:
        """Bytes of a run by the name of the part; see `activations`."""
        parts = (self.transformer, self.text_encoder, self.vae)
        return activations(*parts, batch=batch, image=image, text=text, references=references)
