"""The Qwen-Image VAE (the Wan 2.1 VAE) for one image, in 2D.

The checkpoint is a video VAE of causal 3D convolutions. One image is one frame, whose past is
zero padding, so only the last temporal slice of every kernel meets data and the module here is the
exact 2D equivalent: `krea2_model.checkpoints.vae_keys.slice_temporal` makes its weights. The time
convolutions of the resamplers pass a first frame through unchanged and do not exist here.

Module names are those of the original checkpoint, hence the numbered `residual.2` and
`downsamples.5`; decoder resamplers halve the channels, so the block after one sees half the width
of the level before. Activations are channels_last throughout.

Source of the architecture: Wan-Video/Wan2.1, wan/modules/vae.py, in Qwen-Image's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from ..config import VAEConfig
from ..nn.kernels import inverse_rms, may_overwrite
from ..nn.layers import TorchLayers
from .tiling import Progress, apply_in_tiles, plan_tiles

# Largest attention score matrix, in bytes, where the device has no fused kernel for our head size.
MAX_SCORE_BYTES = 256 * 2**20

# Pixels along a side of a tile, unless the caller chooses.
TILE = 1024

# Hidden states at the latents' size that are alive in the decoder's attention at the peak.
_ATTENTION_STATES = 8.1

# F.normalize floors the L2 norm at 1e-12, which is this order inside a root of a mean square.
NORM_EPS = 1e-26


class Stage(NamedTuple):
    """One entry of the flat `downsamples` and `upsamples`: "residual", "down" or "up"."""

    kind: str
    in_channels: int
    out_channels: int


def down_stages(config: VAEConfig) -> list[Stage]:
    """The encoder's `downsamples`: a level is residual blocks and, except the last, a resampler."""
    stages = []
    channels = config.base_dim
    for level, multiple in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            stages.append(Stage("residual", channels, config.base_dim * multiple))
            channels = config.base_dim * multiple
        if level < len(config.dim_mult) - 1:
            stages.append(Stage("down", channels, channels))
    return stages


