"""Live preview of krea2-nano: latents to colours, by a linear map.

Made by `scripts/fit_nano_preview.py`: nano has a VAE of its own, so the factors for the released
one show other colours.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..config import TransformerConfig

FILE = Path(__file__).parent / "krea2_nano_preview.safetensors"

# The sizes of nano's transformers, by which copies and converted files are known as well.
TRANSFORMER_CONFIG = TransformerConfig(
    num_layers=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=768,
    text_hidden_dim=160,
    text_intermediate_size=512,
)


def cell_colours() -> tuple[Tensor, Tensor]:
    """Factors (16, 3) and bias (3,) from one latent cell, normalised, to a colour in [-1, 1].

    Roughly right: 28 of 255 off on average.
    """
    maps = _maps()
    return maps["cell.weight"][:, :, 0, 0].T, maps["cell.bias"]


def colours(latents: Tensor) -> Tensor:
    """Normalised latents (B, 16, h, w) as pictures (B, 3, h, w), about in [-1, 1].

    From each cell and its neighbours, which the VAE's convolutions look at: 8 of 255 off.
    """
    maps = {name: tensor.to(latents.device) for name, tensor in _maps().items()}
    around = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(around, maps["neighbours.weight"], maps["neighbours.bias"])


def as_factors_read(latents: Tensor) -> Tensor:
    """Latents (B, 16, h, w) or (B, 16, 1, h, w) that the factors map to these better colours.

    For previews that take factors and a way to reshape what they multiply.
    """
    flat = latents[:, :, 0] if latents.ndim == 5 else latents
    factors, bias = (part.to(flat.device) for part in cell_colours())
    targets = colours(flat).movedim(1, -1) - bias
    return (targets @ factors.pinverse()).movedim(-1, 1).to(latents.dtype).reshape(latents.shape)


@cache
def _maps() -> dict[str, Tensor]:
    # Nodes run in inference mode, whose tensors cannot be used outside of it.
    with torch.inference_mode(False):
        return load_file(FILE)
