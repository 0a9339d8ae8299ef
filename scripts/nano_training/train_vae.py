"""The VAE of krea2-nano: a Qwen-Image VAE of small base width, for flat colours and sharp edges."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_model.config import VAEConfig
from krea2_model.vae.model import QwenImageVAE
from krea2_training.engine.rates import Rates

from .loop import DEVICE, Stage, autocast
from .practice import practice_picture

CONFIG = VAEConfig(base_dim=16)
STEPS = 8000
LARGE_PICTURES_FROM = 0.85  # of the steps; before, small ones, of which a second holds more
NOISE = 0.12  # at most, in units of the latents' deviation


class VAETraining(nn.Module):
    """The VAE with its latents normalised on the way, so that they fit any fixed statistics."""

    def __init__(self, config: VAEConfig = CONFIG):
        super().__init__()
        self.vae = QwenImageVAE(config).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(config.z_dim, affine=False, momentum=0.01)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        # What is added to a residual stream begins small.
        for module in self.modules():
            if hasattr(module, "residual"):
                module.residual[-1].weight.data.mul_(0.2)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, H, W) encoded, normalised, disturbed by `noise` and decoded."""
        config, vae = self.vae.config, self.vae
        means = vae.conv1(vae.encoder(images))[:, : config.z_dim]
        latents = vae.denormalise(self.norm(means.float()) + noise)
        return vae.decoder(vae.conv2(latents))

    @torch.no_grad()
    def finished(self) -> QwenImageVAE:
        """The VAE alone: the norm's statistics folded into the encoder's last layer."""
        vae, config = self.vae, self.vae.config
        mean, std = (torch.tensor(v) for v in (config.latents_mean, config.latents_std))
        scale = std * (self.norm.running_var + self.norm.eps).rsqrt()
        layer, channels = vae.conv1, config.z_dim
        layer.weight[:channels] *= scale[:, None, None, None]
        layer.bias[:channels] = (layer.bias[:channels] - self.norm.running_mean) * scale + mean
        # The posterior's log variance, which nobody reads: next to none.
        layer.weight[channels:] = 0
        layer.bias[channels:] = -8
        return vae.requires_grad_(False).eval()


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) in [0, 1] to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1


def train_vae(folder: Path, steps: int = STEPS) -> QwenImageVAE:
    """Train, or go on training; returns the finished VAE."""
    torch.manual_seed(0)
    model = VAETraining()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0)
    rates = Rates(steps, warmup=100, decay=0.5)
    stage = Stage("vae", folder, model, [optimiser], rates)

    def loss_of_step(step: int) -> Tensor:
        size, batch = (128, 4) if step >= LARGE_PICTURES_FROM * steps else (64, 16)
        random = Random(step)
        images = to_tensor([practice_picture(random, size) for _ in range(batch)])
        generator = torch.Generator().manual_seed(step)
        strength = NOISE * torch.rand(batch, 1, 1, 1, generator=generator)
        noise = torch.randn(batch, CONFIG.z_dim, size // 8, size // 8, generator=generator)
        images = images.to(DEVICE).contiguous(memory_format=torch.channels_last)
        with autocast():
            decoded = model(images, (strength * noise).to(DEVICE))
        decoded = decoded.float()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images)

    stage.train(loss_of_step)
    model.load_state_dict(stage.averaged_state())
    return model.cpu().finished()
