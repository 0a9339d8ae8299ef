"""Regions of a CONDITIONING: texts and LoRAs for parts of the image."""

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

from ...krea2_model.features.regions import region_features
from ...krea2_model.features.run_features import RunFeatures
from ...krea2_model.guidance import SigmaAt
from ...krea2_model.lora.live import LiveLora
from ...krea2_model.transformer.regions import RegionSettings, SharesAt
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

    def for_negative(self) -> "Regions | None":
        """LoRAs alone, which act on the calls of both texts; None without any."""
        if not any(region.loras for region in self.regions):
            return None
        regions = (Region(None, region.settings, region.loras) for region in self.regions)
        return Regions(tuple(regions), self.shares_at)

    def features(self, sigma_at: SigmaAt) -> RunFeatures:
        """The features of a run, the regions' texts not fused yet."""
        return region_features(
            [_text_of(region.conditioning) for region in self.regions],
            [region.loras for region in self.regions],
            [region.settings for region in self.regions],
            self.shares_at,
            sigma_at,
            for_run=_for_run,
            text_factor=self.text_factor,
            separate=self.separate,
        )


def add_regions(conditioning, regions: Regions | None):
    """A CONDITIONING with regions; as it is for None.

    Raises ValueError where it has some already.
    """
    if conditioning is None or regions is None:
        return conditioning
    if any(REGIONS in extra for _, extra in conditioning):
        raise ValueError(
            "The conditioning has regions already. Put all of them, up to eight, into one Krea 2 "
            "Regions node."
        )
    return [[states, extra | {REGIONS: regions}] for states, extra in conditioning]


def _text_of(conditioning: tuple[torch.Tensor, dict] | None) -> TextStates | None:
    if conditioning is None:
        return None
    states, extra = conditioning
    mask = extra.get("attention_mask")
    mask = None if mask is None or bool((mask > 0.5).all()) else mask > 0.5
    return TextStates(states, mask, weights_of(extra, states))


# Copies on the device, which the conditionings of a run share and which are freed with them.
_OF_RUN: WeakValueDictionary[int, LiveLora] = WeakValueDictionary()


def _for_run(lora: LiveLora) -> LiveLora:
    return _OF_RUN.setdefault(id(lora), lora.for_run())


def fused_by(fuse: Callable) -> Callable[[TextStates], TextStates]:
    """Fusion of a text, its mask and weights beside it. fuse: states and mask to fused states."""

    def fused(text: TextStates) -> TextStates:
        states = fuse(text.states, text.mask)
        mask, weights = (
            None if part is None else part.to(states.device) for part in (text.mask, text.weights)
        )
        return TextStates(states, mask, weights)

    return fused
