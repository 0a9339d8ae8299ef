"""Training examples of the transformer: latents of scenes beside the encoded captions."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.vae.model import QwenImageVAE
from krea2_training.data.cache import padded

from .loop import DEVICE, autocast
from .scenes import PICTURE_SIZES, caption, draw, random_scene, tokens_of_things
from .train_vae import to_tensor

logger = logging.getLogger(__name__)

SHARD = 2000
LENGTH_STEP = 6  # captions of a batch differ by fewer tokens than this


Example = tuple[Tensor, Tensor, Tensor]  # latents, where things are, taps


@dataclass
class Batch:
    """latents (B, 16, h, w), where things are (B, 1, h, w), taps (B, L, 12, D), mask (B, L)."""

    latents: Tensor
    things: Tensor
    taps: Tensor
    mask: Tensor


class Examples:
    """Scenes encoded once, in shards that are kept on disk; more of them as training goes on."""

    def __init__(
        self, folder: Path, encoder: Qwen3VLTextEncoder, vae: QwenImageVAE, notebook: bool = False
    ):
        self.folder = folder
        self.encoder, self.vae = encoder.to(DEVICE), vae.to(DEVICE)
        self.notebook = notebook
        self.shards = 0
        self.groups: dict[tuple, list[Example]] = defaultdict(list)
        self.empty = encoder.encode([""])[0][0].bfloat16().cpu()

    def grow(self, shards: int) -> None:
        """Have at least so many shards at hand."""
        while self.shards < shards:
            for example in self._shard(self.shards):
                latents, _, taps = example
                length = -(-len(taps) // LENGTH_STEP)
                self.groups[latents.shape[-2:], length].append(example)
            self.shards += 1
            logger.info("%d scenes", self.shards * SHARD)

    def batch(self, size: int, random: Random, empty: float = 0.1) -> Batch:
        """`size` examples of one picture size and of similar length, some without their caption."""
        groups = list(self.groups.values())
        group = random.choices(groups, weights=[len(group) for group in groups])[0]
        chosen = random.choices(group, k=size)
        taps = [self.empty if random.random() < empty else taps for *_, taps in chosen]
        latents = torch.stack([latents for latents, *_ in chosen]).float()
        things = torch.stack([things for _, things, _ in chosen]).float()
        return Batch(latents.to(DEVICE), things.to(DEVICE), *texts_of(taps))

    def _shard(self, index: int) -> list[Example]:
        path = self.folder / f"{'notebook' if self.notebook else 'scenes'}_{index}.pt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(list(self._encode(Random(f"{path.stem}"))), partial)
            partial.replace(path)
        return torch.load(path, weights_only=True)

    @torch.no_grad()
    def _encode(self, random: Random) -> Iterator[Example]:
        scenes = [random_scene(random) for _ in range(SHARD)]
        captions = [caption(scene, random) for scene in scenes]
        sizes = random.choices(list(PICTURE_SIZES), weights=PICTURE_SIZES.values(), k=SHARD)
        pictures = [
            draw(scene, *size, random, self.notebook)
            for scene, size in zip(scenes, sizes, strict=True)
        ]
        taps = encode_captions(self.encoder, captions)
        latents: dict[int, Tensor] = {}
        # Pictures of one size go through together.
        for part in _parts(sizes, 16):
            encoded = encode_pictures(self.vae, [pictures[i] for i in part])
            latents.update(zip(part, encoded.half().cpu(), strict=True))
        for index in range(SHARD):
            yield latents[index].clone(), where_things_are(pictures[index]), taps[index]


@torch.no_grad()
def encode_captions(encoder: Qwen3VLTextEncoder, captions: list[str]) -> list[Tensor]:
    """Taps (L, 12, D) in bfloat16 of each caption; captions of one length go through together."""
    lengths = [len(encoder.tokenizer.tokenize(text)) for text in captions]
    taps: dict[int, Tensor] = {}
    for part in _parts(lengths, 64):
        encoded, _ = encoder.encode([captions[i] for i in part])
        taps.update(zip(part, encoded.bfloat16().cpu(), strict=True))
    return [taps[index].clone() for index in range(len(captions))]


@torch.no_grad()
def encode_pictures(vae: QwenImageVAE, pictures: list[np.ndarray]) -> Tensor:
    """Normalised latents (B, 16, h, w) of pictures of one size."""
    images = to_tensor(pictures).to(DEVICE).contiguous(memory_format=torch.channels_last)
    with autocast():
        moments = vae.conv1(vae.encoder(images)).float()
    return vae.normalise(moments[:, : vae.config.z_dim])


def texts_of(taps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Taps of captions of several lengths as one (B, L, 12, D), and a mask (B, L)."""
    states, mask = padded(taps)
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
    return states.float().to(DEVICE), mask.to(DEVICE)


def where_things_are(picture: np.ndarray) -> Tensor:
    """Latent cells (1, h, w) bool of the tokens that `tokens_of_things` gives."""
    return torch.from_numpy(tokens_of_things(picture).repeat(2, axis=0).repeat(2, axis=1))[None]


def _parts(keys: list, most: int) -> Iterator[list[int]]:
    """Indices with equal keys together, at most so many at a time."""
    groups = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    for group in groups.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]
