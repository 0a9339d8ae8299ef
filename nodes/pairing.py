"""The text encoder and the VAE that belong to a transformer, as far as their headers tell."""

from pathlib import Path

from ..krea2_model import nano
from ..krea2_model.checkpoints.identify import TEXT_ENCODER, TRANSFORMER, WHERE, CheckpointError
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
        f"Nothing that fits {model.name} was found for {model_files.COMPONENTS[part]}. Download "
        f'{WHERE[part]}, or choose a file instead of "auto".'
    )


def check_pair(model: Path, encoder: Path) -> None:
    """Raise CheckpointError where a text encoder's width is not what the transformer needs."""
    needed, actual = _text_width(model), _encoder_width(encoder)
    if None not in (needed, actual) and needed != actual:
        raise CheckpointError(
            f"{encoder.name} gives text of width {actual}; {model.name} needs {needed}. Use the "
            f"text encoder that belongs to it, for example {WHERE[TEXT_ENCODER]}."
        )


def _fits(path: Path, part: str, model: Path) -> bool:
    if part == TEXT_ENCODER:
        return _encoder_width(path) == _text_width(model)
    # Relatives of this VAE differ in the channels of images or latents.
    shapes = shapes_of_part(path, part)
    first = _size(shapes, "encoder.conv1.weight", "encoder.conv_in.weight", axis=1)
    last = _size(shapes, "conv2.weight", "post_quant_conv.weight", axis=0)
    return (first, last) == (3, 16)


def _has_vision_tower(encoder: Path) -> bool:
    return any("visual." in name for name in shapes_of_part(encoder, TEXT_ENCODER))


def _text_width(model: Path) -> int | None:
    names = (
        "txtfusion.layerwise_blocks.0.prenorm.scale",
        "text_fusion.layerwise_blocks.0.norm1.weight",
    )
    return _size(shapes_of_part(model, TRANSFORMER), *names)


def _encoder_width(encoder: Path) -> int | None:
    return _size(shapes_of_part(encoder, TEXT_ENCODER), "layers.0.input_layernorm.weight")


def _size(shapes, *endings: str, axis: int = 0) -> int | None:
    """One size of the first tensor whose name, after any prefix, is one of `endings`."""
    for name, shape in shapes.items():
        if any(name == end or name.endswith(f".{end}") for end in endings):
            return shape[axis]
    return None
