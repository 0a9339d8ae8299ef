"""Encoded prompts that a pipeline keeps from one run to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from ..features.prompt_embeds import PromptEmbeds


class KeptTexts:
    """The last `count` encodings, in main memory: 12 MB for 200 tokens of the released models."""

    def __init__(self, count: int):
        self._count = count
        self._kept: OrderedDict[Hashable, tuple[PromptEmbeds, torch.device]] = OrderedDict()

    def get(self, key: Hashable, encode: Callable[[], PromptEmbeds]) -> PromptEmbeds:
        """The encoding of a key; `encode` is called where it is not kept."""
        if key not in self._kept:
            found = encode()
            self._kept[key] = replace(found, taps=found.taps.cpu()), found.taps.device
            if len(self._kept) > self._count:
                self._kept.popitem(last=False)
            return found
        self._kept.move_to_end(key)
        kept, device = self._kept[key]
        return replace(kept, taps=kept.taps.to(device))
