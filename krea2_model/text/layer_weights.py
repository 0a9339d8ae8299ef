"""The mix of the encoder layers that a prompt is made of.

Of each token Krea 2 reads twelve layers of its text encoder. Scaling some of them shifts what the
text fusion hears most of; a token that grew as a whole would only leave the range that the model
was trained on (artifacts, then black images), so each token keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import numbers


def check_layer_weights(weights: Sequence[float], count: int) -> list[float]:
    """The weights of so many taps. Raises ValueError unless they are finite and not all 0."""
    expected = f"{count} numbers, not all of them 0"
    values = numbers("layer_weights", weights, expected)
    if len(values) != count or not all(map(math.isfinite, values)) or not any(values):
        raise ValueError(f"The weights of the taps are {values}; expected {expected}.")
    return values


def weigh_taps(taps: Tensor, weights: Sequence[float]) -> Tensor:
    """Taps (B, L, T, D) times one weight per tap, every token brought back to the RMS it had.

    Equal weights change nothing, and `taps` itself comes back.
    Raises ValueError as `check_layer_weights`.
    """
    values = check_layer_weights(weights, taps.shape[2])
    if len(set(values)) == 1 and values[0] > 0:
        return taps
    original = taps.float()
    mixed = original * torch.tensor(values, device=taps.device)[:, None]
    old, new = (states.square().mean(dim=(2, 3), keepdim=True) for states in (original, mixed))
    # Padding is 0 and stays so.
    scale = (old / torch.where(new > 0, new, 1.0)).sqrt()
    return (mixed * scale).to(taps.dtype)
