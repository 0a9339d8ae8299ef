"""`--style`: options of a picture with those of its styles, on the way to the pipeline.

A picture keeps the names of its styles, so `krea2 again` takes them from the library.
"""

from __future__ import annotations

from argparse import Namespace
from copy import copy
from pathlib import Path

from ..features.style_library import SavedStyle, StyleError, StyleLibrary
from ..features.style_mixing import MixedStyle, escaped
from .errors import UsageError
from .model_files import find_lora, models_folder

_SUGGESTED = ("steps", "guidance", "width", "height")


def mixed_of(args: Namespace) -> MixedStyle:
    try:
        return MixedStyle.of(args.style, StyleLibrary(args.style_folder))
    except StyleError as error:
        if not getattr(args, "is_again", False) or args.style_folder is not None:
            raise
        raise UsageError(
            f"{error} The picture's styles may lie in another library, such as "
            "ComfyUI/user/krea2_styles: --style-folder FOLDER."
        ) from error


def styled(args: Namespace) -> Namespace:
    """The options with the words, pictures, LoRAs and suggestions of their styles.

    Raises UsageError or StyleError for styles that cannot be used.
    """
    if not args.style:
        return args
    mixed, result = mixed_of(args), copy(args)
    result.style = []
    texts = [args.prompt, args.blend, args.negative]
    if mixed.uses_weights and not args.weights:
        # Weights are then read in all texts: brackets of the user's own stay brackets.
        texts = [text and escaped(text) for text in texts]
        result.upscale_tile_prompt = [escaped(text) for text in args.upscale_tile_prompt]
        result.weights = result.escape_regions = True
    result.prompt = mixed.prompt(texts[0])
    result.blend = None if texts[1] is None else mixed.prompt(texts[1])
    result.negative = mixed.negative(texts[2])
    own = [(_lora_of(style, file, args), scale) for style, file, scale in mixed.loras()]
    result.lora = [*args.lora, *own]
    if pictures := mixed.pictures():
        if args.style_image:
            raise UsageError(
                "--style-image gives pictures, and so does --style; give one of them, or save the "
                "picture as a style: krea2 styles save NAME --reference FILE."
            )
        result.style_image = [path for path, _ in pictures]
        result.style_weights = [weight for _, weight in pictures]
        result.style_strength = mixed.picture_strength * args.style_strength
    if getattr(args, "is_again", False):
        return result  # what the picture leaves open, the checkpoint says
    has_size = args.width is not None or args.height is not None or args.start_image is not None
    for name in _SUGGESTED:
        is_size = name in ("width", "height")
        if getattr(result, name) is None and not (is_size and (has_size or args.edit)):
            setattr(result, name, mixed.setting(name))
    return result


def _lora_of(style: SavedStyle, file: str, args: Namespace) -> str:
    """The LoRA of a style: in its folder, or one that --lora would find."""
    beside = [Path(style.folder or ""), *getattr(args, "beside", ())]
    try:
        return str(find_lora(file, models_folder(args.models), beside))
    except UsageError as error:
        raise UsageError(f"Style {style.name} needs a LoRA: {error}") from error
