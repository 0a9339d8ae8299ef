"""Training data on the device: pixels for the VAE, latents with encoded captions for the others."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.text.tokenizer import PREFIX_TOKENS
from krea2_model.vae.model import QwenImageVAE

from ..examples import LENGTH_STEP, Batch, texts_of
from ..loop import DEVICE, autocast
from .drawn import Artists, Chunk

ENCODE_PIXELS = 2**21  # of pictures that the VAE encodes at a time: 32 of 256 px
ENCODE_CAPTIONS = 128


class Pixels:
    """Pictures as uint8 on the device, from which the VAE gets its crops."""

    def __init__(self):
        self.chunks: list[Tensor] = []  # (N, 3, H, W)

    def add(self, chunk: Chunk) -> None:
        pixels = torch.from_numpy(chunk.pictures).to(DEVICE)
        self.chunks.append(pixels.permute(0, 3, 1, 2).contiguous())

    def batch(self, side: int, count: int, random: Random) -> Tensor:
        """Crops (count, 3, side, side) in [-1, 1] of random places, half of them mirrored."""
        # Early on there may be small pictures only.
        side = min(side, max(min(chunk.shape[-2:]) for chunk in self.chunks))
        chunk = random.choice([c for c in self.chunks if min(c.shape[-2:]) >= side])
        height, width = chunk.shape[-2:]
        generator = torch.Generator().manual_seed(random.getrandbits(62))

        def places(most: int) -> Tensor:
            return torch.randint(most, (count, 1), generator=generator)

        picture = places(len(chunk))
        rows = places(height - side + 1) + torch.arange(side)
        columns = places(width - side + 1) + torch.arange(side)
        columns = torch.where(places(2) == 0, columns, columns.flip(1))
        picture, rows, columns = (index.to(DEVICE) for index in (picture, rows, columns))
        crops = chunk[picture[:, :, None], :, rows[:, :, None], columns[:, None, :]]
        return crops.permute(0, 3, 1, 2).float() / 127.5 - 1


class EncodedPool:
    """Latents and taps of drawn pictures; `grow` adds what the workers have ready.

    Batches hold one picture size and captions of similar length, as `Examples` makes them.
    """

    def __init__(self, artists: Artists, encoder: Qwen3VLTextEncoder, vae: QwenImageVAE):
        self.artists = artists
        self.encoder, self.vae = encoder.to(DEVICE), vae.to(DEVICE)
        self.groups: dict[tuple, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        self.size = 0
        self.empty = encode_captions(self.encoder, [""])[0]

    def grow(self, kinds: tuple[str, ...], wait: bool = False) -> bool:
        """Encode one more chunk of each queue that has one ready; False where all are encoded."""
        for kind in kinds:
            chunk = self.artists.take(kind, wait)
            if chunk is not None:
                self.add(chunk)
        return any(self.artists.waiting(kind) for kind in kinds)

    def add(self, chunk: Chunk) -> None:
        taps = encode_captions(self.encoder, chunk.captions)
        latents = encode_pixels(self.vae, torch.from_numpy(chunk.pictures)).half()
        details = _cells(chunk)
        for index, states in enumerate(taps):
            length = -(-len(states) // LENGTH_STEP)
            key = latents.shape[-2:], length
            self.groups[key].append((latents[index], details[index], states))
        self.size += len(taps)

    def batch(self, tokens: int, random: Random, empty: float = 0.1) -> Batch:
        """About as many examples as have `tokens` image tokens together, some without caption."""
        groups = list(self.groups.values())
        group = random.choices(groups, weights=[len(group) for group in groups])[0]
        height, width = group[0][0].shape[-2:]
        chosen = random.choices(group, k=max(1, tokens * 4 // (height * width)))
        taps = [self.empty if random.random() < empty else taps for *_, taps in chosen]
        latents = torch.stack([latents for latents, *_ in chosen]).float()
        things = torch.stack([things for _, things, _ in chosen]).float()
        return Batch(latents, things, *texts_of(taps))


class ReferenceBatch:
    """A chunk of pictures with references, encoded: batches come out of one chunk."""

    def __init__(self, chunk: Chunk, encoder: Qwen3VLTextEncoder, vae: QwenImageVAE):
        self.taps = encode_captions(encoder, chunk.captions)
        self.latents = encode_pixels(vae, torch.from_numpy(chunk.pictures))
        self.details = _cells(chunk)
        self.references = [encode_pixels(vae, torch.from_numpy(r)) for r in chunk.references]

    def batch(self, size: int, random: Random) -> tuple[Batch, list[Tensor]]:
        chosen = random.sample(range(len(self.taps)), min(size, len(self.taps)))
        batch = Batch(
            self.latents[chosen],
            self.details[chosen].float(),
            *texts_of([self.taps[index] for index in chosen]),
        )
        return batch, [reference[chosen] for reference in self.references]


@torch.no_grad()
def encode_captions(encoder: Qwen3VLTextEncoder, captions: list[str]) -> list[Tensor]:
    """Taps (L, 12, D) in bfloat16 of each caption, on the device.

    Many at a time: in a causal model padding at the end changes nothing before it. That is 50 times
    as fast on a GPU as `encoder.encode`, which runs each prompt alone.
    """
    ids = [encoder.tokenizer.tokenize(text) for text in captions]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    taps: dict[int, Tensor] = {}
    for start in range(0, len(order), ENCODE_CAPTIONS):
        part = order[start : start + ENCODE_CAPTIONS]
        longest = len(ids[part[-1]])
        rows = [ids[index] + ids[index][-1:] * (longest - len(ids[index])) for index in part]
        states = encoder(torch.tensor(rows, device=DEVICE)).bfloat16()
        for row, index in enumerate(part):
            # A copy, since a slice would hold the memory of the padding.
            taps[index] = states[row, PREFIX_TOKENS : len(ids[index])].clone()
    return [taps[index] for index in range(len(captions))]


@torch.no_grad()
def encode_pixels(vae: QwenImageVAE, pixels: Tensor) -> Tensor:
    """Normalised latents (N, 16, h, w) float32 of pictures (N, H, W, 3) uint8."""
    part = max(1, ENCODE_PIXELS // (pixels.shape[1] * pixels.shape[2]))
    latents = []
    for piece in pixels.split(part):
        images = piece.to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast():
            moments = vae.conv1(vae.encoder(images.contiguous(memory_format=torch.channels_last)))
        latents.append(vae.normalise(moments.float()[:, : vae.config.z_dim]))
    return torch.cat(latents)


def _cells(chunk: Chunk) -> Tensor:
    """Where details are, by latent cell: (N, 1, H/8, W/8) bool on the device."""
    tokens = torch.from_numpy(chunk.details)[:, None].to(DEVICE)
    return F.interpolate(tokens.half(), scale_factor=2, mode="nearest").bool()
