"""Regions of a CONDITIONING: texts and LoRAs for parts of the image."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch

from ...krea2_model.guidance import SigmaAt
from ...krea2_model.lora.in_run import RunLora
from ...krea2_model.lora.live import LiveLora, live_loras_of_text
from ...krea2_model.run_features import RunFeatures
from ...krea2_model.transformer.regions import RegionPlan, RegionSettings, SharesAt
from ...krea2_model.transformer.text_attention import TextStates
from .conditions import weights_of

# Key of `Regions` in a CONDITIONING.
REGIONS = "krea2_regions"


@dataclass(frozen=True)
class Region:
    """A region of a CONDITIONING.

    conditioning: encoder states (1, L, T * D) and options of its text, or None for LoRAs alone.
    loras: with their strengths.
    """

    conditioning: tuple[torch.Tensor, dict] | None
    settings: RegionSettings = field(default_factory=RegionSettings)
    loras: tuple[tuple[LiveLora, float], ...] = ()


@dataclass(frozen=True)
class Regions:
    """All regions of a CONDITIONING.

    shares_at: their shares in image tokens. text_factor, separate: see `RegionPlan`.
    """

    regions: tuple[Region, ...]
    shares_at: SharesAt
    text_factor: float = 1.0
    separate: float = 0.0

    def for_negative(self) -> "Regions":
        """LoRAs alone, which act on the calls of both texts."""
        regions = (Region(None, region.settings, region.loras) for region in self.regions)
        return Regions(tuple(regions), self.shares_at)

    def features(self, sigma_at: SigmaAt) -> RunFeatures:
        """The features of a run, the regions' texts not fused yet."""
        return RunFeatures(self._plan(sigma_at), self._loras(sigma_at))

    def _plan(self, sigma_at) -> RegionPlan | None:
        texts = []
        for region in self.regions:
            if region.conditioning is None:
                return None
            states, extra = region.conditioning
            mask = extra.get("attention_mask")
            mask = None if mask is None or bool((mask > 0.5).all()) else mask > 0.5
            texts.append(TextStates(states, mask, weights_of(extra, states)))
        settings = [region.settings for region in self.regions]
        options = {"text_factor": self.text_factor, "separate": self.separate}
        return RegionPlan(texts, settings, self.shares_at, sigma_at, **options)

    def _loras(self, sigma_at) -> tuple[RunLora, ...]:
        def share_at(number: int):
            return lambda rows, columns: self.shares_at(rows, columns)[number]

        return tuple(
            RunLora(
                _for_run(lora), strength, region.settings.window(sigma_at), share_at(number), number
            )
            for number, region in enumerate(self.regions)
            for lora, strength in region.loras
        )


# Copies on the device, which the conditionings of a run share and which are freed with them.
_OF_RUN: WeakValueDictionary[int, LiveLora] = WeakValueDictionary()


def _for_run(lora: LiveLora) -> LiveLora:
    return _OF_RUN.setdefault(id(lora), lora.for_run())


def fuse_regions(features: RunFeatures, transformer, fuse: Callable) -> RunFeatures:
    """The features with fused texts of regions. fuse: states and mask to fused states."""
    if features.regions is None:
        return features
    texts = []
    for number, text in enumerate(features.regions.texts):
        with live_loras_of_text(transformer, features.uses_on_text(number)):
            states = fuse(text.states, text.mask)
        mask, weights = (
            None if part is None else part.to(states.device) for part in (text.mask, text.weights)
        )
        texts.append(TextStates(states, mask, weights))
    return replace(features, regions=features.regions.with_texts(texts))
