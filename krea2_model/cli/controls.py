"""`--control` and its options: control LoRAs, each with a picture, in the order of the options."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .model_files import find_controls

if TYPE_CHECKING:
    from torch import Tensor

    from ..features.controls import Control

# Options with a value for each control, or one for all; and what holds without any.
_VALUES: dict[str, Any] = {
    "control_strength": 1.0,
    "control_start": 0.0,
    "control_end": 1.0,
    "control_mask": None,
}
# In place of a mask, for a control that acts everywhere.
NO_MASK = "none"


def check_controls(
    args: Namespace, images: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> None:
    """Check the controls of a picture and their files; images, masks: of `find_input_pictures`.

    Raises UsageError, CheckpointError or ValueError.
    """
    from ..features.control_run import ControlSettings
    from ..features.controls import check_images, check_mask
    from ..features.inpainting import mask_pixels

    count = len(args.control)
    if count != len(args.control_image):
        raise UsageError(
            f"There are {count} --control and {len(args.control_image)} --control-image; expected "
            "as many of both: each control LoRA has a picture of its own."
        )
    for name in _VALUES:
        given = len(getattr(args, name))
        if given > 1 and given != count:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"There are {given} {option} and {count} --control; expected one for all of them, "
                "or one for each, in the same order."
            )
    each = zip(find_controls(args), images, _each(masks, count, None), *_numbers(args), strict=True)
    for (path, form), image, mask, *numbers in each:
        ControlSettings(*numbers)
        check_mask(path.name, form, mask is not None)
        pixels = None if mask is None else mask_pixels(mask, "--control-mask")
        check_images(image, pixels)


def controls_of(
    args: Namespace, images: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[Control]:
    """The controls of a picture, checked before by `check_controls`."""
    from ..features.controls import Control

    each = zip(
        find_controls(args),
        images,
        _each(masks, len(images), None),
        *_numbers(args),
        strict=True,
    )
    return [
        Control(path, image, strength, start, end, mask)
        for (path, _), image, mask, strength, start, end in each
    ]


def mask_paths(args: Namespace) -> list[Path | None]:
    """The masks that `args` name; None for a control without one."""
    return [None if str(path) == NO_MASK else path for path in args.control_mask]


def _numbers(args: Namespace) -> list[list[float]]:
    """Strengths, starts and ends of the controls."""
    return [
        _each(getattr(args, name), len(args.control), default)
        for name, default in _VALUES.items()
        if name != "control_mask"
    ]


def _each(values: Sequence[Any], count: int, default: Any) -> list[Any]:
    if not values:
        return [default] * count
    return list(values) if len(values) > 1 else list(values) * count
