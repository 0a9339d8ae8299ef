"""Style pictures of a MODEL, and what they become in a run."""

from dataclasses import dataclass, field

import torch

from ...krea2_model.features.style_transfer import (
    Inversions,
    StylePictures,
    StyleRun,
    StyleSettings,
)
from ...krea2_model.guidance import SigmaAt
from ...krea2_model.lora.in_run import ShareAt
from ...krea2_model.transformer.patches import token_count
from ...krea2_model.transformer.text_attention import TextStates
from .backend import OVERRIDE

# Key of `Styles` in a MODEL's transformer_options.
STYLES = "krea2_styles"


@dataclass(frozen=True)
class Styles:
    """Style pictures of a MODEL.

    latents: of each, as the VAE gives them. shares: of each, see `style_shares`.
    text: encoder states (1, L, T * D) for their passes, or None for no text.
    inversions: of the last run, which the next one may use again.
    """

    settings: StyleSettings
    latents: tuple[torch.Tensor, ...]
    shares: tuple[float, ...]
    share_at: ShareAt | None = None
    text: torch.Tensor | None = None
    inversions: Inversions = field(default_factory=Inversions)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each picture."""
        return [token_count(own) for own in self.latents]

    def run(self, model, text: TextStates, sigma_at: SigmaAt, key: object) -> StyleRun:
        """The pictures in a run of a model object. text: of their passes. key: see `StyleRun`."""
        latents = [single_frame(model.process_latent_in(own)).float() for own in self.latents]
        pictures = StylePictures(latents, self.shares, self.share_at, self.inversions)
        return StyleRun(self.settings, pictures, text, sigma_at, key)


def single_frame(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) of (B, C, 1, h, w) or (B, C, h, w)."""
    return latents[:, :, 0] if latents.ndim == 5 else latents


def styles_of(patcher) -> Styles | None:
    """The style pictures of a MODEL, None without any."""
    options = getattr(patcher, "model_options", {})
    return options.get("transformer_options", {}).get(STYLES)


def may_share_inversions(patcher) -> bool:
    """True if a pass of a style picture depends on weights and text alone, and on no other node."""
    options = patcher.model_options.get("transformer_options", {})
    return not any(options.get(key) for key in ("patches", "patches_replace", OVERRIDE))
