"""Edits of pictures: the whole recipe of a family of edit LoRAs, from pictures to what a run takes.

An edit LoRA was trained with its pictures given in a certain way: what the text encoder reads of
them, and how they stand beside the image as references. `plan_edit` does both by the family's
`EditRecipe`; for the families see `lora.edit_family`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from ..checks import counted, is_number, is_whole
from ..config import Preset
from ..images.masks import mask_for
from ..images.pictures import Picture, fit, pixels_of, reference_pixels
from ..images.sizes import MULTIPLE, limit_area, size_for_area
from ..lora.edit_family import (
    AI_TOOLKIT,
    FAMILIES,
    IDENTITY,
    REFERENCES_ONLY,
    EditFamily,
    likeliest,
)
from ..text.prompt_images import PromptImage
from ..text.vision import resize_for_tower, resize_to_longest
from ..transformer.references import SHARED_TIME, TIME_ZERO, BoostMask, ReferenceSettings
from .inpainting import mask_pixels

AUTO = "auto"
MAX_PICTURES = 2
# Above this area subjects double, since the LoRAs were trained below.
MAX_MEGAPIXELS = 2.0
# A picture whose shape differs by less from the image's is cropped to it: margins of one or two
# tokens without a reference beside them are filled with copies of their neighbours.
FILL_TOLERANCE = 0.08


@dataclass(frozen=True)
class EditRecipe:
    """The recipe of a family: the way its pictures are given.

    labels: number them for the text encoder, `Picture 1: `.
    encoder_side: the text encoder reads pictures of at most this side, or of at most the area of
        a square of it; None where it reads none.
    by_longest: encoder_side is the longest side.
    fits_image: references are fitted into the image, in its middle; else of their own size, up to
        one megapixel.
    method: one of `REFERENCE_METHODS`. cache: references attend only to themselves.

    Raises ValueError for a cache with references whose time changes.
    """

    labels: bool
    encoder_side: int | None
    by_longest: bool
    fits_image: bool
    method: str
    cache: bool = False

    def __post_init__(self):
        if self.cache and self.method != TIME_ZERO:
            raise ValueError(
                f"Cached references need the time 0; references of the family {IDENTITY!r} have "
                f"the step's. Switch cache off, or choose the family {AI_TOOLKIT!r}."
            )


RECIPES = {
    IDENTITY: EditRecipe(False, 768, True, True, SHARED_TIME),
    AI_TOOLKIT: EditRecipe(True, 384, False, False, TIME_ZERO),
    REFERENCES_ONLY: EditRecipe(False, None, False, False, TIME_ZERO),
}


@dataclass(frozen=True)
class EditTask:
    """A kind of edit and its needs.

    steps, guidance: of Raw, or None for the checkpoint's own. sampler: ComfyUI's name, or None.
    longest_side: of pictures for the text encoder, in the identity family. larger: the image has to
    be larger than the picture.
    """

    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    longest_side: int | None = None
    larger: bool = False

    def preset(self, base: Preset | None) -> Preset | None:
        """A checkpoint's sampling defaults for this task; None where they are its own.

        A checkpoint without guidance (Turbo) keeps its own: `lacks_guidance` tells.
        """
        if self.steps is None or self.guidance is None or base is None or base.guidance == 0:
            return None
        return replace(base, steps=self.steps, guidance=self.guidance)

    def lacks_guidance(self, base: Preset | None) -> bool:
        """True if the task needs guidance and the checkpoint has none."""
        return self.guidance is not None and base is not None and base.guidance == 0


EDIT, REMOVAL, OUTPAINTING, PERSON = "edit", "removal", "outpainting", "person"
TASKS = {
    EDIT: EditTask(),
    # Without guidance what should go is painted again.
    REMOVAL: EditTask(steps=20, guidance=2.0),
    # Samplers that add noise at each step (er_sde) leave a seam at the picture's edge.
    OUTPAINTING: EditTask(sampler="euler", larger=True),
    # More of a face than the 768 pixels that the text encoder reads else.
    PERSON: EditTask(longest_side=1024),
}


@dataclass(frozen=True)
class Edit:
    """Pictures to edit, for a LoRA that was trained for it.

    images: the scene, and perhaps a subject to put into it.
    family: one of `FAMILIES`, or "auto" for that of the loaded LoRA.
    task: one of `TASKS`.
    boost: factor on the image's attention to the pictures, one or one each; 1 is as trained.
    boost_mask: the part of the image that has the boost, white; None is all of it.
    encoder_side: in place of the recipe's.
    cache: references attend only to themselves, for LoRAs that were trained so.
    """

    images: Picture | Sequence[Picture]
    family: str = AUTO
    task: str = EDIT
    boost: float | Sequence[float] = 1.0
    boost_mask: Picture | None = None
    encoder_side: int | None = None
    cache: bool = False

    @classmethod
    def of(cls, edit: Edit | Picture | Sequence[Picture] | None) -> Edit | None:
        return edit if edit is None or isinstance(edit, Edit) else cls(edit)

    def pictures(self) -> list[Tensor]:
        """Its pictures as (3, H, W). Raises ValueError for none, for more than two, for others."""
        images = self.images
        given = list(images) if isinstance(images, (list, tuple)) else [cast(Picture, images)]
        check_picture_count(len(given))
        return [pixels_of(image, "an image of edit") for image in given]

    def size(self) -> tuple[int, int]:
        """Width and height of its result where no other is given."""
        return edit_size(self.pictures()[0])

    def settings(
        self, base: Preset, steps: int | None, guidance: float | None
    ) -> tuple[int | None, float | None]:
        """Steps and guidance, in place of None the task's where it has some for a checkpoint."""
        preset = task_of(self.task).preset(base)
        if preset is None:
            return steps, guidance
        return steps or preset.steps, preset.guidance if guidance is None else guidance

    def plan(
        self, width: int, height: int, loras: Sequence[EditFamily], base: Preset
    ) -> tuple[EditPlan, list[str]]:
        """The plan for an image of width x height pixels, and what should be said about it.

        loras: of the loaded LoRAs. base: the checkpoint's sampling defaults.
        """
        recipe, _ = recipe_for(self.family, loras, self.cache)
        pictures, mask = self.pictures(), None
        check_outpainting(self.task, width, height, pictures[0])
        if self.boost_mask is not None:
            mask = mask_pixels(self.boost_mask, "boost_mask")
        plan = plan_edit(
            pictures,
            recipe,
            width,
            height,
            task=self.task,
            boost=self.boost,
            boost_mask=mask,
            encoder_side=self.encoder_side,
        )
        notes = []
        if is_too_large(width, height):
            notes.append(
                f"The edit has {width} x {height} px; above {MAX_MEGAPIXELS:g} megapixels subjects "
                "may double."
            )
        task = task_of(self.task)
        if task.lacks_guidance(base):
            notes.append(
                f"A {self.task} needs guidance ({task.guidance:g} in {task.steps} steps on Raw); "
                f"this checkpoint ({base.name}) has none."
            )
        return plan, notes


