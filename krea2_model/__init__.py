"""Krea 2 in plain torch: the transformer, its text encoder, its VAE, and the way to an image.

Runs without ComfyUI and never imports it. Importing the package is cheap: torch and the modules
behind these names are imported when the first of them is used.
"""

# ruff: noqa: F403, F405 - the names of public.py, and a test compares the two lists

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .public import *

# The same as in pyproject.toml, which the registry reads.
__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "RAW",
    "TURBO",
    "CheckpointError",
    "Control",
    "Describer",
    "DetailAreas",
    "GuidanceSchedule",
    "Edit",
    "Extraction",
    "Inpaint",
    "Krea2Pipeline",
    "Krea2Tokenizer",
    "Krea2Transformer",
    "MixedStyle",
    "NegativeGuidance",
    "PictureGrid",
    "Preset",
    "PromptBlend",
    "PromptExpander",
    "PromptImage",
    "PromptImages",
    "Qwen3VLTextEncoder",
    "QwenImageVAE",
    "Reference",
    "ReferenceSettings",
    "References",
    "Region",
    "Regions",
    "RotaryScaling",
    "SavedStyle",
    "SparseAttention",
    "StyleError",
    "StyleLibrary",
    "StyleTransfer",
    "TextEncoderConfig",
    "TilePrompts",
    "TileSettings",
    "TransformerConfig",
    "Upscale",
    "VAEConfig",
    "Variation",
    "__version__",
    "denoise",
    "extract_lora",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "save_transformer",
    "shift_mu",
    "sigma_schedule",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import public

        return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
