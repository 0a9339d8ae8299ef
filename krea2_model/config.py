"""Sizes and sampling defaults of Krea 2, as frozen dataclasses.

The defaults are the released model. Every size can also be read off a checkpoint's tensors
(`krea2_model.checkpoints`), so smaller or larger relatives need no code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the single-stream MMDiT; the fields are those of diffusers' Krea2Transformer2DModel.

    `in_channels` counts channels after patchifying (latent channels x patch_size^2).
    `out_channels` differs from it only where a control adapter widens the first layer.
    """

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 28
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    num_key_value_heads: int = 12
    intermediate_size: int = 16384
    timestep_embed_dim: int = 256
    text_hidden_dim: int = 2560
    num_text_layers: int = 12
    text_num_attention_heads: int = 20
    text_num_key_value_heads: int = 20
    text_intermediate_size: int = 6912
    num_layerwise_text_blocks: int = 2
    num_refiner_text_blocks: int = 2
    axes_dims_rope: tuple[int, int, int] = (32, 48, 48)
    rope_theta: float = 1000.0
    norm_eps: float = 1e-5
    patch_size: int = 2

    @property
    def hidden_size(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @property
    def latent_channels(self) -> int:
        return self.out_channels // self.patch_size**2


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the Qwen3-VL language tower; the fields are those of its `text_config`.

    `tap_layers` indexes `hidden_states`, where 0 is the embedding output and k is the output of
    decoder layer k - 1, before the final norm.

    `mrope_section` says how many rotary frequencies of a head count time, rows and columns; None
    shares them as the released 24, 20 and 20 of 64. That matters for images only: on text the
    three agree.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5_000_000.0
    tap_layers: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
    mrope_section: tuple[int, ...] | None = None

    @property
    def rotary_sections(self) -> tuple[int, int, int]:
        """Frequencies of time, rows and columns; those of smaller heads in the same shares."""
        if self.mrope_section is not None:
            time, rows, columns = self.mrope_section
            return time, rows, columns
        half = self.head_dim // 2
        side = half * 5 // 16
        return half - 2 * side, side, side

    @property
    def num_tapped_layers(self) -> int:
        """Decoder layers that run for the taps: those after the last tap are never needed."""
        return max(self.tap_layers)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the Qwen3-VL vision tower; the fields are those of its `vision_config`.

    `out_hidden_size` is the width of the language tower. `deepstack_visual_indexes` are the blocks
    whose states the first language layers are given too.
    """

    depth: int = 24
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 2560
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (5, 11, 17)

    @property
    def token_side(self) -> int:
        """Pixels that a token covers along one side."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the Qwen-Image VAE and the fixed statistics that normalise its latents.

    `upscale` above 1 is that of a decoder whose last convolution gives a block of so many pixels a
    side for each pixel: the Wan 2x decoder makes images of twice the size that were encoded.

    Mean and standard deviation a channel are those of diffusers' AutoencoderKLQwenImage and of
    ComfyUI's Wan21 latent format.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    image_channels: int = 3
    upscale: int = 1
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers along one side, of an image that is encoded."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def decoded_cell(self) -> int:
        """Pixels a latent cell covers along one side, of an image that is decoded."""
        return self.downscale * self.upscale


@dataclass(frozen=True)
class Preset:
    """Sampling defaults of a checkpoint variant.

    `guidance` is in Krea's convention, `v = cond + guidance * (cond - uncond)`, off at 0.
    `mu` is the exponent of the time shift; None derives it from the image size.
    `size` is the side in pixels of the square images that the checkpoint is made for.
    """

    name: str
    steps: int
    guidance: float
    mu: float | None
    size: int = 1024


# Defaults of the official inference code and of diffusers. Krea's model card also names
# 52 steps at guidance 3.5 for Raw: slower, somewhat calmer colours.
RAW = Preset("raw", steps=28, guidance=4.5, mu=None)
TURBO = Preset("turbo", steps=8, guidance=0.0, mu=1.15)
PRESETS = {preset.name: preset for preset in (RAW, TURBO)}
