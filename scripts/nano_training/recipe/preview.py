"""The live preview of a new VAE: linear maps from latents to colours, by least squares."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from krea2_model.vae.model import QwenImageVAE

from ..loop import DEVICE
from .drawn import Chunk
from .pool import encode_pixels


def fit_preview(vae: QwenImageVAE, chunks: list[Chunk], most: int = 256) -> dict[str, Tensor]:
    """Weights and biases of the maps "cell" and "neighbours", as `nano.preview` reads them.

    From the normalised latents of pictures to the mean colours, in [-1, 1], of what a latent cell
    covers: from the cell alone, and with the eight around it.
    """
    tensors = {}
    for name, side in (("cell", 1), ("neighbours", 3)):
        cells, colours = [], []
        for chunk in chunks:
            pixels = torch.from_numpy(chunk.pictures[:most])
            latents = encode_pixels(vae, pixels).cpu()
            around = F.pad(latents, [side // 2] * 4, mode="replicate")
            cells.append(F.unfold(around, side).movedim(1, 2).flatten(0, 1))
            images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
            mean = F.avg_pool2d(images, vae.config.downscale)
            colours.append(mean.flatten(2).movedim(1, 2).flatten(0, 1))
        known = F.pad(torch.cat(cells), (0, 1), value=1.0).double().to(DEVICE)
        wanted = torch.cat(colours).double().to(DEVICE)
        # Normal equations with a touch of ridge: few pictures may not fill all directions.
        square = known.T @ known + 1e-3 * torch.eye(known.shape[1], device=DEVICE)
        solution = torch.linalg.solve(square.double(), known.T @ wanted).float().cpu()
        weight = solution[:-1].T.reshape(3, -1, side, side)
        tensors |= {f"{name}.weight": weight.contiguous(), f"{name}.bias": solution[-1].clone()}
    return tensors


def write_preview(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, {"format": "pt"})
