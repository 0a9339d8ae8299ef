"""The second of two stages as a node: an image made larger, in one or in tiles."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.checks import check_finite
from ..krea2_model.config import RAW
from ..krea2_model.features.tiles import still_tiles
from ..krea2_model.features.upscaling import (
    LATENT,
    METHODS,
    PARTS,
    PIXELS,
    Upscale,
    enlarge_latents,
)
from ..krea2_model.images.resize import colours, resize
from ..krea2_model.images.sizes import MULTIPLE
from . import inputs
from .inputs import AUTO, check_limits, verdict
from .large import batch_input, in_tiles, overlap_input, tile_input
from .latents import given_vae
from .managed.lora import known_preset
from .managed.tile_prompts import add_tile_texts, encode_tiles, texts_of_prompt
from .reports import upscale_report
from .sampler_run import check_model, check_ours, noise_for, sample, start_of
from .tile_prompts import WHOLE_PROMPT, chosen_prompts, clip_input, tile_prompt_inputs


class K2Upscale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Upscale",
            display_name="Krea 2 Upscale",
            category="Krea 2",
            description=(
                "Makes an image 1.5 to 4 times larger: enlarges it, adds noise down from a sigma, "
                "and denoises it at its new size, whole or in tiles."
            ),
            search_aliases=inputs.aliases(
                "upscale, hires fix, second pass, two stage, enlarge, 4k, ultimate sd upscale"
            ),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2, Turbo or Raw, for the second stage."),
                inputs.POSITIVE,
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative prompt; required when guidance is above 0 (Raw).",
                ),
                io.Vae.Input("vae", tooltip="The Krea 2 VAE."),
                io.Image.Input(
                    "image", optional=True, tooltip="The image to enlarge; or connect latent."
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The latent to enlarge; or connect image."
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip=(
                        "Any upscale model of ComfyUI's, for method pixels; without one the image "
                        "is enlarged bicubically."
                    ),
                ),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=1.05,
                    max=8.0,
                    step=0.05,
                    tooltip="Factor on both sides; the result is a multiple of 16 pixels.",
                ),
                io.Float.Input(
                    "sigma",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Noise to start from, the same at every size and shift: 0.3 keeps shapes "
                        "and adds detail, 0.6 changes them."
                    ),
                ),
                inputs.seed("Seed of the added noise."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=PIXELS,
                    tooltip=(
                        "pixels enlarges the image, latent its latents: without the VAE, rougher, "
                        "and in need of a sigma from 0.5 up."
                    ),
                ),
                io.Combo.Input(
                    "parts",
                    options=list(PARTS),
                    default=AUTO,
                    tooltip=(
                        "whole denoises the image in one; tiles takes the memory of one tile; "
                        "auto takes tiles where the image is more than the checkpoint paints well."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip=(
                        "Steps from sigma to 0; 0 takes the preset's for that part of the "
                        "schedule, at least 4."
                    ),
                ),
                inputs.guidance(
                    -1.0,
                    "Guidance in Krea's convention: ComfyUI cfg = guidance + 1. 0 is off, -1 uses "
                    "the checkpoint's.",
                    lowest=-1.0,
                    advanced=True,
                ),
                tile_input(advanced=True),
                overlap_input(),
                batch_input(),
                clip_input(),
                *tile_prompt_inputs(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The larger latent, to be decoded."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, scale=None, sigma=None, steps=None, tile=None, overlap=None, batch=None
    ):
        values = {"scale": scale, "sigma": sigma, "steps": steps}
        values |= {"tile": tile, "overlap": overlap, "batch": batch}

        def check():
            Upscale(**{name: value for name, value in values.items() if value is not None})

        return verdict(cls, check, **values)

    @classmethod
    def execute(
        cls,
        model,
        positive,
        vae,
        negative=None,
        image=None,
        latent=None,
        upscale_model=None,
        scale=2.0,
        sigma=0.3,
        seed=0,
        method=PIXELS,
        parts=AUTO,
        steps=0,
        guidance=-1.0,
        tile=0,
        overlap=0.25,
        batch=1,
        clip=None,
        tile_prompt=WHOLE_PROMPT,
        prompt="",
    ):
        check_model(model)
        check_limits(cls, seed=seed, guidance=guidance)
        prompts = chosen_prompts(clip, tile_prompt, prompt)
        settings = Upscale(scale, sigma, method, parts, steps, tile, overlap, batch, prompts)
        if (image is None) == (latent is None):
            both = "both" if image is not None else "neither"
            raise ValueError(f"image and latent: {both} is connected; expected one of them.")
        if upscale_model is not None and method != PIXELS:
            raise ValueError(
                f"upscale_model enlarges pixels, and method is {method!r}. Choose {PIXELS!r}, or "
                "disconnect it."
            )
        preset = known_preset(model) or RAW
        guidance = preset.guidance if guidance < 0 else guidance
        if guidance > 0 and negative is None:
            raise ValueError(
                f"Guidance is {guidance:g} but nothing is connected to negative. Connect the "
                "negative output of Krea 2 Prompt (an empty text is fine), or set guidance to 0."
            )
        height, width = _sides(image, latent)
        width, height = settings.size(width, height)
        tiles = settings.tiles(width, height, preset)
        if tiles is not None:
            check_ours(model, "which has no tiles")
            model = in_tiles(model, tiles)
        grid = height // MULTIPLE, width // MULTIPLE
        if tiles is not None and prompts is not None:
            prompts.texts_of(still_tiles(grid, tiles), [])
        sigmas = torch.tensor(settings.sigmas(width, height, preset))
        mu = settings.mu(width, height, preset)
        vae = given_vae(vae)
        if method == PIXELS or (tiles is not None and prompts is not None):
            pixels = _enlarged(image, latent, vae, upscale_model, width, height)
            if tiles is not None and prompts is not None:
                texts = texts_of_prompt(prompt)
                own = encode_tiles(clip, tiles, grid, pixels, texts, weighted=True)
                positive = add_tile_texts(positive, own)
        if method == LATENT:
            samples = vae.encode(colours(image)) if latent is None else latent["samples"]
            larger = {"samples": enlarge_latents(samples, width, height)}
        else:
            # One by one: core's own VAE takes a batch for a video.
            larger = {"samples": torch.cat([vae.encode(one[None]) for one in pixels])}
        start = start_of(model, larger)
        samples = sample(
            model,
            positive,
            negative,
            start,
            noise_for(start, seed, larger),
            sigmas,
            guidance,
            mu,
            latent=larger,
            seed=seed,
            total=len(sigmas) - 1,
        )
        report = upscale_report(preset, len(sigmas) - 1, mu, sigma, width, height, tiles)
        return io.NodeOutput({"samples": samples}, ui=ui.PreviewText(report))


def _sides(image, latent) -> tuple[int, int]:
    """Height and width in pixels."""
    if image is not None:
        return colours(image).shape[1], image.shape[2]
    check_finite(latent["samples"], "The latent")
    height, width = latent["samples"].shape[-2:]
    return 8 * height, 8 * width


def _enlarged(image, latent, vae, upscale_model, width: int, height: int) -> torch.Tensor:
    """Pixels (B, H, W, 3) of the picture at its new size."""
    if image is None:
        image = vae.decode(latent["samples"])
        image = image.flatten(0, 1) if image.ndim == 5 else image
    pixels = colours(image)
    if upscale_model is not None:
        # Imported here: only a graph with such a model needs its package.
        from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

        pixels = ImageUpscaleWithModel.execute(upscale_model, pixels).result[0]
    return resize(pixels.float(), width, height)
