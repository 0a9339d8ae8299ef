"""Edits of pictures by a LoRA's whole recipe."""

import logging
import math

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..krea2_model.features.edits import (
    AUTO,
    EDIT,
    FAMILIES,
    MAX_MEGAPIXELS,
    TASKS,
    check_outpainting,
    check_picture_count,
    edit_size,
    is_too_large,
    plan_edit,
    recipe_for,
    task_of,
)
from ..krea2_model.text.prompt_images import grid_of
from ..krea2_model.transformer.patches import token_count
from . import inputs
from .inputs import MAX_MAX_SIDE, check_limits, verdict
from .latents import given_vae
from .managed.encode import encode_with_images
from .managed.lora import EDIT_FAMILIES, PRESET, known_preset
from .managed.references import add_references
from .managed.vision import pictures
from .prompts import advised, check_clip, encode
from .reports import (
    edit_report,
    image_report,
    prompt_report,
    reference_report,
    size_report,
    task_report,
)
from .sampler_run import check_model

logger = logging.getLogger(__name__)

_REMEDY = (
    "Lower encoder_side, load a smaller file of the text encoder (fp8_scaled), or close what else "
    "uses the device."
)


class K2Edit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Edit",
            display_name="Krea 2 Edit",
            category="Krea 2",
            description=(
                "Edits a picture as the prompt says, with an edit LoRA of any family: prompt and "
                "negative with the pictures, references and the size of the image, as the LoRA was "
                "trained. Needs such a LoRA on the model."
            ),
            search_aliases=inputs.aliases(
                "edit, instruct, kontext, qwen edit, identity, remove, outpaint, ip adapter, face"
            ),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 with an edit LoRA, from Load Krea 2 LoRA."),
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "The text encoder from a Krea 2 loader; its file must contain the vision "
                        "tower, except for the family references-only."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The Krea 2 VAE."),
                inputs.prompt("What to change, such as: make the car matte black."),
                io.Image.Input("image_1", tooltip="The picture to edit, or the scene."),
                io.Image.Input(
                    "image_2",
                    optional=True,
                    tooltip="A subject to put into the scene, for LoRAs with two references.",
                ),
                inputs.negative_prompt(
                    "Negative prompt, mostly empty; the pictures stand in front of it too. No "
                    "effect at guidance 0 (Turbo)."
                ),
                io.Combo.Input(
                    "family",
                    options=[AUTO, *FAMILIES],
                    default=AUTO,
                    tooltip=(
                        "How the LoRA was trained: identity (identity-edit), ai-toolkit (its edit "
                        "LoRAs and style_reference) or references-only. auto reads it from the "
                        "LoRA's file; the node shows the result."
                    ),
                ),
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default=EDIT,
                    tooltip=(
                        "Settings for a kind of edit: a removal gives Raw 20 steps at guidance 2, "
                        "outpainting checks the size, person shows the text encoder "
                        "more of a face."
                    ),
                ),
                _boost("boost", "image_1"),
                _boost("boost_2", "image_2"),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The part of the new image that the boosts act on; all of it without.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The size of the new image. Without it, that of image_1, up to "
                        f"{MAX_MEGAPIXELS:g} megapixels. Needed for outpainting."
                    ),
                ),
                inputs.megapixels(
                    "Area of the new image in image_1's shape, in units of 1024 x 1024 pixels; 0 "
                    "keeps its area. Not used with a latent.",
                    default=0.0,
                    step=0.01,
                    advanced=True,
                ),
                io.Int.Input(
                    "encoder_side",
                    default=0,
                    min=0,
                    max=MAX_MAX_SIDE,
                    step=32,
                    advanced=True,
                    tooltip=(
                        "Size of the pictures for the text encoder; 0 is the family's: at most "
                        "768 pixels a side (identity), or the area of 384 x 384 (ai-toolkit). "
                        "Higher keeps more of a face, lower follows the prompt more."
                    ),
                ),
                io.Boolean.Input(
                    "cache",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Compute the references' keys and values once per run, for LoRAs trained "
                        "with kv_cache; not for the family identity."
                    ),
                ),
                inputs.WEIGHTS,
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with pictures and references."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt with the same pictures."
                ),
                io.Latent.Output(
                    display_name="latent", tooltip="The latent for the sampler, at the edit's size."
                ),
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, with the task's settings for preset auto of the sampler.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, boost=None, boost_2=None, megapixels=None, encoder_side=None, family=None, task=None
    ):
        def check():
            if family not in (None, AUTO):
                recipe_for(family)
            if task is not None:
                task_of(task)

        numbers = {"boost": boost, "boost_2": boost_2, "megapixels": megapixels}
        return verdict(cls, check, encoder_side=encoder_side, **numbers)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        prompt,
        image_1,
        image_2=None,
        negative="",
        family=AUTO,
        task=EDIT,
        boost=1.0,
        boost_2=1.0,
        mask=None,
        latent=None,
        megapixels=0.0,
        encoder_side=0,
        cache=False,
        weights=True,
    ):
        check_model(model)
        check_clip(clip)
        given_vae(vae)
        check_limits(
            cls, boost=boost, boost_2=boost_2, megapixels=megapixels, encoder_side=encoder_side
        )
        recipe, source = recipe_for(family, model.model_options.get(EDIT_FAMILIES, ()), cache)
        groups = [pictures(image_1, "image_1"), pictures(image_2, "image_2")]
        shown = [picture.cpu() for group in groups for picture in group]
        check_picture_count(len(shown))
        boosts = [boost] * len(groups[0]) + [boost_2] * len(groups[1])
        if latent is None:
            width, height = edit_size(shown[0], megapixels)
            latent = {"samples": _empty(width, height)}
        height, width = (8 * side for side in latent["samples"].shape[-2:])
        check_outpainting(task, width, height, shown[0])
        plan = plan_edit(
            shown,
            recipe,
            width,
            height,
            task=task,
            boost=boosts,
            boost_mask=mask,
            encoder_side=encoder_side or None,
        )
        base = known_preset(model)
        settings = task_of(task).preset(base)
        if settings is not None:
            model = model.clone()
            model.model_options[PRESET] = settings
        encoded = [_encode(clip, text, plan, weights) for text in (prompt, negative)]
        latents = [vae.encode(p.movedim(0, -1)[None]) for p, _ in plan.references]
        results = []
        for conditioning in encoded:
            for one, (_, reference) in zip(latents, plan.references, strict=True):
                conditioning = add_references(
                    conditioning, [one], reference, recipe.method, recipe.cache
                )
            results.append(conditioning)

        tokens = sum(math.prod(grid_of(image.pixels)) for image in plan.prompt_images)
        samples = latent["samples"]
        lines = [edit_report(source)]
        lines.append(size_report(width, height, token_count(samples), len(samples)))
        lines.append(prompt_report("prompt", encoded[0], tokens))
        lines += [image_report(n, image) for n, image in enumerate(plan.prompt_images, start=1)]
        lines += [
            reference_report(pixels.shape[2], pixels.shape[1], 1.0) for pixels, _ in plan.references
        ]
        lines += task_report(task, task_of(task), settings, base)
        if mask is not None and all(factor == 1 for factor in boosts):
            lines.append("not used: mask, at boost 1")
        if is_too_large(width, height):
            lines.append(f"above {MAX_MEGAPIXELS:g} megapixels:\nsubjects may double")
            logger.warning(
                "Krea 2 Edit: %d x %d px are above %g megapixels; subjects may double.",
                width,
                height,
                MAX_MEGAPIXELS,
            )
        return io.NodeOutput(*results, latent, model, ui=ui.PreviewText("\n".join(lines)))


def _boost(name: str, picture: str):
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.05,
        tooltip=(
            f"Factor on the new image's attention to {picture}: 1 is as trained, above it keeps "
            "more of the picture, below it less."
        ),
    )


def _empty(width: int, height: int):
    device = comfy.model_management.intermediate_device()
    return torch.zeros(1, 16, 1, height // 8, width // 8, device=device)


def _encode(clip, text: str, plan, weights: bool):
    """A text with the pictures in front, where the family's text encoder reads them."""
    if not plan.prompt_images:
        return encode(clip, [text], weights)
    with advised(_REMEDY):
        return encode_with_images(
            clip, text, plan.prompt_images, labels=plan.recipe.labels, weighted=weights
        )
