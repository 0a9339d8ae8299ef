"""The text encoder and the VAE of a run, loaded where they are needed."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krea2_model import TransformerConfig, load_text_encoder, load_vae, nano
from krea2_model.checkpoints.checkpoint import open_checkpoint
from krea2_model.checkpoints.text_encoder import find_tokenizer, read_text_encoder
from krea2_model.checkpoints.vae import read_vae
from krea2_model.features.prompt_embeds import encode_prompts
from krea2_model.memory.machine import empty_cache
from krea2_model.text.prompt_images import PromptImage
from krea2_model.text.tokenizer import Krea2Tokenizer

from ..settings.sections import NANO, Model


@contextmanager
def _named(setting: str, value: Path | None) -> Iterator[None]:
    """Errors of a file, after the setting that names it."""
    try:
        yield
    except ValueError as error:
        given = f"is {value}" if value else "is not set, and model.transformer does not hold it"
        raise ValueError(f"{setting} {given}. {error}") from error


class Encoders:
    """Text encoder and VAE of a run, loaded when they are first needed.

    A host with encoders of its own overrides all that is public here.
    """

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None):
        self.model, self.device, self.dtype = model, device, dtype
        is_nano, whole = model.transformer == NANO, Path(str(model.transformer))
        self.text_path = model.text_encoder or (nano.text_encoder_file() if is_nano else whole)
        self.vae_path = model.vae or (nano.VAE if is_nano else whole)
        self._names: dict[str, str] = {}

    def check(self, sizes: TransformerConfig) -> None:
        """Raise ValueError for files of another model than one of these sizes, by their headers."""
        with _named("model.text_encoder", self.model.text_encoder):
            encoder = read_text_encoder(open_checkpoint(self.text_path, "text_encoder"))
        with _named("model.vae", self.model.vae):
            read_vae(open_checkpoint(self.vae_path, "vae"))
        with _named("model.tokenizer", self.model.tokenizer):
            find_tokenizer(Path(self.text_path), self.model.tokenizer)
        width, expected = encoder.config.hidden_size, sizes.text_hidden_dim
        if width != expected:
            raise ValueError(
                f"{self.text_path} is a text encoder of width {width}; this transformer needs "
                f"{expected}. Name the encoder that belongs to it (Qwen3-VL-4B for Krea 2)."
            )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, which the encoder need not be loaded for."""
        folder = find_tokenizer(Path(self.text_path), self.model.tokenizer)
        return Krea2Tokenizer(folder).count(text)

    def text(self) -> Any:
        """The text encoder, for `taps`."""
        return load_text_encoder(
            self.text_path,
            tokenizer=self.model.tokenizer,
            device=self.device,
            dtype=self.dtype,
            keep_quantised=True,
        )

    def vae(self) -> Any:
        """The VAE, for `latents`."""
        return load_vae(self.vae_path, device=self.device, dtype=self.dtype)

    def taps(
        self, encoder: Any, prompt: str, images: Sequence[PromptImage] = (), labels: bool = True
    ) -> Tensor:
        """Taps (L, T, D) of a prompt."""
        return encode_prompts(encoder, [prompt], images=images, labels=labels).taps[0]

    @torch.no_grad()
    def latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """Normalised latents (16, h, w) of a picture (3, H, W) in [0, 1]."""
        weight = next(vae.parameters())
        return vae.encode(pixels[None].to(weight) * 2 - 1)[0]

    def release(self) -> None:
        """Free the memory of what was encoded with last."""
        gc.collect()
        empty_cache(self.device)

    def name(self, part: str) -> str:
        """A hash that tells one model file from another."""
        if part not in self._names:
            path = Path(self.text_path if part == "text" else self.vae_path)
            self._names[part] = f"{file_fingerprint(path)} {self.dtype}"
        return self._names[part]


def file_fingerprint(path: Path) -> str:
    """A hash of a file's size and of parts spread over it; of a folder, those of its files."""
    total = hashlib.sha256()
    files: Iterable[Path] = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name if path.is_dir() else ''} {size}".encode())
        with file.open("rb") as opened_file:
            for start in range(0, size, max(1, size // 64)):
                opened_file.seek(start)
                total.update(opened_file.read(4096))
    return total.hexdigest()