@dataclass(frozen=True)
class EditPlan:
    """An edit as a run takes it.

    prompt_images: for the text encoder, at their final sizes, in front of prompt and negative.
    references: pixels (3, H, W) at their final sizes, and settings.
    """

    recipe: EditRecipe
    prompt_images: list[PromptImage]
    references: list[tuple[Tensor, ReferenceSettings]]


def plan_edit(
    pictures: Sequence[Tensor],
    recipe: EditRecipe,
    width: int,
    height: int,
    *,
    task: str = EDIT,
    boost: float | Sequence[float] = 1.0,
    boost_mask: Tensor | None = None,
    encoder_side: int | None = None,
) -> EditPlan:
    """An edit of one or two pictures (3, H, W) into an image of width x height pixels.

    boost_mask: (1, H, W) in [0, 1], of the image's aspect. Raises ValueError for bad arguments.
    """
    check_picture_count(len(pictures))
    boosts = boosts_of(boost, len(pictures))
    if boost_mask is not None:
        (mask,) = mask_for(boost_mask, pictures[0].new_zeros(1, height, width, 3))[:1]
        if not mask.any():
            raise ValueError(
                "The mask of the boost is empty, so the boost would act nowhere. Paint it white "
                "where it should act, or leave it out."
            )
        boost_at = BoostMask(mask)
    references = []
    for pixels, factor in zip(pictures, boosts, strict=True):
        offset = (0.0, 0.0)
        if recipe.fits_image:
            pixels, offset = fit_into(pixels, width, height)
        else:
            pixels = reference_pixels(pixels, 1.0)
        at = boost_at if boost_mask is not None and factor != 1 else None
        references.append((pixels, ReferenceSettings(offset=offset, boost=factor, boost_mask=at)))
    side = encoder_side or recipe.encoder_side
    if side == recipe.encoder_side and recipe.by_longest and task_of(task).longest_side:
        side = task_of(task).longest_side
    prompt_images = []
    if recipe.encoder_side is not None and side is not None:
        if not is_whole(side) or not 32 <= side <= 4096:
            raise ValueError(f"encoder_side is {side!r}; expected 32 to 4096 pixels.")
        resized = resize_to_longest if recipe.by_longest else resize_for_tower
        prompt_images = [PromptImage(resized(pixels, side)) for pixels in pictures]
    return EditPlan(recipe, prompt_images, references)


