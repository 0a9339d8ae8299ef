"""Latents: empty ones by size, and the VAE."""

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..krea2_model.checks import check_finite
from ..krea2_model.images.sizes import (
    ASPECTS,
    MULTIPLE,
    check_size,
    round_size,
    size_for_aspect,
)
from . import inputs
from .inputs import CUSTOM, check_limits, verdict


class K2EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2EmptyLatent",
            display_name="Krea 2 Size",
            category="Krea 2",
            description=(
                "Creates an empty latent from aspect ratio and area, or from width and height. Raw "
                "works best up to about 1 megapixel, Turbo up to 4 (2048 x 2048)."
            ),
            search_aliases=inputs.aliases(
                "turbo, raw, empty latent, resolution, aspect ratio, megapixels, portrait"
            ),
            inputs=[
                io.Combo.Input(
                    "aspect",
                    options=[*ASPECTS, CUSTOM],
                    default="1:1",
                    tooltip='Aspect ratio, width to height. "custom" uses width and height below.',
                ),
                inputs.megapixels(
                    "Area, in units of 1024 x 1024 pixels: up to 1 for Raw, 1 to 4 for Turbo. "
                    "Not used with custom.",
                    lowest=0.05,
                ),
                *inputs.width_and_height(
                    f"Pixels, for custom only; rounded up to multiples of {MULTIPLE}."
                ),
                io.Int.Input("batch", default=1, min=1, max=64, tooltip="Number of images."),
                io.Boolean.Input(
                    "swap",
                    default=False,
                    optional=True,
                    tooltip="Swap width and height: landscape becomes portrait, and back.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="Empty latents for the sampler."),
                io.Int.Output(display_name="width", tooltip="Pixels, after rounding."),
                io.Int.Output(display_name="height", tooltip="Pixels, after rounding."),
            ],
        )

    @classmethod
    def validate_inputs(cls, aspect=None, megapixels=None, width=None, height=None):
        def check():
            if aspect is not None and aspect not in (*ASPECTS, CUSTOM):
                raise ValueError(
                    f"aspect is {aspect!r}; expected one of {', '.join((*ASPECTS, CUSTOM))}."
                )
            if megapixels is not None:
                size_for_aspect(aspect if aspect in ASPECTS else ASPECTS[0], megapixels)
            for name, pixels in (("width", width), ("height", height)):
                if pixels is not None:
                    check_size(name, pixels)

        return verdict(cls, check, megapixels=megapixels, width=width, height=height)

    @classmethod
    def execute(cls, aspect="1:1", megapixels=1.0, width=1024, height=1024, batch=1, swap=False):
        check_limits(cls, megapixels=megapixels, width=width, height=height, batch=batch)
        if aspect != CUSTOM:
            width, height = size_for_aspect(aspect, megapixels)
        if swap:
            width, height = height, width
        unrounded = (width, height)
        width, height = round_size("width", width), round_size("height", height)
        latent = torch.zeros(
            batch,
            16,
            1,
            height // 8,
            width // 8,
            device=comfy.model_management.intermediate_device(),
        )
        note = f"{width} x {height} px, {width * height / 1024**2:.2f} megapixels"
        if unrounded != (width, height):
            note += f",\nrounded up from {unrounded[0]} x {unrounded[1]}"
        return io.NodeOutput({"samples": latent}, width, height, ui=ui.PreviewText(note))


class K2VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2VAEDecode",
            display_name="Decode with the Krea 2 VAE",
            category="Krea 2",
            description="Decodes latents to images; switches to tiles when memory runs out.",
            search_aliases=inputs.aliases("qwen, vae decode, latent to image"),
            inputs=[
                io.Latent.Input("samples", tooltip="The latents from the sampler."),
                inputs.VAE,
            ],
            outputs=[io.Image.Output(tooltip="The decoded images.")],
        )

    @classmethod
    def execute(cls, samples, vae):
        vae = given_vae(vae)
        check_finite(samples["samples"], "samples")
        images = vae.decode(samples["samples"])
        # Core's own VAE object for this file keeps a frame axis.
        return io.NodeOutput(images.flatten(0, 1) if images.ndim == 5 else images)


class K2VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2VAEEncode",
            display_name="Encode with the Krea 2 VAE",
            category="Krea 2",
            description="Encodes images to latents; with the Krea 2 VAE, one latent per image.",
            search_aliases=inputs.aliases("qwen, vae encode, image to latent"),
            inputs=[
                io.Image.Input(
                    "pixels", tooltip="The images; sides are cropped to multiples of 8."
                ),
                inputs.VAE,
            ],
            outputs=[io.Latent.Output(tooltip="Latents for the sampler.")],
        )

    @classmethod
    def execute(cls, pixels, vae):
        vae = given_vae(vae)
        check_finite(pixels, "pixels")
        return io.NodeOutput({"samples": vae.encode(pixels)})


def given_vae(vae):
    """The VAE. Raises ValueError for the empty one of a checkpoint without a VAE."""
    if vae is None:
        raise ValueError("vae is empty: this checkpoint holds no VAE. Connect Load Krea 2 VAE.")
    return vae
