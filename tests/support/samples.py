"""Random inputs of tests, the same at each call, and files of tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, others for another shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Noise (3, H, W) in [0, 1], as krea2_model takes images."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def image(
    height: int = 64, width: int = 96, seed: int = 0, channels: int = 3, batch: int = 1
) -> Tensor:
    """Noise (B, H, W, C) in [0, 1], as ComfyUI's nodes take images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, height, width, channels, generator=generator)


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file; its path."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