def recipe_for(
    family: str, loras: Sequence[EditFamily] = (), cache: bool = False
) -> tuple[EditRecipe, str]:
    """The recipe of a family, and where it is from.

    family: one of `FAMILIES`, or "auto" for what the LoRAs' files tell.
    Raises ValueError for another family, and where nothing tells.
    """
    if family == AUTO:
        found = likeliest(loras)
        if found is None:
            reason = "none of the LoRAs tells its family"
            if loras:
                reason = "the LoRAs are of different families"
            raise ValueError(
                f"family is auto, but {reason}. Load the edit LoRA by Load Krea 2 LoRA (in Python: "
                f"load_lora), or choose the family: {', '.join(FAMILIES)}."
            )
        recipe = RECIPES[found.name]
        may_cache = recipe.method == TIME_ZERO and found.cache
        return replace(recipe, cache=cache or may_cache), str(found)
    if family not in RECIPES:
        raise ValueError(f"family is {family!r}; expected {AUTO}, {', '.join(FAMILIES)}.")
    return replace(RECIPES[family], cache=cache), f"family {family} (chosen)"


def task_of(name: str) -> EditTask:
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; expected one of {', '.join(TASKS)}.")
    return TASKS[name]


def check_picture_count(count: int) -> None:
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(
            f"There are {count} pictures to edit; expected one, the scene, or two, the scene and a "
            "subject. Put others into one picture, or use Krea 2 Reference."
        )


def boosts_of(boost: float | Sequence[float], count: int) -> list[float]:
    """A boost for each of `count` pictures. Raises ValueError for another number of them."""
    one_each = isinstance(boost, (list, tuple))
    boosts = list(boost) if one_each else [cast(float, boost)] * count  # type: ignore[arg-type]
    if len(boosts) != count or not all(is_number(b) and 0 <= b <= 1000 for b in boosts):
        raise ValueError(
            f"boost is {boost!r}; expected a number from 0 to 1000, or one for each of "
            f"{counted(count, 'picture')} (1 changes nothing)."
        )
    return boosts


def edit_size(pixels: Tensor, megapixels: float = 0.0) -> tuple[int, int]:
    """Width and height, in multiples of 16, of the edit of a picture (3, H, W).

    megapixels: in units of 1024 x 1024 pixels; 0 is the picture's own area, up to two.
    """
    width, height = pixels.shape[2], pixels.shape[1]
    if megapixels:
        return size_for_area(width, height, megapixels)
    return limit_area(width, height, MAX_MEGAPIXELS)


def is_too_large(width: int, height: int) -> bool:
    """True if an edit of this size is beyond what the LoRAs were trained for."""
    return width * height > MAX_MEGAPIXELS * 1024**2


def check_outpainting(task: str, width: int, height: int, pixels: Tensor) -> None:
    """Raise ValueError for an outpainting into an image of the picture's own shape."""
    own = pixels.shape[2] / pixels.shape[1]
    if task_of(task).larger and abs(width / height / own - 1) <= FILL_TOLERANCE:
        raise ValueError(
            f"task is {task}, and the image ({width} x {height} px) has the picture's own shape, "
            "so there is nothing to add. Give an image of another shape: connect the latent of "
            "Krea 2 Size (in Python: width and height)."
        )


def fit_into(pixels: Tensor, width: int, height: int) -> tuple[Tensor, tuple[float, float]]:
    """A picture (3, H, W) fitted into an image, and the offset of its tokens there.

    It is scaled until it touches two edges, and cropped to whole tokens; the offset, in rows and
    columns, puts it into the middle, so it may be half a token. A picture of nearly the image's
    shape covers it, see `FILL_TOLERANCE`.
    """
    rows, columns = -(-height // MULTIPLE), -(-width // MULTIPLE)
    scale = min(width / pixels.shape[2], height / pixels.shape[1])
    across, down = (scale * side for side in (pixels.shape[2], pixels.shape[1]))
    least = 1 - FILL_TOLERANCE
    if across >= least * width and down >= least * height:
        return fit(pixels, columns * MULTIPLE, rows * MULTIPLE), (0.0, 0.0)
    # A rounding error must not take a token from the side that touches.
    wide, high = (
        min(max(1, int((side + 1e-3) // MULTIPLE)), most)
        for side, most in ((across, columns), (down, rows))
    )
    return fit(pixels, wide * MULTIPLE, high * MULTIPLE), ((rows - high) / 2, (columns - wide) / 2)
