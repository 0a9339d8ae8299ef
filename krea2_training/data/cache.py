"""Pictures and captions encoded once, in a folder of files named by what they hold.

A file's name is a hash of the picture or caption, its size and the model that encoded it: nothing
is ever out of date, and a changed caption is another file. Encoder and VAE are loaded only where
something is missing, one after the other, and freed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import open as open_image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from krea2_model import Krea2Transformer
from krea2_model.features.edits import RECIPES, EditRecipe, plan_edit
from krea2_model.features.prompt_embeds import PromptEmbeds
from krea2_model.images.pictures import fit, pixels_of
from krea2_model.lora.edit_family import AI_TOOLKIT, IDENTITY, REFERENCES_ONLY
from krea2_model.replacing import replacing
from krea2_model.transformer.references import Reference, ReferenceSettings

from ..engine.ahead import Kept
from ..engine.world import ALONE, World
from ..settings.sections import EDITS
from .encoders import Encoders
from .examples import Draw, Example, Order, Sized, content_hash, opened

# Family of edit LoRAs for each way to show references.
_FAMILIES = dict(zip(EDITS, (REFERENCES_ONLY, IDENTITY, AI_TOOLKIT), strict=True))


def recipe_of(references: str) -> EditRecipe:
    """How references are given, by one of `EDITS`."""
    return RECIPES[family_of(references)]


def family_of(references: str) -> str:
    """The family of edit LoRAs that is trained by one of `EDITS`."""
    return _FAMILIES[references]


@dataclass
class Batch:
    """A batch on the device: what a step trains on.

    latents (B, 16, h, w), normalised; taps (B, L, T, D) and mask (B, L) bool or None; weights
    (B, 1, h, w) of the loss, or None; references of the pictures, each with a batch of B.
    """

    latents: Tensor
    taps: Tensor
    mask: Tensor | None
    weights: Tensor | None = None
    references: Sequence[Reference] = ()
    reference_method: str = ""


@dataclass(frozen=True)
class Texts:
    """Prompts on the device: taps (B, L, T, D) and mask (B, L) bool or None."""

    taps: Tensor
    mask: Tensor | None = None

    def fuse(self, model: Krea2Transformer) -> Tensor:
        """Fused text (B, L, D)."""
        return model.fuse_text(self.taps, self.mask)

    def twice(self) -> Texts:
        """All prompts, and all again."""
        mask = None if self.mask is None else self.mask.repeat(2, 1)
        return Texts(self.taps.repeat(2, 1, 1, 1), mask)

    def repeated(self, times: int) -> Texts:
        """Each prompt so many times, one after the other."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Texts(self.taps.repeat_interleave(times, 0), mask)


# Called after each encoding with how many are made, and how many there are to make.
OnEncoding = Callable[[int, int], None]


