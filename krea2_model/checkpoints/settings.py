"""Settings of a model folder's configuration files: what tensors cannot tell.

A value that cannot be right is refused, with the file, the value and what was expected: weights
would load all the same and paint noise. What a configuration leaves out keeps the released value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checks import counted
from ..config import TextEncoderConfig, VAEConfig
from .identify import CheckpointError

# More decoder layers than any model of this kind; an index beyond is no layer's.
_MOST_LAYERS = 1000


def transformer_settings(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Of a diffusers transformer's `config.json`, by the names of TransformerConfig.

    file: what messages call the configuration. Raises CheckpointError.
    """
    readers: dict[str, Callable[[Any], Any]] = {
        "rope_theta": _positive,
        "norm_eps": _epsilon,
        "axes_dims_rope": _three_axes,
    }
    return {
        name: _read(file, name, config[name], read)
        for name, read in readers.items()
        if config.get(name) is not None
    }


def text_encoder_settings(
    config: Mapping[str, Any], model_index: Mapping[str, Any], files: tuple[str, str]
) -> dict[str, Any]:
    """Of a text encoder's `config.json` and the pipeline's `model_index.json`.

    By the names of TextEncoderConfig; the taps are always among them. files: what messages call
    the two. Raises CheckpointError.
    """
    file, index = files
    taps = model_index.get("text_encoder_select_layers")
    settings: dict[str, Any] = {
        "tap_layers": TextEncoderConfig.tap_layers
        if taps is None
        else _read(index, "text_encoder_select_layers", taps, _layer_indices)
    }
    config = _object(file, "text_config", config.get("text_config", config))
    rope = _object(file, "rope_parameters", config.get("rope_parameters"))
    scaling = _object(file, "rope_scaling", config.get("rope_scaling"))
    theta = config.get("rope_theta", rope.get("rope_theta"))
    if theta is not None:
        settings["rope_theta"] = _read(file, "rope_theta", theta, _positive)
    sections = rope.get("mrope_section", scaling.get("mrope_section"))
    if sections is not None:
        settings["mrope_section"] = _read(file, "mrope_section", sections, _three_sizes)
    if config.get("rms_norm_eps") is not None:
        settings["rms_norm_eps"] = _read(file, "rms_norm_eps", config["rms_norm_eps"], _epsilon)
    return settings


def vae_settings(config: Mapping[str, Any], z_dim: int, file: str) -> dict[str, Any]:
    """Statistics of the latents of a VAE's `config.json`, by the names of VAEConfig.

    z_dim: latent channels of its tensors. Raises CheckpointError.
    """
    claimed = config.get("z_dim")
    if claimed is not None and claimed != z_dim:
        raise CheckpointError(
            f"{file} has z_dim {_short(claimed)}, and the weights beside it have {z_dim} latent "
            "channels. Take both from one folder."
        )
    statistics = {
        name: _read(file, name, config[name], read)
        for name, read in (("latents_mean", _numbers), ("latents_std", _positive_numbers))
        if config.get(name) is not None
    }
    for name, default in (
        ("latents_mean", VAEConfig.latents_mean),
        ("latents_std", VAEConfig.latents_std),
    ):
        count = len(statistics.get(name, default))
        if count != z_dim:
            raise CheckpointError(
                f"{file} has {counted(count, 'value')} of {name}; expected {z_dim}, one a latent "
                "channel. Take the file from the folder that the weights are from."
                if name in statistics
                else f"The VAE has {z_dim} latent channels, and no {file} gives their {name}; "
                f"expected {len(default)} channels as the Qwen-Image VAE has, or that file."
            )
    return statistics


def distilled(model_index: Mapping[str, Any], file: str) -> bool | None:
    """`is_distilled`, None where it is not there. Raises CheckpointError for another type."""
    value = model_index.get("is_distilled")
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(
            f"{file} has is_distilled {_short(value)}; expected true (Turbo) or false (Raw). "
            "Correct it there."
        )
    return value


def _object(file: str, name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} has {name} {_short(value)}; expected an object.")
    return value


def _read(file: str, name: str, value: Any, read: Callable[[Any], Any]) -> Any:
    """`read(value)`; its ValueError, the expected value, becomes a CheckpointError."""
    try:
        return read(value)
    except ValueError as error:
        raise CheckpointError(
            f"{file} has {name} {_short(value)}; expected {error}. Correct it there, or take the "
            "file from the model's page."
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _positive(value: Any) -> float:
    number = _number(value)
    if not 0 < number < 1e30:
        raise ValueError("a number above 0")
    return number


def _epsilon(value: Any) -> float:
    number = _number(value)
    if not 0 < number < 1:
        raise ValueError("a small number above 0, such as 1e-06")
    return number


def _number(value: Any) -> float:
    # JSON knows NaN and Infinity here, and whole numbers that no float can hold.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return math.nan


def _numbers(values: Any) -> tuple[float, ...]:
    numbers = [_number(value) for value in values] if isinstance(values, Sequence) else [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("finite numbers, one a latent channel")
    return tuple(numbers)


def _positive_numbers(values: Any) -> tuple[float, ...]:
    numbers = _numbers(values)
    if not all(number > 0 for number in numbers):
        raise ValueError("numbers above 0, one a latent channel")
    return numbers


def _whole(values: Any, least: int, most: int) -> tuple[int, ...] | None:
    """A list of whole numbers within limits, or None."""
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= _MOST_LAYERS:
        return None
    if not all(type(v) is int and least <= v <= most for v in values):
        return None
    return tuple(values)


def _layer_indices(values: Any) -> tuple[int, ...]:
    indices = _whole(values, 0, _MOST_LAYERS)
    if indices is None or len(set(indices)) < len(indices):
        raise ValueError("different numbers of hidden states, 0 (the embedding) and up")
    return indices


def _three_sizes(values: Any) -> tuple[int, ...]:
    sizes = _whole(values, 1, 2**16)
    if sizes is None or len(sizes) != 3:
        raise ValueError("three whole numbers above 0")
    return sizes


def _three_axes(values: Any) -> tuple[int, ...]:
    sizes = _three_sizes(values)
    if any(size % 2 for size in sizes):
        raise ValueError("three even numbers above 0")
    return sizes
