"""The text encoder and the VAE that belong to a transformer, as far as their headers tell."""

from pathlib import Path

from ..krea2_model import nano
from ..krea2_model.checkpoints.identify import TEXT_ENCODER, TRANSFORMER, WHERE, CheckpointError
from ..krea2_model.checkpoints.pairing import (
    COMPONENTS,
    encoder_width,
    has_all_layers,
    size_of,
    text_width,
    wrong_pair,
)
from . import model_files
from .model_files import shapes_of_part


def find_fitting(part: str, model: Path) -> Path:
    """The `part` that belongs to the transformer `model`, for the choice "auto".

    The one in the same file or folder, or else the first of the user's whose sizes fit; the
    built-in model has its own. Raises CheckpointError where none does.

    Text encoders with a vision tower come first: without it Qwen3-VL-4B cannot be told from the
    Qwen3-4B that other models use, whose states mean nothing to Krea 2.
    """
    if model in nano.TRANSFORMERS.values():
        return model_files.find_model(part, model_files.NANO)
    if model_files.holds(model, part):
        return model
    second_best = None
    for name in model_files.list_user_models(part):
        try:
            path = model_files.find_model(part, name)
            if not _fits(path, part, model):
                continue
            if part != TEXT_ENCODER or _has_vision_tower(path):
                return path
            second_best = second_best or path
        except (CheckpointError, OSError):
            # Lists show broken files too.
            continue
    if second_best is not None:
        return second_best
    raise CheckpointError(
        f"Nothing that fits {model.name} was found for {COMPONENTS[part]}. Download "
        f'{WHERE[part]}, or choose a file instead of "auto".'
    )


def check_pair(model: Path, encoder: Path) -> None:
    """Raise CheckpointError where a text encoder's width is not what the transformer needs."""
    needed, actual = _text_width(model), _encoder_width(encoder)
    if None not in (needed, actual) and needed != actual:
        raise CheckpointError(wrong_pair(encoder, actual, model, needed))


def _fits(path: Path, part: str, model: Path) -> bool:
    if part == TEXT_ENCODER:
        shapes = shapes_of_part(path, TEXT_ENCODER)
        return encoder_width(shapes) == _text_width(model) and has_all_layers(shapes)
    # Relatives of this VAE differ in the channels of images or latents.
    shapes = shapes_of_part(path, part)
    first = size_of(shapes, "encoder.conv1.weight", "encoder.conv_in.weight", axis=1)
    last = size_of(shapes, "conv2.weight", "post_quant_conv.weight", axis=0)
    return (first, last) == (3, 16)


def _has_vision_tower(encoder: Path) -> bool:
    return any("visual." in name for name in shapes_of_part(encoder, TEXT_ENCODER))


def _text_width(model: Path) -> int | None:
    return text_width(shapes_of_part(model, TRANSFORMER))


def _encoder_width(encoder: Path) -> int | None:
    return encoder_width(shapes_of_part(encoder, TEXT_ENCODER))
