"""Input images: cropped or padded to a size the model takes, or extended on any side."""

import torch
from comfy_api.latest import io, ui

from ..krea2_model.images.masks import mask_for
from ..krea2_model.images.resize import (
    FROM_IMAGE,
    MODES,
    PADDINGS,
    colours,
    extend,
    resize_and_crop,
    target_size,
)
from ..krea2_model.images.sizes import ASPECTS, MAX_SIZE
from . import inputs


class K2FitImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2FitImage",
            display_name="Krea 2 Fit Image",
            category="Krea 2",
            description=(
                "Resizes an image to a size that suits the model, with sides that are multiples of "
                "16, in its own aspect ratio or another. The mask is resized with it."
            ),
            search_aliases=inputs.aliases(
                "resize, scale image, crop, pad, aspect ratio, megapixels, image to image"
            ),
            inputs=[
                io.Image.Input("image", tooltip="One image or a batch; alpha is dropped."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Cropped and resized with the image; padding is masked too.",
                ),
                inputs.megapixels(
                    "Area, in units of 1024 x 1024 pixels: up to 1 for Raw, 1 to 4 for Turbo. "
                    "0 keeps the image's area."
                ),
                io.Combo.Input(
                    "aspect",
                    options=[FROM_IMAGE, *ASPECTS],
                    default="image",
                    tooltip="Aspect ratio, width to height; image keeps the image's own.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="crop",
                    tooltip=(
                        "If the aspect ratios differ: crop both ends, pad both ends, or stretch. "
                        "With the image's own ratio that is at most 15 pixels, for multiples of "
                        "16."
                    ),
                ),
                io.Combo.Input(
                    "padding",
                    options=list(PADDINGS),
                    default="edge",
                    advanced=True,
                    tooltip="For mode pad: repeat the edge pixels, or fill with grey.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The resized image."),
                io.Mask.Output(tooltip="The resized mask, including the padding."),
                io.Int.Output(display_name="width", tooltip="Pixels, a multiple of 16."),
                io.Int.Output(display_name="height", tooltip="Pixels, a multiple of 16."),
            ],
        )

    @classmethod
    def execute(
        cls, image, mask=None, megapixels=1.0, aspect=FROM_IMAGE, mode="crop", padding="edge"
    ):
        image = colours(image)
        rows, columns = image.shape[1:3]
        unmasked = mask is None
        mask = torch.zeros(1, rows, columns).to(image) if unmasked else mask_for(mask, image)
        width, height = target_size(columns, rows, megapixels, aspect)
        image, mask = resize_and_crop(image, mask, width, height, mode, padding)
        report = f"{columns} x {rows} px,\nnow {width} x {height} px"
        return io.NodeOutput(image, mask, width, height, ui=ui.PreviewText(report))


class K2Outpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Outpaint",
            display_name="Krea 2 Outpaint",
            category="Krea 2",
            description=(
                "Extends an image on any side and masks the new area for Krea 2 Inpaint. Until it "
                "is painted, the new area repeats the edge pixels."
            ),
            search_aliases=inputs.aliases("outpaint, extend, uncrop, pad image"),
            inputs=[
                io.Image.Input("image", tooltip="One image or a batch; alpha is dropped."),
                *(
                    io.Int.Input(
                        side,
                        default=0,
                        min=0,
                        max=MAX_SIZE,
                        step=8,
                        tooltip=f"Pixels to add at the {side}.",
                    )
                    for side in ("left", "top")
                ),
                io.Int.Input(
                    "right",
                    default=256,
                    min=0,
                    max=MAX_SIZE,
                    step=8,
                    tooltip=(
                        "Pixels to add at the right, plus any needed to make the width a multiple "
                        "of 16."
                    ),
                ),
                io.Int.Input(
                    "bottom",
                    default=0,
                    min=0,
                    max=MAX_SIZE,
                    step=8,
                    tooltip=(
                        "Pixels to add at the bottom, plus any needed to make the height a "
                        "multiple of 16."
                    ),
                ),
                inputs.feather(
                    "Pixels over which the mask fades into the image, to hide the seam. 0 "
                    "keeps every pixel of the image.",
                    default=16,
                    highest=256,
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The extended image, its sides multiples of 16."),
                io.Mask.Output(tooltip="The mask of the new area."),
            ],
        )

    @classmethod
    def execute(cls, image, left=0, top=0, right=256, bottom=0, feather=16):
        image = colours(image)
        rows, columns = image.shape[1:3]
        larger, mask = extend(image, left, top, right, bottom, feather)
        height, width = larger.shape[1:3]
        report = f"{columns} x {rows} px,\nnow {width} x {height} px"
        return io.NodeOutput(larger, mask, ui=ui.PreviewText(report))
