"""The VAE of both kinds of pictures, at 64 to 256 px, and how well it keeps them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_model.vae.model import QwenImageVAE
from krea2_training.engine.rates import Rates

from ..loop import DEVICE, Stage, autocast
from ..scenes import ruled_paper
from ..train_vae import CONFIG, NOISE, VAETraining
from .plan import Plan
from .pool import Pixels

RATE = 1.5e-3
# Small crops first: a second holds more of them. Whole pictures at the end.
SIDES = ((0.6, 64), (0.85, 128), (1.0, 256))
EDGES = 0.5  # weight of the differences between neighbouring pixels, where thin lines are


def side_of(share: float) -> int:
    """The side of the crops when so much of the run is done."""
    return next(side for end, side in SIDES if share <= end)


def vae_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Errors of colours and of edges, images (B, 3, H, W) in [-1, 1]."""
    loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
    for axis in (-1, -2):
        loss = loss + EDGES * F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))
    return loss


def train_vae(folder: Path, pixels: Pixels, refill, rates: Rates, plan: Plan) -> QwenImageVAE:
    """Train until the rates end. refill: called before each step, to add new pictures."""
    torch.manual_seed(0)
    model = VAETraining()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0, fused=DEVICE.type == "cuda"
    )
    between = plan.save_every
    stage = Stage("vae", folder, model, [optimiser], rates, seconds_between_saves=between)

    def loss_of_step(step: int) -> Tensor:
        refill(step)
        random = Random(f"vae {step}")
        side = side_of(1 - rates.left(step))
        images = pixels.batch(side, max(1, plan.vae_pixels // side**2), random)
        images = images.contiguous(memory_format=torch.channels_last)
        strength = NOISE * torch.rand(len(images), 1, 1, 1, device=DEVICE)
        cells = (images.shape[-2] // 8, images.shape[-1] // 8)  # Early on crops may be smaller.
        noise = torch.randn(len(images), CONFIG.z_dim, *cells, device=DEVICE)
        with autocast():
            decoded = model(images, strength * noise)
        return vae_loss(decoded.float(), images)

    stage.train(loss_of_step)
    model.load_state_dict(stage.averaged_state())
    return model.cpu().finished()


@torch.no_grad()
def vae_report(vae: QwenImageVAE, pictures: dict[str, Tensor]) -> dict[str, float]:
    """Mean errors (of 255) by kind of picture, and the share of the contrast that thin lines keep.

    pictures: (N, 3, H, W) in [-1, 1] by name; they are compared in parts of eight.
    """
    report = {}
    for name, images in pictures.items():
        errors = [
            (vae.decode(vae.encode(part.to(DEVICE))).clamp(-1, 1) - part.to(DEVICE)).abs().mean()
            for part in images.split(8)
        ]
        report[f"error, {name}"] = round(float(torch.stack(errors).mean()) * 127.5, 2)
    paper = torch.from_numpy(ruled_paper(128, 128)).permute(2, 0, 1)[None].to(DEVICE) * 2 - 1
    decoded = vae.decode(vae.encode(paper))
    rows, wanted = (image[0, 0].mean(dim=1) for image in (decoded, paper))
    lines = wanted < wanted.max() - 0.2
    kept = (rows[~lines].mean() - rows[lines].mean()) / (wanted.max() - wanted.min())
    return report | {"contrast of lines of 2 px": round(float(kept), 3)}
