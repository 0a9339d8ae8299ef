"""Random weights of the released sizes, made on the device, by the names that files have."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from krea2_model.checkpoints.gguf import FORMATS, GGUFTensor
from krea2_model.checkpoints.transformer_keys import diffusers_to_official, module_to_official
from krea2_model.checkpoints.vae_keys import temporal_shapes
from krea2_model.config import TextEncoderConfig, TransformerConfig, VAEConfig
from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.transformer.model import Krea2Transformer


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts, and of pictures in pixels with the tokens of their text."""

    transformer: TransformerConfig
    encoder: TextEncoderConfig
    vae: VAEConfig
    steps: tuple[tuple[int, int], ...]
    image: int
    small_image: int
    vae_images: tuple[int, ...]
    prompts: tuple[int, ...]
    pairs: int
    copy_bytes: int


FULL = Sizes(
    TransformerConfig(), TextEncoderConfig(), VAEConfig(),
    steps=((512, 64), (1024, 64), (1536, 64), (2048, 64), (512, 512), (1024, 512)),
    image=1024, small_image=512, vae_images=(1024, 2048), prompts=(45, 128), pairs=7,
    copy_bytes=2 * 1024**3,
)  # fmt: skip
# Sizes that ComfyUI's own Krea 2 can be made to take: it fixes the head at 128 and 20 text heads.
TINY = Sizes(
    TransformerConfig(num_layers=2, num_attention_heads=2, num_key_value_heads=1,
                      intermediate_size=768, text_hidden_dim=160, text_intermediate_size=512),
    TextEncoderConfig(hidden_size=160, intermediate_size=192, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=40, vocab_size=151936),
    VAEConfig(base_dim=16),
    steps=((64, 8), (64, 16)), image=64, small_image=64, vae_images=(64,), prompts=(45,), pairs=1,
    copy_bytes=2**16,
)  # fmt: skip
# Small and yet with the real width of a head, for float32: 128 in the transformer, 384 in the VAE.
SMALL = replace(TINY.transformer, num_layers=3)


def random_tensors(shapes: dict[str, tuple[int, ...]], device, dtype, seed: int) -> dict:
    """Normal, scaled by the number of inputs; gains of norms around 1 (or 0, zero-centred)."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        gain = name.endswith(("norm.weight", ".gamma"))
        is_matrix = len(shape) > 1 and not gain and not name.endswith(".lin")
        tensor *= torch.Size(shape[1:]).numel() ** -0.5 if is_matrix else 0.1
        tensors[name] = tensor.add_(1) if gain else tensor
    return tensors


def transformer_tensors(config: TransformerConfig, device, dtype, seed: int = 0) -> dict:
    """A transformer by official names."""
    shapes = {
        module_to_official(name): tuple(meta.shape)
        for name, meta in Krea2Transformer(config, device="meta").state_dict().items()
    }
    return random_tensors(shapes, device, dtype, seed)


def encoder_tensors(config: TextEncoderConfig, device, dtype, seed: int = 1) -> dict:
    """A text encoder as in files: all layers and the final norm, without the vision tower."""
    whole = replace(config, tap_layers=(config.num_hidden_layers,))
    module = Qwen3VLTextEncoder(whole, device="meta")
    shapes = {f"model.{n}": tuple(meta.shape) for n, meta in module.state_dict().items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    return random_tensors(shapes, device, dtype, seed)


def vae_tensors(config: VAEConfig, device, dtype, seed: int = 2) -> dict:
    """A VAE by original names, with three-dimensional kernels."""
    return random_tensors(temporal_shapes(config), device, dtype, seed)


def gguf_tensors(config: TransformerConfig, form: str, device, seed: int = 3) -> dict:
    """A transformer whose blocks' matrices are random GGUF blocks of sound size."""
    tensors = transformer_tensors(replace(config, num_layers=0), device, torch.bfloat16, seed)
    shapes = Krea2Transformer(config, device="meta").state_dict()
    generator = torch.Generator(device).manual_seed(seed)
    for name, meta in shapes.items():
        official = module_to_official(name)
        if official in tensors:
            continue
        if meta.ndim == 2 and meta.shape[1] % FORMATS[form].block_values == 0:
            tensors[official] = gguf_tensor(tuple(meta.shape), form, device, generator)
        else:
            shape = {official: tuple(meta.shape)}
            tensors |= random_tensors(shape, device, torch.float32, seed)
    return tensors


def gguf_tensor(shape: tuple[int, int], form: str, device, generator) -> GGUFTensor:
    """Random bytes with scales (the float16 numbers a block begins with) that suit a matrix."""
    layout = FORMATS[form]
    rows, columns = shape
    blocks = (rows * columns // layout.block_values, layout.block_bytes)
    data = torch.randint(256, blocks, dtype=torch.uint8, device=device, generator=generator)
    # Q8_0 has one of them and values to 127; Q4_K one for scales and one for offsets, each times
    # six bits, and values to 15.
    size = columns**-0.5
    scales = {"Q8_0": (size / 73,), "Q4_K": (size / 300, size / 40)}[form]
    numbers = torch.tensor(scales, dtype=torch.float16, device=device)
    data[:, : 2 * len(scales)] = numbers.view(torch.uint8)
    return GGUFTensor(data.reshape(rows, -1), form, shape)


def for_diffusers(model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors by the names of a diffusers transformer, in the same storage."""
    state = {}
    for name, meta in model.state_dict().items():
        state[name] = tensors[diffusers_to_official(name)].view(meta.shape)
    return state


def diffusers_arguments(config: TransformerConfig) -> dict:
    return {k: v for k, v in asdict(config).items() if k not in ("out_channels", "patch_size")}
