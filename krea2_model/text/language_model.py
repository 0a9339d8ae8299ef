"""The whole language model, for writing text: last layer, final norm, head, KV cache.

Krea 2 taps no layer behind 34, so `Qwen3VLTextEncoder` ends there. Writing text takes the layers
after it as well: `LanguageTail`, a small part that is loaded from the same file when it is first
needed. The encoder's layers are shared, never held twice. The head of
Qwen3-VL-4B is its embedding table; a file with a head of its own has that one used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TextEncoderConfig
from ..nn.attention import Attend, attend
from ..nn.layers import TorchLayers
from .decoder import CausalMask, DecoderLayer, rotation_of, rotation_table
from .encoder import Qwen3VLTextEncoder, place_images
from .prompt_images import IMAGE_PAD, axis_positions
from .vision import ImageTokens

# (embedding, hidden (B, 1, D)) to logits (B, 1, V) by the embedding's table.
Head = Callable[[nn.Embedding, Tensor], Tensor]

# Tokens by which a cache grows.
_GROWTH = 256


class LanguageTail(nn.Module):
    """The decoder layers after the encoder's, the final norm, and a head where a file has one.

    indices: numbers of those layers in the whole model; names of weights are the checkpoint's.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        indices: range,
        has_head: bool = False,
        layers=TorchLayers,
        device=None,
        dtype: torch.dtype | None = None,
        attend: Attend = attend,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleDict(
            {str(index): DecoderLayer(config, layers, attend, **factory) for index in indices}
        )
        self.norm = layers.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
        self.lm_head = None
        if has_head:
            self.lm_head = layers.Linear(
                config.hidden_size, config.vocab_size, bias=False, **factory
            )


class KeyValueCache:
    """Keys and values of the tokens so far, a pair a layer."""

    def __init__(self):
        self.length = 0
        # The next position less `length`: negative behind images.
        self.ahead = 0
        self._layers: dict[int, Tensor] = {}  # (2, B, KV, capacity, D)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, KV, L, D) of a layer; returns all of that layer.

        The caller raises `length` once every layer has them.
        """
        end = self.length + key.shape[2]
        cached = self._layers.get(layer)
        if cached is None or cached.shape[3] < end:
            capacity = -(-end // _GROWTH) * _GROWTH
            grown = key.new_empty(2, *key.shape[:2], capacity, key.shape[3])
            if cached is not None:
                grown[..., : self.length, :] = cached[..., : self.length, :]
            self._layers[layer] = cached = grown
        cached[0, :, :, self.length : end] = key
        cached[1, :, :, self.length : end] = value
        return cached[0, :, :, :end], cached[1, :, :, :end]


def tied_head(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    """Logits of hidden states by the embedding table."""
    return F.linear(hidden, embedding.weight)


class LanguageModel:
    """The language model of an encoder and its tail.

    head: computes logits by the embedding table; a host passes its own for weights it manages.
    device: where to calculate; None is where the embedding is at each call.
    dtype: of hidden states; None is what the embedding gives.
    images: those in the prompt, which has a pad for each of their tokens.
    """

    def __init__(
        self,
        encoder: Qwen3VLTextEncoder,
        tail: LanguageTail,
        *,
        head: Head = tied_head,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        images: Sequence[ImageTokens] = (),
    ):
        self.config = encoder.config
        self._images = images
        self._device = device
        self._embedding, self._tail = encoder.embed_tokens, tail
        self._head, self._dtype = head, dtype
        self._layers: list[nn.Module] = [*encoder.layers, *tail.layers.values()]

    @property
    def device(self) -> torch.device:
        return self._device or self._embedding.weight.device

    @torch.no_grad()
    def __call__(self, tokens: list[int], cache: KeyValueCache) -> Tensor:
        """Logits (V,) in float32 for what follows `tokens`, which follow those of the cache."""
        start, end = cache.length, cache.length + len(tokens)
        hidden = self._embedding(torch.tensor([tokens], device=self.device))
        if self._dtype is not None:
            hidden = hidden.to(self._dtype)
        deepstack: list[Tensor] = []
        if self._images and start == 0:
            places = torch.tensor([tokens], device=self.device) == IMAGE_PAD
            positions = axis_positions(tokens, [image.grid for image in self._images])
            cache.ahead = int(positions.max()) + 1 - end
            hidden, deepstack = place_images(hidden, places, self._images)
            rotation = rotation_of(positions, self.config, self.device)
        else:
            ahead = cache.ahead
            rotation = rotation_table(end + ahead, self.config, self.device, start + ahead)
        rotation = rotation[:, None, None]
        # One token attends to the whole cache, and needs no mask.
        mask = None if len(tokens) == 1 else CausalMask(end, self.device, start=start)
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden, rotation, mask, partial(cache.extend, index))
            if index < len(deepstack):
                hidden = hidden + deepstack[index]
        cache.length = end
        hidden = self._tail.norm(hidden[:, -1:])
        if self._tail.lm_head is not None:
            return self._tail.lm_head(hidden)[0, -1].float()
        return self._head(self._embedding, hidden)[0, -1].float()