class Cache:
    """Latents and taps of the pictures of a run.

    keep: gigabytes of what was read that stay in main memory.
    """

    def __init__(
        self, folder: Path, encoders: Encoders, references: str = EDITS[0], keep: float = 0.0
    ):
        self.folder, self.encoders = folder, encoders
        self._kept = Kept(int(keep * 1e9))
        self.recipe = recipe_of(references)
        self._hashes: dict[Path | bytes, str] = {}

    def fill(
        self,
        pictures: Sequence[Sized],
        prompts: Sequence[str] = (),
        on_encoding: OnEncoding = lambda made, of: None,
        world: World = ALONE,
        quiet: bool = False,
    ) -> int:
        """Encode what is missing of pictures and captions; returns how much that was.

        prompts: of samples, which `prompt` gives back as they were encoded. world: processes that
        share the work in one folder; each does its part. quiet: no bars.
        """
        latents = {self._picture_key(one): one for one in pictures}
        texts: dict[str, tuple[Sized | None, str]] = {}
        for one in pictures:
            for caption in {*one.example.captions, ""}:
                texts[self._text_key(one, caption)] = one, caption
        texts |= {self._prompt_key(prompt): (None, prompt) for prompt in prompts}
        # By their names, so that no process needs to know what others have already written.
        own = {key for key in (*latents, *texts) if int(key[:8], 16) % world.count == world.index}
        own = {key for key in own if not self._is_intact(key)}
        missing = {key: one for key, one in latents.items() if key in own}
        unread = {key: text for key, text in texts.items() if key in own}
        total, made, is_quiet = len(own), 0, quiet or not world.is_first

        def save(key: str, tensors: Mapping[str, Tensor]) -> None:
            nonlocal made
            self._save(key, tensors)
            made += 1
            on_encoding(made, total)

        if missing:
            vae = self.encoders.vae()
            for key, one in tqdm(missing.items(), "Pictures", unit="picture", disable=is_quiet):
                save(key, self._encode_picture(one, vae))
            del vae
        self.encoders.release()
        if unread:
            encoder = self.encoders.text()
            for key, (one, caption) in tqdm(
                unread.items(), "Captions", unit="caption", disable=is_quiet
            ):
                save(key, self._encode_text(one, caption, encoder))
            del encoder
        self.encoders.release()
        return total

    def batch(self, draws: Sequence[Draw], order: Order, device: torch.device) -> Batch:
        """A batch of the order's, from the files."""
        pictures = [order.pictures[draw.index] for draw in draws]
        tensors = [self._read(self._picture_key(one)) for one in pictures]
        taps = [
            self._read(self._text_key(one, draw.caption or ""))["taps"]
            for one, draw in zip(pictures, draws, strict=True)
        ]
        states, mask = padded(taps)
        latents = torch.stack([one["latents"] for one in tensors]).to(device)
        weights = None
        if any("weights" in one for one in tensors):
            ones = torch.ones(1, *latents.shape[2:])
            weights = torch.stack([one.get("weights", ones) for one in tensors]).to(device)
        references = []
        for number in range(len(pictures[0].example.references)):
            images = [one[f"reference {number}"] for one in tensors]
            offset = tuple(tensors[0][f"offset {number}"].tolist())
            same = all(image.shape == images[0].shape for image in images)
            if not same:
                images = _cropped(images)
            settings = ReferenceSettings(offset=offset)  # type: ignore[arg-type]
            references.append(Reference(torch.stack(images).to(device), settings))
        return Batch(
            latents,
            states.to(device),
            None if mask is None else mask.to(device),
            weights,
            references,
            self.recipe.method,
        )

    def _encode_picture(self, one: Sized, vae: Any) -> dict[str, Tensor]:
        pixels = _pixels(one.example, one.example.image, one.width, one.height)
        tensors = {"latents": self._latents(pixels, vae)}
        if one.example.mask is not None:
            mask = _pixels(one.example, one.example.mask, one.width, one.height).mean(0)
            cells = F.interpolate(mask[None, None], tensors["latents"].shape[1:], mode="area")
            tensors["weights"] = cells[0]
        for number, (image, settings) in enumerate(self._plan(one).references):
            tensors[f"reference {number}"] = self._latents(image, vae)
            tensors[f"offset {number}"] = torch.tensor(settings.offset)
        return tensors

    def _latents(self, pixels: Tensor, vae: Any) -> Tensor:
        return self.encoders.latents(vae, pixels).float().cpu()

    def prompt(self, prompt: str) -> PromptEmbeds:
        """A sample's prompt, of those that `fill` was given."""
        return PromptEmbeds(self._read(self._prompt_key(prompt))["taps"][None])

    def latents(self, pictures: Sequence[Sized], device: torch.device) -> Tensor:
        """Latents (B, 16, h, w) of pictures of one size, of those that `fill` was given."""
        found = [self._read(self._picture_key(one))["latents"] for one in pictures]
        return torch.stack(found).to(device)

    def texts(self, prompts: Sequence[str], device: torch.device) -> Texts:
        """Prompts, of those that `fill` was given, as a batch."""
        taps, mask = padded([self._read(self._prompt_key(prompt))["taps"] for prompt in prompts])
        return Texts(taps.to(device), None if mask is None else mask.to(device))

    def _encode_text(self, one: Sized | None, caption: str, encoder: Any) -> dict[str, Tensor]:
        if one is None:
            return {"taps": self.encoders.taps(encoder, caption)}
        images = self._plan(one).prompt_images if self._reads_images else []
        taps = self.encoders.taps(encoder, caption, images, self.recipe.labels)
        return {"taps": taps.to("cpu", torch.bfloat16)}

    @property
    def _reads_images(self) -> bool:
        return self.recipe.encoder_side is not None

    def _plan(self, one: Sized):
        """References and images for the encoder, as a run of the LoRA's family gives them."""
        images = [pixels_of(_image(source), "a reference") for source in one.example.references]
        if not images:
            return _NO_PLAN
        return plan_edit(images, self.recipe, one.width, one.height)

    def _picture_key(self, one: Sized) -> str:
        example = one.example
        parts = {
            "picture": self.hash_of(example.image),
            "crop": example.crop,
            "size": (one.width, one.height),
            "mask": None if example.mask is None else self.hash_of(example.mask),
            "references": [self.hash_of(source) for source in example.references],
            "recipe": str(self.recipe) if example.references else None,
            "vae": self.encoders.name("vae"),
        }
        return _key(parts)

    def _text_key(self, one: Sized, caption: str) -> str:
        images = one.example.references if self._reads_images else ()
        parts = {
            "caption": caption,
            "images": [self.hash_of(source) for source in images],
            # The pictures' sizes for the encoder depend on the recipe alone.
            "recipe": str(self.recipe) if images else None,
            "text encoder": self.encoders.name("text"),
        }
        return _key(parts)

    def _prompt_key(self, prompt: str) -> str:
        return _key({"prompt": prompt, "text encoder": self.encoders.name("text")})

    def hash_of(self, source: Path | bytes) -> str:
        """`content_hash`, computed once a file."""
        if source not in self._hashes:
            self._hashes[source] = content_hash(source)
        return self._hashes[source]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def _is_intact(self, key: str) -> bool:
        """True if there is a file of a key, whose header fits its size; reads no tensors."""
        try:
            with safe_open(self._path(key), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def _read(self, key: str) -> dict[str, Tensor]:
        return self._kept.get(key, self._load)

    def _load(self, key: str) -> dict[str, Tensor]:
        try:
            return load_file(self._path(key))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self._path(key)} is gone or damaged since the run began. Start the command "
                "again: it encodes what is missing and resumes."
            ) from error

    def _save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial)