def up_stages(config: VAEConfig) -> list[Stage]:
    """The decoder's `upsamples`: one residual block a level more, resamplers halve the channels."""
    stages = []
    channels = config.base_dim * config.dim_mult[-1]
    for level, multiple in enumerate(reversed(config.dim_mult)):
        for _ in range(config.num_res_blocks + 1):
            stages.append(Stage("residual", channels, config.base_dim * multiple))
            channels = config.base_dim * multiple
        if level < len(config.dim_mult) - 1:
            stages.append(Stage("up", channels, channels // 2))
            channels //= 2
    return stages


class PixelNorm(nn.Module):
    """L2 normalisation over the channels of each pixel, times sqrt(C) and a learned gain.

    That is an RMS norm. `F.rms_norm` computes half precision in float32, rounds once and, where
    its kernel is fused (on GPUs), makes no float32 copy of a full-size activation.
    """

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        pixels, gamma = hidden.movedim(1, -1), self.gamma.to(hidden)
        if hidden.device.type == "cpu" and may_overwrite():
            normed = (pixels * inverse_rms(pixels, NORM_EPS)).mul_(gamma).to(hidden.dtype)
        else:
            normed = F.rms_norm(pixels, pixels.shape[-1:], gamma, NORM_EPS)
        return normed.movedim(-1, 1)


class Activation(nn.Module):
    """SiLU, in place where gradients are off."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.silu(hidden, inplace=may_overwrite())


class ResidualBlock(nn.Module):
    """Two normed, activated 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, layers, **factory):
        super().__init__()
        self.residual = nn.Sequential(
            PixelNorm(in_channels, **factory),
            Activation(),
            layers.Conv2d(in_channels, out_channels, 3, padding=1, **factory),
            PixelNorm(out_channels, **factory),
            Activation(),
            nn.Identity(),  # the place of the original's dropout, which keeps the numbering
            layers.Conv2d(out_channels, out_channels, 3, padding=1, **factory),
        )
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else layers.Conv2d(in_channels, out_channels, 1, **factory)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        update = self.residual(hidden)
        if may_overwrite():
            return update.add_(self.shortcut(hidden))
        return update + self.shortcut(hidden)


class Resample(nn.Module):
    """Halve or double height and width, with a 3x3 convolution.

    Halving pads only below and to the right. Doubling only copies pixels, so unlike in the original
    it needs no detour through float32.
    """

    def __init__(self, stage: Stage, layers, **factory):
        super().__init__()
        channels = (stage.in_channels, stage.out_channels)
        if stage.kind == "down":
            self.resample = nn.Sequential(
                nn.ZeroPad2d((0, 1, 0, 1)), layers.Conv2d(*channels, 3, stride=2, **factory)
            )
        else:
            self.resample = nn.Sequential(
                nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                layers.Conv2d(*channels, 3, padding=1, **factory),
            )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.resample(hidden)


def has_fused_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if scaled_dot_product_attention runs without a score matrix in memory."""
    if query.device.type == "cuda":
        params = SDPAParams(query, key, value, None, 0.0, False, False)
        return can_use_efficient_attention(params) or can_use_flash_attention(params)
    return query.device.type == "cpu"


def attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, max_bytes: int) -> Tensor:
    """Attention over chunks of queries whose float32 scores fit in `max_bytes`.

    All (B, 1, L, C). Chunks leave the result as it is: the softmax runs over keys.
    """
    rows = max(1, max_bytes // (4 * key.shape[0] * key.shape[2]))
    chunks = [F.scaled_dot_product_attention(part, key, value) for part in query.split(rows, dim=2)]
    return torch.cat(chunks, dim=2)


class AttentionBlock(nn.Module):
    """Self-attention of all pixels, one head as wide as the hidden state.

    At 2048 px these are 65536 tokens with a head of 384, more than most flash kernels take.
    Without a fused kernel the queries go in chunks; with one they do not, since a chunk alone
    would leave most of a GPU idle.
    """

    def __init__(self, channels: int, layers, **factory):
        super().__init__()
        self.norm = PixelNorm(channels, **factory)
        self.to_qkv = layers.Conv2d(channels, channels * 3, 1, **factory)
        self.proj = layers.Conv2d(channels, channels, 1, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        # (B, 3C, H, W) to (B, 1, L, 3C): a view in channels_last, a copy otherwise, because
        # fused kernels want the channels of a token side by side.
        tokens = self.to_qkv(self.norm(hidden)).flatten(2).mT.contiguous().unsqueeze(1)
        query, key, value = tokens.chunk(3, dim=-1)
        if has_fused_attention(query, key, value):
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = attend_in_chunks(query, key, value, MAX_SCORE_BYTES)
        batch, channels, height, width = hidden.shape
        mixed = mixed.reshape(batch, height, width, channels).movedim(-1, 1)
        return hidden + self.proj(mixed)


def stage_blocks(stages: list[Stage], layers, **factory) -> nn.ModuleList:
    """A list to loop over and not a Sequential, which holds its full-size input to the end."""
    return nn.ModuleList(
        ResidualBlock(stage.in_channels, stage.out_channels, layers, **factory)
        if stage.kind == "residual"
        else Resample(stage, layers, **factory)
        for stage in stages
    )


def middle_blocks(channels: int, layers, **factory) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, layers, **factory),
        AttentionBlock(channels, layers, **factory),
        ResidualBlock(channels, channels, layers, **factory),
    )


def head_blocks(in_channels: int, out_channels: int, layers, **factory) -> nn.Sequential:
    conv = layers.Conv2d(in_channels, out_channels, 3, padding=1, **factory)
    return nn.Sequential(PixelNorm(in_channels, **factory), Activation(), conv)


class Encoder(nn.Module):
    """(B, 3, H, W) to means and log variances, (B, 2 * z_dim, h, w), before the last 1x1."""

    def __init__(self, config: VAEConfig, layers, **factory):
        super().__init__()
        stages = down_stages(config)
        channels = stages[-1].out_channels
        self.conv1 = layers.Conv2d(config.image_channels, config.base_dim, 3, padding=1, **factory)
        self.downsamples = stage_blocks(stages, layers, **factory)
        self.middle = middle_blocks(channels, layers, **factory)
        self.head = head_blocks(channels, 2 * config.z_dim, layers, **factory)

    def forward(self, images: Tensor) -> Tensor:
        return self.attend(self.reduce(images))

    def reduce(self, images: Tensor) -> Tensor:
        """The convolutions down to the latents' size: hidden states (B, C, h, w)."""
        hidden = self.conv1(images)
        for block in self.downsamples:
            hidden = block(hidden)
        return hidden

    def attend(self, hidden: Tensor) -> Tensor:
        """The rest, with attention over the whole image."""
        for block in self.middle:  # not at once, which would hold its input to the end
            hidden = block(hidden)
        return self.head(hidden)


class Decoder(nn.Module):
    """(B, z_dim, h, w) to (B, 3, H, W).

    With `config.upscale` the last convolution gives the pixels of a block as channels, in the order
    of `F.pixel_shuffle`.
    """

    def __init__(self, config: VAEConfig, layers, **factory):
        super().__init__()
        stages = up_stages(config)
        channels = stages[0].in_channels
        self.conv1 = layers.Conv2d(config.z_dim, channels, 3, padding=1, **factory)
        self.middle = middle_blocks(channels, layers, **factory)
        self.upsamples = stage_blocks(stages, layers, **factory)
        self.upscale = config.upscale
        out_channels = config.image_channels * config.upscale**2
        self.head = head_blocks(stages[-1].out_channels, out_channels, layers, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        return self.enlarge(self.attend(latents))

    def attend(self, latents: Tensor) -> Tensor:
        """The part with attention over the whole image: hidden states (B, C, h, w)."""
        hidden = self.conv1(latents)
        for block in self.middle:  # not at once, which would hold its input to the end
            hidden = block(hidden)
        return hidden

    def enlarge(self, hidden: Tensor) -> Tensor:
        """The rest, from hidden states of `attend` to the image; `reach(config)` is its reach."""
        for block in self.upsamples:
            hidden = block(hidden)
        image = self.head(hidden)
        return image if self.upscale == 1 else F.pixel_shuffle(image, self.upscale)


def reach(config: VAEConfig) -> int:
    """Latent cells to each side that a decoded pixel depends on, behind the attention.

    A convolution reaches one pixel of its level: two in each residual block, one in each resampler,
    which works at the larger size, and the head's.
    """
    levels = len(config.dim_mult)
    pixels = [2 * (config.num_res_blocks + 1) + (level > 0) for level in range(levels)]
    pixels[-1] += 1
    return math.ceil(sum(count / 2**level for level, count in enumerate(pixels)))


def encoder_reach(config: VAEConfig) -> int:
    """Latent cells to each side that a hidden state before the encoder's attention depends on.

    As in `reach`; a resampler reads one pixel more of the larger size.
    """
    levels = len(config.dim_mult)
    pixels = [2 * config.num_res_blocks + (level < levels - 1) for level in range(levels)]
    pixels[0] += 1  # conv1
    return math.ceil(sum(count / 2 ** (levels - 1 - n) for n, count in enumerate(pixels)))


def tiled_bytes(
    config: VAEConfig, cells: tuple[int, int], tile: int, itemsize: int, widths: float
) -> float:
    """Bytes on the device that an image in tiles needs besides weights and the image.

    cells: rows and columns of the latents. widths: hidden states of the first width that are alive
    at the peak at full size. The attention's part grows with the image, a tile's does not.
    """
    states = cells[0] * cells[1] * config.base_dim * config.dim_mult[-1]
    margin = 2 * max(reach(config), encoder_reach(config)) * config.downscale
    across, down = (min(side * config.downscale, tile + margin) for side in cells)
    own = widths * config.base_dim * across * down
    return itemsize * max(_ATTENTION_STATES * states, states + own)


class QwenImageVAE(nn.Module):
    """Encoder and decoder between images in [-1, 1] and normalised latents.

    Images are (B, 3, H, W) with H and W multiples of `config.downscale` (8), latents
    (B, 16, H/8, W/8); decoded images are `config.upscale` times as large. Work runs in the dtype of
    the weights, one image of a batch at a time to bound memory; results are contiguous float32.
    Weights in channels_last, as `slice_temporal` gives them and `load_state_dict(..., assign=True)`
    keeps them, spare a conversion a call.
    Gradients flow through every method.
    """

    def __init__(self, config: VAEConfig, layers=TorchLayers, device=None, dtype=None):
        super().__init__()
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ValueError(
                f"latents_mean has {len(config.latents_mean)} values and latents_std "
                f"{len(config.latents_std)}, expected one for each of the {config.z_dim} latent "
                "channels: set both in VAEConfig (a diffusers folder has them in vae/config.json)"
            )
        self.config = config
        self.encoder = Encoder(config, layers, device=device, dtype=dtype)
        self.conv1 = layers.Conv2d(
            2 * config.z_dim, 2 * config.z_dim, 1, device=device, dtype=dtype
        )
        self.conv2 = layers.Conv2d(config.z_dim, config.z_dim, 1, device=device, dtype=dtype)
        self.decoder = Decoder(config, layers, device=device, dtype=dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Images to normalised latents: the posterior's mean, shifted and scaled a channel."""
        return self.normalise(self.encode_unnormalised(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to images, clamped to [-1, 1] as diffusers does."""
        return self.decode_unnormalised(self.denormalise(latents))

    def encode_unnormalised(self, images: Tensor) -> Tensor:
        """Images to the posterior's mean as the network gives it (ComfyUI's VAE latents)."""
        self._check_images(images)
        means = []
        for image in images.split(1):
            moments = self.conv1(self.encoder(self._to_weights(image)))
            means.append(moments[:, : self.config.z_dim].float().contiguous())
        return torch.cat(means)

    def decode_unnormalised(self, latents: Tensor) -> Tensor:
        """Latents as the network takes them to images, clamped to [-1, 1]."""
        self._check("latents", latents, self.config.z_dim)
        images = []
        for latent in latents.split(1):
            image = self.decoder(self.conv2(self._to_weights(latent)))
            images.append(image.float().clamp(-1.0, 1.0).contiguous())
        return torch.cat(images)

    def normalise(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std with the config's statistics, in float32."""
        self._check("latents", latents, self.config.z_dim)
        mean, std = self._statistics(latents.device)
        return (latents.float() - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """latents * std + mean with the config's statistics, in float32."""
        self._check("latents", latents, self.config.z_dim)
        mean, std = self._statistics(latents.device)
        return latents.float() * std + mean

    def encode_tiled(
        self, images: Tensor, tile: int = TILE, progress: Progress | None = None
    ) -> Tensor:
        """`encode` in square tiles, equal to it but for the rounding of kernels; as `decode_tiled`.

        images: on any device; those of a tile are moved to that of the weights.
        """
        self._check_images(images)
        config, cell = self.config, self.config.downscale
        rows, columns = (side // cell for side in images.shape[2:])
        count = self._tile_counter(len(images), (rows, columns), tile, progress)
        latents = []
        for image in images.split(1):
            # Without a name, which would hold it through the attention.
            moments = self.conv1(self.encoder.attend(self._reduced(image, tile // cell, count)))
            latents.append(self.normalise(moments[:, : config.z_dim]).contiguous())
        return torch.cat(latents)

    def decode_tiled(
        self,
        latents: Tensor,
        tile: int = TILE,
        progress: Progress | None = None,
        out_device: torch.device | str | None = None,
    ) -> Tensor:
        """`decode` in square tiles, equal to it but for the rounding of kernels.

        tile: pixels along a side (of the size that was encoded) that are decoded at a time, a
            multiple of `config.downscale`; `reach` more are computed on each side.
        out_device: of the image, which no device with little memory has to hold; None is that of
            the latents.
        Attention over the whole image runs at the latents' size, see `tiled_bytes`.
        """
        self._check("latents", latents, self.config.z_dim)
        config, cell = self.config, self.config.downscale
        rows, columns = latents.shape[2:]
        size = (config.image_channels, rows * config.decoded_cell, columns * config.decoded_cell)
        images = latents.new_empty((len(latents), *size), dtype=torch.float32, device=out_device)
        count = self._tile_counter(len(latents), (rows, columns), tile, progress)
        for index, latent in enumerate(latents.split(1)):
            image = images[index : index + 1]
            hidden = self.decoder.attend(self.conv2(self._to_weights(self.denormalise(latent))))
            apply_in_tiles(hidden, image, self._enlarge, tile // cell, reach(config), count)
        return images

    def _tile_counter(
        self, images: int, cells: tuple[int, int], tile: int, progress: Progress | None
    ) -> Callable[[], None]:
        """A function to call after each tile. Raises ValueError for a tile of no whole cells."""
        cell = self.config.downscale
        if tile < cell or tile % cell:
            raise ValueError(f"tile {tile} (pixels) must be a multiple of {cell} above 0")
        total, done = images, 0
        for side in cells:
            total *= len(plan_tiles(side, tile // cell, 0))

        def count() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        return count

    def _reduced(self, image: Tensor, tile: int, count: Callable[[], None]) -> Tensor:
        """`Encoder.reduce` of an image (1, 3, H, W) in tiles of so many cells."""
        config, weight = self.config, self.conv1.weight
        rows, columns = (side // config.downscale for side in image.shape[2:])
        hidden = torch.empty(
            (1, config.base_dim * config.dim_mult[-1], rows, columns),
            dtype=weight.dtype,
            device=weight.device,
            memory_format=torch.channels_last,
        )

        def reduce(part: Tensor) -> Tensor:
            return self.encoder.reduce(self._to_weights(part.to(weight.device)))

        margin = encoder_reach(config)
        apply_in_tiles(image, hidden, reduce, tile, margin, count, config.downscale)
        return hidden

    def _enlarge(self, hidden: Tensor) -> Tensor:
        return self.decoder.enlarge(hidden).float().clamp(-1.0, 1.0)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, z_dim, 1, 1).

        Made here and not kept as buffers, because a model built on meta would keep those on meta.
        """
        mean = torch.tensor(self.config.latents_mean, dtype=torch.float32, device=device)
        std = torch.tensor(self.config.latents_std, dtype=torch.float32, device=device)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _to_weights(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.conv1.weight.dtype, memory_format=torch.channels_last)

    def _check(self, noun: str, tensor: Tensor, channels: int) -> None:
        if tensor.ndim != 4 or tensor.shape[1] != channels:
            raise ValueError(
                f"{noun} have shape {tuple(tensor.shape)}, expected (B, {channels}, height, width)"
                + (": drop the frame axis, tensor[:, :, 0]" if tensor.ndim == 5 else "")
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{noun} are {tensor.dtype}, expected a floating point dtype")

    def _check_images(self, images: Tensor) -> None:
        self._check("images", images, self.config.image_channels)
        height, width = images.shape[2:]
        cell = self.config.downscale
        if height % cell or width % cell:
            raise ValueError(
                f"images are {width}x{height} pixels (width x height), expected multiples of "
                f"{cell}: crop or resize to {max(width // cell, 1) * cell}x"
                f"{max(height // cell, 1) * cell}"
            )
