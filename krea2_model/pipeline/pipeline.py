"""Prompt to image without ComfyUI."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_type, is_whole
from ..diffusers_names import accept_diffusers_names
from ..features.arguments import (
    PromptImages,
    ReferencePicture,
    References,
    canvas_of,
    check_edit,
    check_embeds,
    check_options,
    negative_list,
    prompt_list,
    start_noise,
)
from ..features.controls import Control, Controls
from ..features.edits import Edit, EditPlan
from ..features.inpainting import Inpaint, LatentMask
from ..features.prompt_embeds import PromptEmbeds
from ..features.regions import Region, Regions
from ..features.style_mixing import MixedStyle
from ..features.styles import StyleTransfer
from ..features.tile_prompts import TileEncoder
from ..features.tiles import TileSettings
from ..features.upscaling import LATENT, Upscale, check_stages, enlarge_latents
from ..features.variations import PromptBlend, Variation
from ..features.walk import walk
from ..guidance import ALWAYS, GuidanceSchedule
from ..images.pictures import OUTPUT_TYPES, Images, Picture, to_output
from ..images.resize import resize
from ..memory.activations import TEXT_TOKENS
from ..schedule import check_guidance, check_sigmas
from ..text.layer_weights import check_layer_weights
from ..text.prompt_images import PromptImage, grid_of
from ..transformer.patches import PATCH, grid_size
from ..transformer.references import Reference
from ..transformer.rotary_scaling import RotaryScaling
from ..transformer.sparse_attention import SparseAttention
from ..transformer.text_attention import NegativeGuidance
from .detail import detail
from .forecast import forecast
from .stages import Callback, PipelineStages
from .styled_call import accept_styles

logger = logging.getLogger(__name__)


class Krea2Pipeline(PipelineStages):
    """From a prompt to images: the stages of a run, and all of them in one call.

    Each part runs on the device and in the dtype of its own weights; with `offload` parts are on
    the device only while they run, see `from_files`.
    """

    @torch.no_grad()
    @accept_diffusers_names
    @accept_styles
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
        control: Control | Sequence[Control] | None = None,
        negative_guidance: NegativeGuidance | None = None,
        guidance_schedule: GuidanceSchedule = ALWAYS,
        evaluate_every: int = 1,
        tiles: TileSettings | None = None,
        rotary: RotaryScaling | None = None,
        upscale: Upscale | float | None = None,
        progress: bool = False,
        edit: Edit | Picture | Sequence[Picture] | None = None,
        regions: Regions | Sequence[Region] | None = None,
        style: StyleTransfer | None = None,
        sparse: SparseAttention | None = None,
        vary: Variation | Sequence[Variation] | None = None,
        blend: PromptBlend | None = None,
        styles: MixedStyle | Mapping[str, float] | None = None,
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
        control: a control LoRA and the picture to follow, or a list of them, see `Control`.
        style: pictures whose style the image takes over, without a LoRA, see `StyleTransfer`.
        negative_guidance: NAG: the negative prompt counts also at guidance 0 (Turbo).
        guidance_schedule: a factor on guidance along the run.
        evaluate_every: 2 or more skips the model at later steps: faster and not exact.
        tiles: denoise a large image in tiles that are fused at every step, see `tiles`.
        rotary: stretch the rotary positions of a large image, see `RotaryScaling`.
        sparse: attention among the tokens of a large image at high noise, see `SparseAttention`:
            faster and not exact.
        upscale: a second stage that makes the images so many times larger, or `Upscale` with
            options. With start_image and denoise=0 it is the only stage.
        progress: show a bar of the steps on stderr.
        edit: one or two pictures to edit as the prompt says, or `Edit` with options; needs an edit
            LoRA, see `edits`. They stand in front of negatives too. The size is that of the first,
            up to two megapixels, where no other is given.

        vary: neighbours of a picture: noise moved towards that of another seed, see `Variation`; a
            list moves on from there. A seed that is a whole number is then that of all images.
        blend: another prompt, and its share in all images, see `PromptBlend`.
        styles: of a library, `{name: weight}`, or `MixedStyle`: their words, pictures, LoRAs and
            suggested settings are used for this call, see `style_mixing`.
        regions: prompts for parts of the images, each with a `Region`; or `Regions` with options.

        Arguments with diffusers' names are taken too, such as num_inference_steps.
        Raises ValueError that names the argument, what was expected and the remedy.
        """
        # Bad arguments and images are refused before anything is computed.
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected one of {OUTPUT_TYPES}.")
        if not is_whole(num_images) or num_images < 1:
            raise ValueError(f"num_images is {num_images!r}; expected a whole number from 1 up.")
        varied = Variation.of(vary)
        if blend is not None:
            check_type("blend", blend, PromptBlend, "a PromptBlend")
        check_options(callback, negative_guidance, guidance_schedule)
        if layer_weights is not None:
            check_layer_weights(layer_weights, self.transformer.config.num_text_layers)
        check_embeds("prompt_embeds", prompt_embeds, prompt_embeds_mask)
        check_embeds("negative_prompt_embeds", negative_prompt_embeds, negative_prompt_embeds_mask)
        prompts = prompt_list(prompt, prompt_embeds)
        if prompts is not None and blend is not None and blend.share == 1:
            prompts, blend = [blend.prompt] * len(prompts), None
        count = len(prompts) if prompts is not None else len(prompt_embeds)  # type: ignore[arg-type]
        batch = count * num_images
        images = PromptImages.of(images)
        images = replace(images, images=(prompt_images := images.prepared()))
        if prompt_images and prompts is None:
            raise ValueError("images stand in front of a prompt; with prompt_embeds give none.")
        references = References.of(references)
        reference_images = references.prepared()
        edit = Edit.of(edit)
        if edit is not None:
            edit = check_edit(edit, prompts, images, references)
            steps, guidance = edit.settings(self.preset, steps, guidance)
            if start_image is None and latents is None and height is None and width is None:
                width, height = edit.size()
        controls = Controls.of(control, self._loras[0].shapes)
        enlarged = Upscale.of(upscale)
        check_stages(enlarged, tiles, rotary, (start_image, denoise, inpaint))
        if sparse is not None:
            check_type("sparse", sparse, SparseAttention, "a SparseAttention, or None")
        if start_image is None and denoise != 1 and sigmas is None:
            raise ValueError(f"denoise is {denoise} without an image to change: give start_image.")
        canvas = None
        if inpaint is not None:
            canvas = canvas_of(start_image, inpaint, (height, width))
            start_image = canvas.start
        start, height, width = self._start(start_image, height, width)
        noise = self._noise(batch, height, width, seed, latents, varied)
        plan = None if edit is None else self._plan_edit(edit, noise)
        if plan is not None:
            images = PromptImages(plan.prompt_images, plan.recipe.labels, 4096)
            prompt_images = plan.prompt_images
            reference_images = [ReferencePicture(*each) for each in plan.references]
            references = References((), plan.recipe.method, plan.recipe.cache)
        method = controls.method(references.method if reference_images else None)
        if style is not None:
            check_type("style", style, StyleTransfer, "a StyleTransfer")
        styled = None if style is None else style.prepared(*self._sides(noise))
        guidance = check_guidance(self.preset.guidance if guidance is None else guidance)
        if denoise == 0:  # the second stage alone
            sigmas = None
        elif sigmas is None:
            sigmas = self.schedule(noise, steps, denoise)
        else:
            sigmas = check_sigmas(sigmas)
        second, grid = None, (0, 0)  # tiles and tokens of the second stage
        if enlarged is not None:
            sides = enlarged.size(*self._sides(noise))
            second, grid = enlarged.tiles(*sides, self.preset), (sides[1] // 16, sides[0] // 16)
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
        places = Regions.of(regions)
        prepared = None
        if places is not None:
            prepared = places.prepared(self._loras[0].shapes, grid_size(noise, PATCH))
            for report in prepared.reports:
                logger.info("%s", report)
            text_tokens += TEXT_TOKENS * len(places.regions)
            prompts = None if prompts is None else places.whole(prompts)
        options: dict[str, Any] = {
            "weighted": prompt_weights,
            "max_sequence_length": max_sequence_length,
        }
        of_tiles = TileEncoder(
            self.encode_prompt, prompts, num_images, images, layer_weights, options
        )
        seen_tokens = [of_tiles.check(second, grid, True)]
        if sigmas is not None:
            seen_tokens.append(of_tiles.check(tiles, grid_size(noise, PATCH), start is not None))
        text_tokens += max(seen_tokens)
        control_images = controls.images(*self._sides(noise))
        controlling = map(ReferencePicture, controls.seen_as_references(control_images))
        seen = [*reference_images, *controlling]
        tiles = self._tiles_that_fit(tiles, noise, text_tokens, seen)
        has_room = self._plan_memory(noise, text_tokens, seen, guidance > 0, tiles, styled)
        other, share = None, 0.0 if blend is None else blend.share
        if blend is not None and share > 0:
            text = blend.prompt if places is None else places.whole([blend.prompt])[0]
            other = self.encode_prompt(text, images=images, **options)
            other = other.with_layer_weights(layer_weights)
        if other is not None and share == 1:
            positive, other = other, None
        elif prompts is not None:
            positive = self.encode_prompt(prompts, images=images, **options)
        if negatives is not None:
            before = None if plan is None else images
            negative = self.encode_prompt(negatives, images=before, **options)
        style_text = None if styled is None else self.encode_prompt(styled.prompt)
        assert positive is not None  # of prompts or of embeddings
        in_regions = [] if prepared is None else self._encode_regions(prepared, **options)
        result, area = noise, None  # where the run starts, and the part that it paints
        if start is not None:
            encoded = self.encode(start[None]).to(noise)
            result = encoded.expand_as(noise)
            if sigmas is not None:
                result = torch.lerp(encoded, noise, sigmas[0])
            if canvas is not None:
                area = LatentMask(canvas.cells, encoded, noise, canvas.soft)
        if share < 1:
            positive = positive.with_layer_weights(layer_weights)
        both = positive, negative
        run: dict[str, Any] = {
            "guidance": guidance,
            "references": reference_images,
            "reference_method": method,
            "cache_references": references.cache,
            "controls": controls,
            "negative_guidance": negative_guidance,
            "guidance_schedule": guidance_schedule,
            "rotary": rotary,
            "sparse": sparse,
            "regions": prepared,
            "in_regions": in_regions,
            "style": None if styled is None or style_text is None else (styled, style_text),
            "blend": None if other is None else (other, share),
            "progress": progress,
        }
        if sigmas is not None:
            seen_picture = None if start is None else start[None]
            tile_texts = of_tiles.texts(tiles, noise, seen_picture)
            result = self._denoise(
                result,
                *both,
                has_room,
                callback,
                sigmas=sigmas,
                control_images=control_images,
                evaluate_every=evaluate_every,
                inpaint=area,
                tiles=tiles,
                tile_texts=tile_texts,
                **run,
            )
        if enlarged is not None:
            pixels = None
            if sigmas is None and start is not None:  # as checked above
                pixels = start[None].expand(batch, -1, -1, -1)
            inputs = (
                result,
                pixels,
                enlarged,
                (seed, varied),
                both,
                callback,
                text_tokens,
                of_tiles,
            )
            result = self._upscale(*inputs, **run)
        if output_type == "latent":
            return result
        pictures = self.decode(result)
        return to_output(pictures if canvas is None else canvas.paste(pictures), output_type)

    detail = detail
    forecast = forecast
    walk = walk

    def _plan_edit(self, edit: Edit, noise: Tensor) -> EditPlan:
        """The edit of a run, for the size of its noise (B, 16, h, w)."""
        plan, notes = edit.plan(*self._sides(noise), self.edit_families, self.preset)
        for note in notes:
            logger.warning("%s", note)
        return plan

    def _upscale(
        self,
        latents: Tensor,
        pixels: Tensor | None,
        upscale: Upscale,
        seeds: tuple[int | Sequence[int], Sequence[Variation]],
        texts: tuple[PromptEmbeds, PromptEmbeds | None],
        callback: Callback | None,
        text_tokens: int,
        of_tiles: TileEncoder,
        **run,
    ) -> Tensor:
        """The second stage: latents (B, 16, h, w) enlarged, noised and denoised.

        pixels: (B, 3, H, W) of the same images, None to decode them.
        """
        downscale = self.vae.config.downscale
        width, height = upscale.size(*self._sides(latents))
        tiles = upscale.tiles(width, height, self.preset)
        sees = tiles is not None and tiles.prompts is not None and tiles.prompts.see_picture
        images = None
        if upscale.method != LATENT or sees:
            images = self.decode(latents) if pixels is None else pixels
            images = resize(images.movedim(1, -1), width, height).movedim(-1, 1)
        if upscale.method == LATENT or images is None:
            larger = enlarge_latents(latents, width, height)
        else:
            larger = torch.cat([self.encode(image[None]) for image in images])
        # One picture for all images, or one for each.
        seen_pictures = images if images is None or pixels is None else images[:1]
        tile_texts = of_tiles.texts(tiles, larger, seen_pictures)
        sigmas = upscale.sigmas(width, height, self.preset)
        shape = (len(larger), larger.shape[1], downscale)
        noise = start_noise(None, shape, (height, width), 0, *seeds)
        controls = run["controls"]
        images = controls.images(width, height)
        seen = [*run["references"], *map(ReferencePicture, controls.seen_as_references(images))]
        start = torch.lerp(larger.to(noise), noise, sigmas[0])
        style = None if run["style"] is None else run["style"][0]
        tiles = self._tiles_that_fit(tiles, start, text_tokens, seen)
        has_room = self._plan_memory(start, text_tokens, seen, run["guidance"] > 0, tiles, style)
        options = {"sigmas": sigmas, "control_images": images, "tiles": tiles, **run}
        options["tile_texts"] = tile_texts
        return self._denoise(start, *texts, has_room, callback, **options)
