"""Key names and sizes of Qwen-Image VAE checkpoints.

Two layouts are in circulation: the original names (`encoder.downsamples.0.residual.2.weight`;
qwen_image_vae.safetensors, wan_2.1_vae.safetensors), which are the module's own, and diffusers'
(`encoder.down_blocks.0.conv1.weight`). Only names differ, not shapes. Both hold 3D kernels, of
which one image uses the last temporal slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..config import VAEConfig
from ..vae.model import QwenImageVAE, Stage, down_stages, up_stages

# Layers of each kind of block: original name -> diffusers name.
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
}
_SHORTCUT = {"shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}
_RESAMPLE = {"resample.1": "resample.1"}
_TIME = {"time_conv": "time_conv"}


# Ten times those of the released VAE; building more would take long.
_MOST_STAGES = 150


def vae_key_map(config: VAEConfig) -> dict[str, str]:
    """Original name -> diffusers name of every tensor of a checkpoint, time convolutions included.

    The resamplers next to the image work in space only; all others have a time convolution
    (diffusers' temperal_downsample [False, True, True] for the released sizes).
    """
    layers = {
        "encoder.conv1": "encoder.conv_in",
        "encoder.head.0": "encoder.norm_out",
        "encoder.head.2": "encoder.conv_out",
        "conv1": "quant_conv",
        "conv2": "post_quant_conv",
        "decoder.conv1": "decoder.conv_in",
        "decoder.head.0": "decoder.norm_out",
        "decoder.head.2": "decoder.conv_out",
    }

    def add(original: str, diffusers: str, block: dict[str, str]) -> None:
        layers.update({f"{original}.{ours}": f"{diffusers}.{name}" for ours, name in block.items()})

    for part in ("encoder", "decoder"):
        add(f"{part}.middle.0", f"{part}.mid_block.resnets.0", _RESIDUAL)
        add(f"{part}.middle.1", f"{part}.mid_block.attentions.0", _ATTENTION)
        add(f"{part}.middle.2", f"{part}.mid_block.resnets.1", _RESIDUAL)

    def add_stage(original: str, diffusers: str, stage: Stage, near_image: bool) -> None:
        if stage.kind != "residual":
            add(original, diffusers, _RESAMPLE if near_image else _RESAMPLE | _TIME)
        elif stage.in_channels == stage.out_channels:
            add(original, diffusers, _RESIDUAL)
        else:
            add(original, diffusers, _RESIDUAL | _SHORTCUT)

    # diffusers keeps the encoder's flat numbering and nests the decoder's by level.
    for index, stage in enumerate(down_stages(config)):
        near_image = index == config.num_res_blocks
        original = f"encoder.downsamples.{index}"
        add_stage(original, f"encoder.down_blocks.{index}", stage, near_image)
    for index, stage in enumerate(up_stages(config)):
        level, place = divmod(index, config.num_res_blocks + 2)
        near_image = level == len(config.dim_mult) - 2
        name = f"resnets.{place}" if stage.kind == "residual" else "upsamplers.0"
        original = f"decoder.upsamples.{index}"
        add_stage(original, f"decoder.up_blocks.{level}.{name}", stage, near_image)

    keys = {}
    for original, diffusers in layers.items():
        is_norm = diffusers.rpartition(".")[2].startswith("norm")
        for leaf in ("gamma",) if is_norm else ("weight", "bias"):
            keys[f"{original}.{leaf}"] = f"{diffusers}.{leaf}"
    return keys


def slice_temporal(state_dict: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """A checkpoint in original names to the state dict of `QwenImageVAE(config)`, dtypes unchanged.

    Time convolutions are dropped, (O, I, T, H, W) kernels become their last temporal slice
    (O, I, H, W) in channels_last, gammas become (C,). 2D kernels are accepted too. A sliced kernel
    is a copy, so the 3D one can be freed. Raises ValueError for names that the VAE does not have;
    missing ones are left to a strict load.
    """
    known = vae_key_map(config)
    sliced = {}
    for name, tensor in state_dict.items():
        if name not in known:
            raise ValueError(
                f"{name} is no tensor of this VAE: convert names with vae_key_map first"
            )
        if ".time_conv." in name:
            continue
        if name.endswith(".gamma"):
            tensor = tensor.flatten()
        elif tensor.ndim >= 4:
            kernel = tensor[:, :, -1] if tensor.ndim == 5 else tensor
            tensor = kernel.contiguous(memory_format=torch.channels_last)
        sliced[name] = tensor
    return sliced


def temporal_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a whole checkpoint, by original name, with its time axes."""
    module = QwenImageVAE(config, device="meta").state_dict()
    flat = {name: tuple(tensor.shape) for name, tensor in module.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in vae_key_map(config):
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(".time_conv"):
            channels = flat[layer.removesuffix("time_conv") + "resample.1.weight"][1]
            # A decoder's time convolution makes two frames of one.
            out = channels * (2 if name.startswith("decoder.") else 1)
            shapes[name] = (out, channels, 3, 1, 1) if leaf == "weight" else (out,)
        elif leaf == "gamma":
            shapes[name] = (*flat[name], 1, 1) if ".middle.1." in name else (*flat[name], 1, 1, 1)
        elif leaf == "weight" and ".middle.1." not in name and ".resample.1." not in name:
            out, channels, kernel, _ = flat[name]
            shapes[name] = (out, channels, kernel, kernel, kernel)
        else:
            shapes[name] = flat[name]
    return shapes


def restore_temporal(state_dict: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """The inverse of `slice_temporal`, for saving: kernels get their time axes back, empty.

    Exact for single images, where only the last slice meets data. What the VAE knew of film was
    never loaded and is zero.
    """
    sample = next(iter(state_dict.values()))
    restored = {}
    for name, shape in temporal_shapes(config).items():
        tensor = state_dict.get(name)
        if tensor is None:
            restored[name] = torch.zeros(shape, dtype=sample.dtype)
        elif len(shape) == 5:
            restored[name] = tensor.new_zeros(shape)
            restored[name][:, :, -1] = tensor
        else:
            restored[name] = tensor.reshape(shape).contiguous()
    return restored


def infer_vae_config(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    """Sizes of a VAE from its tensors' shapes by name, in original or diffusers names, 3D or 2D.

    Latent statistics are not in the tensors: the released ones are assumed. Raises ValueError that
    names the first tensors that a Qwen-Image VAE of the sizes found would not have.
    """
    diffusers_names = "encoder.conv_in.weight" in shapes
    if diffusers_names:
        first, blocks, conv, post, last = (
            "encoder.conv_in",
            "encoder.down_blocks",
            "conv1",
            "post_quant_conv",
            "decoder.conv_out",
        )
    else:
        first, blocks, conv, post, last = (
            "encoder.conv1",
            "encoder.downsamples",
            "residual.2",
            "conv2",
            "decoder.head.2",
        )
    for name in (f"{first}.weight", f"{post}.weight", f"{last}.weight"):
        if name not in shapes:
            raise ValueError(
                f"not a Qwen-Image VAE: {name} is missing (found {len(shapes)} tensors)"
            )

    base_dim, image_channels = shapes[f"{first}.weight"][:2]
    widths: list[list[int]] = [[]]  # of the residual blocks of each level
    index = 0
    while True:
        if residual := shapes.get(f"{blocks}.{index}.{conv}.weight"):
            widths[-1].append(residual[0])
        elif f"{blocks}.{index}.resample.1.weight" in shapes:
            widths.append([])
        else:
            break
        index += 1
        if index > _MOST_STAGES:
            raise ValueError(f"not a Qwen-Image VAE: {blocks} has over {_MOST_STAGES} entries")
    counts = [len(level) for level in widths]
    if min(counts) == 0 or len(set(counts)) > 1:
        raise ValueError(
            f"not a Qwen-Image VAE: the levels of {blocks} have {counts} residual blocks, "
            "expected the same number, at least one, in each"
        )
    if any(level[-1] % base_dim for level in widths):
        raise ValueError(
            f"not a Qwen-Image VAE: level widths {[level[-1] for level in widths]} of {blocks} "
            f"are not multiples of the first convolution's {base_dim}"
        )
    config = VAEConfig(
        base_dim=base_dim,
        z_dim=shapes[f"{post}.weight"][0],
        dim_mult=tuple(level[-1] // base_dim for level in widths),
        num_res_blocks=counts[0],
        image_channels=image_channels,
        upscale=_upscale(shapes[f"{last}.weight"][0], image_channels),
    )
    _check_shapes(shapes, config, diffusers_names)
    return config


def _upscale(out_channels: int, image_channels: int) -> int:
    """Pixels along a side of the block that a decoder's last convolution gives for each pixel."""
    upscale = math.isqrt(out_channels // image_channels)
    if upscale < 1 or image_channels * upscale**2 != out_channels:
        raise ValueError(
            f"not a Qwen-Image VAE: the decoder gives {out_channels} channels; expected "
            f"{image_channels}, or {4 * image_channels} of one that doubles the size"
        )
    return upscale


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: VAEConfig, diffusers_names: bool
) -> None:
    """Raise ValueError unless `shapes` are those of a VAE of this config, time axes aside."""
    # The statistics take no part in shapes; the released ones fit no other number of channels.
    zeros = (0.0,) * config.z_dim
    probe = replace(config, latents_mean=zeros, latents_std=zeros)
    module = QwenImageVAE(probe, device="meta").state_dict()
    problems = []
    known = set()
    for original, diffusers in vae_key_map(config).items():
        name = diffusers if diffusers_names else original
        known.add(name)
        if original not in module:  # a time convolution, which a 2D checkpoint may lack
            continue
        expected = tuple(module[original].shape)
        shape = shapes.get(name)
        if shape is None:
            problems.append(f"{name} is missing")
            continue
        if name.endswith(".gamma"):
            plain = (*shape[:1], *(size for size in shape[1:] if size != 1))
        else:
            plain = (*shape[:2], *shape[-2:]) if len(shape) == 5 else tuple(shape)
        if plain != expected:
            problems.append(f"{name} has shape {tuple(shape)}, expected {expected}")
    problems += [f"{name} is unknown" for name in shapes if name not in known]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"not a Qwen-Image VAE: {'; '.join(problems[:3])}{more}")
