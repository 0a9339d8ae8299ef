"""krea2-nano: a complete small Krea 2 that comes with the package.

The same architecture, file layouts and sampling as the released model, at a width of 256, trained
on flat-colour scenes of 128 px: one or two shapes, their colours, sizes and places, and a
background. It is there to show that everything works, on any machine within seconds, and to be
tested against. It knows nothing else. `scripts/train_nano.py` is how it was made.

The trained files lie in this folder. The text encoder was drawn at random (encoder.py), so its file
is made on first use, in the user's cache folder.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..replacing import replacing
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
# Follows the outlines of a control image: a control LoRA, trained on Raw as well.
CONTROL_LORA = FOLDER / "krea2_nano_control_lora.safetensors"
# Twelve pictures with captions to train on: shapes on blueprint paper, of which captions say
# nothing. `scripts/draw_nano_pictures.py` drew them.
PICTURES = FOLDER / "pictures"

# Qwen's tokenizer with the words that prompts for it have; used where there is no whole one.
TOKENIZER = FOLDER / "tokenizer"

TEXT_ENCODER_CHECKSUM = "e0b5e2e872eef3b98e1749328d5ad0d012a97ea6c19043e3ffce813b55fc66b1"
# Another version of the encoder would be another file.
TEXT_ENCODER_NAME = f"krea2_nano_text_encoder_{TEXT_ENCODER_CHECKSUM[:12]}.safetensors"

__all__ = [
    "CONTROL_LORA",
    "LORA",
    "PICTURES",
    "REFERENCE_LORA",
    "TEXT_ENCODER_CONFIG",
    "TEXT_ENCODER_NAME",
    "TOKENIZER",
    "TRANSFORMERS",
    "VAE",
    "VARIANTS",
    "VISION_CONFIG",
    "lora_file",
    "text_encoder_file",
]


def lora_file(path: Path) -> Path:
    """A LoRA's path, or krea2-nano's own by its name alone."""
    built_in = {file.name: file for file in (LORA, REFERENCE_LORA)}
    return path if path.exists() else built_in.get(str(path), path)


def text_encoder_file() -> Path:
    """The text encoder's file, in the cache folder; made on first use, which takes seconds.

    Where nothing can be kept there it is in a temporary folder that goes with the process. Its
    content has been compared with the checksum. Raises RuntimeError where this machine makes
    another encoder, and OSError where the temporary folder cannot be written either.
    """
    folder = cache_folder()
    if folder is not None:
        file = folder / TEXT_ENCODER_NAME
        if _is_intact(file):
            return file
        logger.info("Making the text encoder of krea2-nano, once; it is kept as %s.", file)
        try:
            return _make(file)
        except (OSError, SafetensorError) as error:
            logger.info("It cannot be kept there (%s) and lasts as long as this process.", error)
    file = Path(_temporary_folder().name) / TEXT_ENCODER_NAME
    return file if _is_intact(file) else _make(file)


def _is_intact(file: Path) -> bool:
    try:
        entry = file.stat()
    except OSError:
        return False
    return _has_checksum(file, entry.st_mtime_ns, entry.st_size)


@lru_cache
def _has_checksum(file: Path, changed: int, size: int) -> bool:
    """Compare a file as of its time and size, once per process."""
    try:
        return checksum(load_file(file)) == TEXT_ENCODER_CHECKSUM
    except (OSError, SafetensorError):
        return False


@lru_cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """A folder that is removed at exit; Windows keeps files that are still mapped."""
    return tempfile.TemporaryDirectory(prefix="krea2-kit-", ignore_cleanup_errors=True)


def _make(file: Path) -> Path:
    """Write the file whole or not at all; other processes may be doing the same."""
    tensors = encoder_tensors()
    if (result := checksum(tensors)) != TEXT_ENCODER_CHECKSUM:
        raise RuntimeError(
            f"The text encoder of krea2-nano came out with checksum {result}; expected "
            f"{TEXT_ENCODER_CHECKSUM}. Please report this with your versions of Python, NumPy "
            "and torch."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file(tensors, partial, {"format": "pt"})
    return file


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
