"""Inpainting: latents with a mask, crops of large images, and stitching them back."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.images.crop import align_to_original, crop
from ..krea2_model.images.crop import stitch as stitch_crop
from ..krea2_model.images.masks import (
    EMPTY,
    FILLS,
    cell_mask,
    composite,
    filled,
    mask_for,
    repaint_mask,
)
from ..krea2_model.images.resize import colours, pad_to_tokens
from . import inputs
from .latents import given_vae
from .sampler_run import SOFT_MASK

_FEATHER = inputs.feather(
    "Pixels inside the mask's edge over which the painted image fades in. Outside of the mask "
    "every pixel stays as it is."
)

Stitch = io.Custom("KREA2_STITCH")


class K2Inpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Inpaint",
            display_name="Krea 2 Inpaint",
            category="Krea 2",
            description=(
                "A latent of which the sampler paints only what is masked. Lay the decoded image "
                "over the original with Krea 2 Composite and the mask from here."
            ),
            search_aliases=inputs.aliases(
                "inpaint, mask, differential diffusion, soft inpainting, "
                "set latent noise mask, vae encode for inpaint"
            ),
            inputs=[
                inputs.VAE,
                io.Image.Input("image", tooltip="The image; any size, one or many."),
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "What to paint anew: one for all images, or one each. Another size is "
                        "scaled where the aspect is the image's."
                    ),
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=0,
                    max=inputs.MAX_PIXELS,
                    tooltip="Pixels to paint around what is masked by half or more.",
                ),
                inputs.feather(
                    "Pixels beyond that, over which less and less changes; with soft only."
                ),
                io.Boolean.Input(
                    "soft",
                    default=True,
                    tooltip=(
                        "On, a mask of 0.6 changes its place as much as denoise 0.6 would; off, a "
                        "place is painted or not. Krea 2 Sampler does this by itself; other "
                        "samplers need Differential Diffusion."
                    ),
                ),
                io.Combo.Input(
                    "fill",
                    options=list(FILLS),
                    default="original",
                    advanced=True,
                    tooltip=(
                        "What lies under the mask: a denoise below 1 starts from it, and at 1 its "
                        "traces at the edge are gone with grey or surroundings, to remove things."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The image and the mask, for the sampler."),
                io.Mask.Output(
                    tooltip="The mask as it was used, for Krea 2 Composite or Krea 2 Stitch."
                ),
            ],
        )

    @classmethod
    def execute(cls, vae, image, mask, grow=8, feather=8, soft=True, fill="original"):
        vae, image = given_vae(vae), colours(image)
        mask = mask_for(mask, image)
        repaint = repaint_mask(mask, grow, feather, soft)
        if not repaint.any():
            if mask.any():
                raise ValueError(
                    f"Nothing is masked by half or more (at most {mask.max():.2f}), and soft is "
                    "off: nothing would be painted. Switch soft on, or paint a stronger mask."
                )
            raise ValueError(
                f"{EMPTY}nothing would be painted. Paint a mask (Open in Mask Editor), "
                "or encode the image with Encode with the Krea 2 VAE to change all of it."
            )
        count = max(len(image), len(repaint))
        padded, mask = pad_to_tokens(image, repaint)
        under = filled(padded.expand(count, -1, -1, -1), mask, fill)
        # One by one: core's own VAE takes a batch for a video.
        samples = torch.cat([vae.encode(one[None]) for one in under])
        cells = cell_mask(mask)
        latent = {"samples": samples, "noise_mask": cells[:, None, None], SOFT_MASK: soft}
        share = cells.gt(0).float().mean().item()
        height, width = padded.shape[1:3]
        report = f"{width} x {height} px,\n{share:.0%} of it to paint"
        return io.NodeOutput(latent, repaint, ui=ui.PreviewText(report))


class K2Composite(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Composite",
            display_name="Krea 2 Composite",
            category="Krea 2",
            description=(
                "Lays a painted image over the original: inside the mask what was painted, outside "
                "the original, every pixel as it was."
            ),
            search_aliases=inputs.aliases(
                "inpaint, composite, blend, paste back, image composite masked"
            ),
            inputs=[
                io.Image.Input("original", tooltip="The image before."),
                io.Image.Input("painted", tooltip="The decoded image."),
                io.Mask.Input("mask", tooltip="From Krea 2 Inpaint; any value above 0 counts."),
                _FEATHER,
            ],
            outputs=[io.Image.Output(tooltip="The original with what was painted.")],
        )

    @classmethod
    def execute(cls, original, painted, mask, feather=8):
        painted = colours(painted).to(original.device)
        painted, mask = align_to_original(original, painted, _painted_mask(mask, original))
        return io.NodeOutput(composite(original, painted, mask, feather))


class K2CropForInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2CropForInpaint",
            display_name="Krea 2 Crop for Inpaint",
            category="Krea 2",
            description=(
                "Cuts out what is around a mask and brings it to the size the model is best at, "
                "for small parts of large images. Krea 2 Stitch puts it back."
            ),
            search_aliases=inputs.aliases("inpaint crop, crop and stitch, detailer, only masked"),
            inputs=[
                io.Image.Input("image", tooltip="The whole image, one or many."),
                io.Mask.Input("mask", tooltip="What is to be painted: one for all, or one each."),
                io.Float.Input(
                    "context",
                    default=1.5,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How many times as wide and high as the mask the part is that is cut.",
                ),
                inputs.megapixels(
                    "Area to work at, in units of 1024 x 1024 pixels: 1 for Raw, 1 to 4 for "
                    "Turbo. 0 does not scale."
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The part, its sides multiples of 16."),
                io.Mask.Output(tooltip="Its mask, for Krea 2 Inpaint."),
                Stitch.Output(display_name="stitch", tooltip="For Krea 2 Stitch."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, context=1.5, megapixels=1.0):
        image = colours(image)
        part, masks, cut = crop(image, mask_for(mask, image), context, megapixels)
        box, (height, width) = cut.boxes[0], part.shape[1:3]
        report = f"{box.width} x {box.height} px,\nworked at {width} x {height} px"
        return io.NodeOutput(part, masks, cut, ui=ui.PreviewText(report))


class K2Stitch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Stitch",
            display_name="Krea 2 Stitch",
            category="Krea 2",
            description=(
                "Puts a part that Krea 2 Crop for Inpaint cut out back into its image. Outside of "
                "the mask every pixel stays as it was."
            ),
            search_aliases=inputs.aliases("inpaint stitch, crop and stitch, uncrop, paste back"),
            inputs=[
                Stitch.Input("stitch", tooltip="From Krea 2 Crop for Inpaint."),
                io.Image.Input("painted", tooltip="The part, painted and decoded."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "From Krea 2 Inpaint, so that what it grew and feathered counts; without, "
                        "the mask that was cut."
                    ),
                ),
                _FEATHER,
            ],
            outputs=[io.Image.Output(tooltip="The whole image.")],
        )

    @classmethod
    def execute(cls, stitch, painted, mask=None, feather=8):
        painted = colours(painted)
        if mask is not None:
            mask = _painted_mask(mask, painted)
        return io.NodeOutput(stitch_crop(stitch, painted, feather, mask))


def _painted_mask(mask, image):
    """A mask at the size of an image. Raises ValueError where it is empty."""
    mask = mask_for(mask, image)
    if not mask.any():
        raise ValueError(
            f"{EMPTY}nothing of the painted image would be seen. Connect the mask of Krea 2 "
            "Inpaint, or paint one (Open in Mask Editor)."
        )
    return mask
