"""Images larger than a checkpoint paints in one: tiles, rotary scaling, upscaling."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.config import RAW
from ..krea2_model.images.resize import colours, resize
from ..krea2_model.images.sizes import MULTIPLE
from ..krea2_model.tiles import MAX_BATCH, TileSettings
from ..krea2_model.transformer.rotary_scaling import METHODS as ROTARY_METHODS
from ..krea2_model.transformer.rotary_scaling import RotaryScaling
from ..krea2_model.upscaling import LATENT, METHODS, PARTS, PIXELS, Upscale, enlarge_latents
from . import inputs
from .inputs import AUTO, check_limits, verdict
from .latents import given_vae
from .managed.diffusion_model import ROTARY, TILES
from .managed.lora import known_preset
from .reports import upscale_report
from .sampler_run import check_model, check_ours, noise_for, sample, start_of


def _overlap():
    return io.Float.Input(
        "overlap",
        default=0.25,
        min=0.0,
        max=0.5,
        step=0.05,
        advanced=True,
        tooltip="Least overlap of neighbouring tiles, as a share of a tile.",
    )


def _tile(advanced: bool = False):
    return io.Int.Input(
        "tile",
        default=0,
        min=0,
        max=4096,
        step=MULTIPLE,
        advanced=advanced,
        tooltip="Side of a tile in pixels; 0 is the size that the checkpoint was trained at.",
    )


def _batch():
    return io.Int.Input(
        "batch",
        default=1,
        min=0,
        max=MAX_BATCH,
        advanced=True,
        optional=True,
        tooltip=(
            "Tiles in one call of the model: the same picture in the memory of so many. 0 is as "
            "many as fit, up to 8. With regions, control images or style pictures tiles go one by "
            "one."
        ),
    )


class K2TiledSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TiledSampling",
            display_name="Krea 2 Tiled Sampling",
            category="Krea 2",
            description=(
                "Lets any sampler denoise a large image in tiles that are fused at every step, in "
                "the memory of one tile. Best for an image that exists already (denoise below 1): "
                "from pure noise each tile would paint the whole prompt."
            ),
            search_aliases=inputs.aliases(
                "tiled diffusion, multidiffusion, mixture of diffusers, large, 4k, 8k, low vram"
            ),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from a Krea 2 loader."),
                _tile(),
                _overlap(),
                io.Boolean.Input(
                    "move",
                    default=True,
                    advanced=True,
                    tooltip="Move the inner tiles at every step, so that no place is always an "
                    "edge.",
                ),
                io.Boolean.Input(
                    "true_places",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Count rotary positions (RoPE) from the image's corner instead of each "
                        "tile's own. Beyond the size of training this draws lines at the edges."
                    ),
                ),
                _batch(),
                io.Boolean.Input(
                    "cut_references",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip=(
                        "Each tile sees its own part of reference images, as for an edit of the "
                        "whole image; off: all of them."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which denoises in tiles.")],
        )

    @classmethod
    def validate_inputs(cls, tile=None, overlap=None, batch=None):
        def check():
            share, count = 0.25 if overlap is None else overlap, 1 if batch is None else batch
            TileSettings(tile or 1024, share, batch=count)

        return verdict(cls, check, tile=tile, overlap=overlap, batch=batch)

    @classmethod
    def execute(
        cls,
        model,
        tile=0,
        overlap=0.25,
        move=True,
        true_places=False,
        batch=1,
        cut_references=False,
    ):
        check_ours(model, "which has no tiles")
        side = tile or _size_of(model)
        settings = TileSettings(side, overlap, move, true_places, batch, cut_references)
        return io.NodeOutput(_with_options(model, {TILES: settings}))


class K2RotaryScaling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2RotaryScaling",
            display_name="Krea 2 Rotary Scaling",
            category="Krea 2",
            description=(
                "Stretches rotary positions (RoPE) of images larger than those of training, "
                "against double subjects. Not needed up to the size that the checkpoint was "
                "trained at, where it changes nothing."
            ),
            search_aliases=inputs.aliases("rope, ntk, yarn, dype, large, 4k, double subjects"),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from a Krea 2 loader."),
                io.Combo.Input(
                    "method",
                    options=list(ROTARY_METHODS),
                    default="yarn",
                    tooltip=(
                        "ntk raises the base of all frequencies; yarn stretches the long waves "
                        "and leaves the short ones, which hold detail."
                    ),
                ),
                io.Boolean.Input(
                    "dynamic",
                    default=True,
                    tooltip=(
                        "DyPE: stretch most at high noise, where the layout is decided, and not "
                        "at all at the end."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=2.0,
                    min=0.05,
                    max=4.0,
                    step=0.05,
                    tooltip=(
                        "Exponent of the stretch: 1 maps the image's side to that of training; "
                        "dynamic starts at it and falls, so 2 is usual there."
                    ),
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=8192,
                    step=MULTIPLE,
                    advanced=True,
                    tooltip=(
                        "Side in pixels up to which nothing changes; 0 is the size that the "
                        "checkpoint was trained at."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the scaling.")],
        )

    @classmethod
    def validate_inputs(cls, strength=None, size=None):
        def check():
            RotaryScaling(size or 1024, strength=2.0 if strength is None else strength)

        return verdict(cls, check, strength=strength, size=size)

    @classmethod
    def execute(cls, model, method="yarn", dynamic=True, strength=2.0, size=0):
        check_ours(model, "which has no scaled rotary positions")
        scaling = RotaryScaling(size or _size_of(model), method, dynamic, strength)
        return io.NodeOutput(_with_options(model, {ROTARY: scaling}))


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
                _tile(advanced=True),
                _overlap(),
                _batch(),
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
    ):
        check_model(model)
        check_limits(cls, seed=seed, guidance=guidance)
        settings = Upscale(scale, sigma, method, parts, steps, tile, overlap, batch)
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
            model = _with_options(model, {TILES: tiles})
        sigmas = torch.tensor(settings.sigmas(width, height, preset))
        mu = settings.mu(width, height, preset)
        larger = _enlarged(image, latent, given_vae(vae), upscale_model, method, width, height)
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
    height, width = latent["samples"].shape[-2:]
    return 8 * height, 8 * width


def _enlarged(image, latent, vae, upscale_model, method: str, width: int, height: int) -> dict:
    """A latent of width x height pixels."""
    if method == LATENT:
        samples = vae.encode(colours(image)) if latent is None else latent["samples"]
        return {"samples": enlarge_latents(samples, width, height)}
    if image is None:
        image = vae.decode(latent["samples"])
        image = image.flatten(0, 1) if image.ndim == 5 else image
    pixels = colours(image)
    if upscale_model is not None:
        # Imported here: only a graph with such a model needs its package.
        from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

        pixels = ImageUpscaleWithModel.execute(upscale_model, pixels).result[0]
    # One by one: core's own VAE takes a batch for a video.
    larger = resize(pixels.float(), width, height)
    return {"samples": torch.cat([vae.encode(one[None]) for one in larger])}


def _size_of(model) -> int:
    """The side in pixels of the squares that a MODEL was trained at."""
    return (getattr(model.model, "preset", None) or RAW).size


def _with_options(model, options: dict):
    clone = model.clone()
    clone.model_options["transformer_options"].update(options)
    return clone
