"""krea2-nano: a complete small Krea 2 that comes with the package.

The same architecture, file layouts and sampling as the released model, at a width of 256, trained
on flat-colour scenes of 128 px: one or two shapes, their colours, sizes and places, and a
background. It is there to show that everything works, on any machine within seconds, and to be
tested against. It knows nothing else. `scripts/train_nano.py` is how it was made.

The trained files lie in this folder. The text encoder was drawn at random (encoder.py), so it is
made on first use and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import uuid
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoder import CONFIG as TEXT_ENCODER_CONFIG
from .encoder import VISION_CONFIG, checksum, encoder_tensors

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
VARIANTS = ("turbo", "raw")
TRANSFORMERS = {variant: FOLDER / f"krea2_nano_{variant}.safetensors" for variant in VARIANTS}
VAE = FOLDER / "krea2_nano_vae.safetensors"
# A style, outlines on ruled paper: a LoRA trained on Raw that Turbo takes as well.
LORA = FOLDER / "krea2_nano_notebook_lora.safetensors"
# Takes colours over from reference images: the prompt names shapes and places, a LoRA on Raw too.
REFERENCE_LORA = FOLDER / "krea2_nano_reference_lora.safetensors"

# The path by which loaders know the text encoder, which is made on first use; not a file.
TEXT_ENCODER = FOLDER / "krea2_nano_text_encoder.safetensors"
TEXT_ENCODER_CHECKSUM = "e0b5e2e872eef3b98e1749328d5ad0d012a97ea6c19043e3ffce813b55fc66b1"

__all__ = [
    "LORA",
    "REFERENCE_LORA",
    "TEXT_ENCODER",
    "TEXT_ENCODER_CONFIG",
    "TRANSFORMERS",
    "VAE",
    "VARIANTS",
    "VISION_CONFIG",
    "text_encoder_tensors",
]


def text_encoder_tensors() -> dict[str, Tensor]:
    """The text encoder's tensors by file names, from the cache folder or made anew (seconds).

    What is returned has been compared with the checksum. Where nothing can be written, the tensors
    are made again in the next process. Raises RuntimeError where this machine makes others.
    """
    folder = cache_folder()
    if folder is None:
        logger.info("There is no home folder: the text encoder of krea2-nano stays in memory.")
        return _make_tensors()
    file = folder / f"krea2_nano_text_encoder_{TEXT_ENCODER_CHECKSUM[:12]}.safetensors"
    try:
        tensors = load_file(file)
        if checksum(tensors) == TEXT_ENCODER_CHECKSUM:
            return tensors
    except (OSError, SafetensorError):
        pass
    logger.info("Making the text encoder of krea2-nano, once; it is kept as %s.", file)
    tensors = _make_tensors()
    _save_whole(tensors, file)
    return tensors


def _make_tensors() -> dict[str, Tensor]:
    tensors = encoder_tensors()
    if (found := checksum(tensors)) != TEXT_ENCODER_CHECKSUM:
        raise RuntimeError(
            f"The text encoder of krea2-nano came out with checksum {found}; expected "
            f"{TEXT_ENCODER_CHECKSUM}. Please report this with your versions of Python, NumPy "
            "and torch."
        )
    return tensors


def cache_folder() -> Path | None:
    """This package's folder in the user's cache directory, by the system's rule.

    None where the user has no home and the system no entry for them, as in some containers.
    """
    try:
        return _user_cache() / "krea2-kit"
    except RuntimeError:
        return None


def _user_cache() -> Path:
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root)


def _save_whole(tensors: dict[str, Tensor], file: Path) -> None:
    """Write the file whole or not at all; other processes may be doing the same."""
    partial = file.with_name(f"{uuid.uuid4().hex}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"format": "pt"})
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        logger.info("It cannot be kept there (%s) and stays in memory.", error)
        with contextlib.suppress(OSError):
            partial.unlink()