@dataclass(frozen=True)
class _NoPlan:
    prompt_images: tuple = ()
    references: tuple = ()


_NO_PLAN = _NoPlan()


def padded(taps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Taps (L_i, T, D) as one (B, L, T, D), and its mask (B, L), None where all are as long."""
    lengths = [len(states) for states in taps]
    longest = max(lengths)
    states = taps[0].new_zeros(len(taps), longest, *taps[0].shape[1:])
    for row, own in zip(states, taps, strict=True):
        row[: len(own)] = own
    if min(lengths) == longest:
        return states, None
    return states, torch.arange(longest) < torch.tensor(lengths)[:, None]


def _pixels(example: Example, source: Path | bytes, width: int, height: int) -> Tensor:
    """A picture (3, H, W) in [0, 1] at its training size."""
    pixels = pixels_of(_image(source), example.name)
    if example.crop is not None:
        left, top, across, down = example.crop
        pixels = pixels[:, top : top + down, left : left + across]
    return fit(pixels, width, height)


def _image(source: Path | bytes):
    return open_image(opened(source))


def _cropped(images: Sequence[Tensor]) -> list[Tensor]:
    """Latents cut in their middle to the sides of the smallest, so that they make a batch."""
    rows, columns = (min(image.shape[axis] for image in images) for axis in (1, 2))
    parts = []
    for image in images:
        top, left = (image.shape[1] - rows) // 2, (image.shape[2] - columns) // 2
        parts.append(image[:, top : top + rows, left : left + columns])
    return parts


def _key(parts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
