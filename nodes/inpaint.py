"""Inpainting: latents with a mask, crops of large images, and stitching them back."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.checks import check_finite
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
    "Pixels inside the mask's edge over which the new image fades in. Outside the mask every "
    "pixel is unchanged."
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
                "Creates a latent in which the sampler repaints only the masked area. Paste the "
                "decoded image into the original with Krea 2 Composite and this node's mask."
            ),
            search_aliases=inputs.aliases(
                "inpaint, mask, differential diffusion, soft inpainting, "
                "set latent noise mask, vae encode for inpaint"
            ),
            inputs=[
                inputs.VAE,
                io.Image.Input("image", tooltip="One image or a batch, of any size."),
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "Area to repaint: one mask for all images, or one each. A mask of another "
                        "size is resized if its aspect ratio matches the image's."
                    ),
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=0,
                    max=inputs.MAX_PIXELS,
                    tooltip="Pixels by which the masked area (half or more) grows.",
                ),
                inputs.feather(
                    "Pixels of soft edge beyond that, in which the change fades out; only with "
                    "soft."
                ),
                io.Boolean.Input(
                    "soft",
                    default=True,
                    tooltip=(
                        "On: the mask value sets the strength, so 0.6 changes a place as much as "
                        "denoise 0.6. Off: a place is repainted or not. Works in Krea 2 Sampler; "
                        "other samplers need Differential Diffusion."
                    ),
                ),
                io.Combo.Input(
                    "fill",
                    options=list(FILLS),
                    default="original",
                    advanced=True,
                    tooltip=(
                        "Content under the mask: denoise below 1 starts from it. To remove objects "
                        "at denoise 1, choose grey or surroundings, which leave no traces at the "
                        "edge."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The image and the mask, for the sampler."),
                io.Mask.Output(tooltip="The final mask, for Krea 2 Composite or Krea 2 Stitch."),
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
        report = f"{width} x {height} px,\n{share:.0%} to repaint"
        return io.NodeOutput(latent, repaint, ui=ui.PreviewText(report))


class K2Composite(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Composite",
            display_name="Krea 2 Composite",
            category="Krea 2",
            description=(
                "Pastes the repainted image into the original. Inside the mask is the new image, "
                "outside every pixel of the original is unchanged."
            ),
            search_aliases=inputs.aliases(
                "inpaint, composite, blend, paste back, image composite masked"
            ),
            inputs=[
                io.Image.Input("original", tooltip="The original image."),
                io.Image.Input("painted", tooltip="The decoded image."),
                io.Mask.Input(
                    "mask", tooltip="The mask from Krea 2 Inpaint; any value above 0 is inside."
                ),
                _FEATHER,
            ],
            outputs=[io.Image.Output(tooltip="The composited image.")],
        )

    @classmethod
    def execute(cls, original, painted, mask, feather=8):
        check_finite(original, "original")
        painted = colours(painted, "painted").to(original.device)
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
                "Crops the area around a mask and scales it to the model's best size, for small "
                "areas of large images. Krea 2 Stitch pastes it back."
            ),
            search_aliases=inputs.aliases("inpaint crop, crop and stitch, detailer, only masked"),
            inputs=[
                io.Image.Input("image", tooltip="The full image, or a batch."),
                io.Mask.Input(
                    "mask", tooltip="Area to repaint: one mask for all images, or one each."
                ),
                io.Float.Input(
                    "context",
                    default=1.5,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Width and height of the crop, as a multiple of the mask's.",
                ),
                inputs.megapixels(
                    "Area to scale the crop to, in units of 1024 x 1024 pixels: 1 for Raw, 1 "
                    "to 4 for Turbo. 0 does not scale."
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The crop, its sides multiples of 16."),
                io.Mask.Output(tooltip="The mask of the crop, for Krea 2 Inpaint."),
                Stitch.Output(display_name="stitch", tooltip="For Krea 2 Stitch."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, context=1.5, megapixels=1.0):
        image = colours(image)
        part, masks, cut = crop(image, mask_for(mask, image), context, megapixels)
        box, (height, width) = cut.boxes[0], part.shape[1:3]
        report = f"{box.width} x {box.height} px,\nscaled to {width} x {height} px"
        return io.NodeOutput(part, masks, cut, ui=ui.PreviewText(report))


class K2Stitch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Stitch",
            display_name="Krea 2 Stitch",
            category="Krea 2",
            description=(
                "Pastes the crop of Krea 2 Crop for Inpaint back into its image. Outside the mask "
                "every pixel is unchanged."
            ),
            search_aliases=inputs.aliases("inpaint stitch, crop and stitch, uncrop, paste back"),
            inputs=[
                Stitch.Input("stitch", tooltip="From Krea 2 Crop for Inpaint."),
                io.Image.Input("painted", tooltip="The repainted and decoded crop."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "The mask from Krea 2 Inpaint, with its grow and feather; without it, the "
                        "mask of the crop."
                    ),
                ),
                _FEATHER,
            ],
            outputs=[io.Image.Output(tooltip="The full image.")],
        )

    @classmethod
    def execute(cls, stitch, painted, mask=None, feather=8):
        painted = colours(painted, "painted")
        if mask is not None:
            mask = _painted_mask(mask, painted)
        return io.NodeOutput(stitch_crop(stitch, painted, feather, mask))


def _painted_mask(mask, image):
    """A mask at the size of an image. Raises ValueError where it is empty."""
    mask = mask_for(mask, image)
    if not mask.any():
        raise ValueError(
            f"{EMPTY}the painted image would have no effect. Connect the mask of Krea 2 "
            "Inpaint, or paint one (Open in Mask Editor)."
        )
    return mask
