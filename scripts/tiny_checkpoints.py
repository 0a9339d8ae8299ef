"""Small random checkpoints in the real layouts, for the tests.

Every tensor a real file has is there, in its real name and number of dimensions; only the sizes
are small. Weights are random, so pictures made with them are noise.

    python scripts/tiny_checkpoints.py MODELS_FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

# At the end: in a process with ComfyUI, `nodes` has to stay ComfyUI's.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from krea2_model import nano  # noqa: E402
from krea2_model.checkpoints.transformer_keys import module_to_official  # noqa: E402
from krea2_model.checkpoints.vae_keys import temporal_shapes  # noqa: E402
from krea2_model.config import TransformerConfig, VAEConfig  # noqa: E402
from krea2_model.text.encoder import Qwen3VLTextEncoder  # noqa: E402
from krea2_model.text.vision import Qwen3VLVisionTower  # noqa: E402
from krea2_model.transformer.model import Krea2Transformer  # noqa: E402

# Sizes that ComfyUI's own Krea 2 detects too: it fixes the head at 128 and 20 text heads, and
# derives the MLP widths from the others.
TRANSFORMER = TransformerConfig(
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=768,
    text_hidden_dim=160,
    text_intermediate_size=512,
)
TEXT_ENCODER = nano.TEXT_ENCODER_CONFIG
VISION = nano.VISION_CONFIG
VAE = VAEConfig(base_dim=16)


def transformer_tensors(config=TRANSFORMER, seed=0, dtype=torch.bfloat16) -> dict:
    """A transformer by official names: matrices in `dtype`, norms and tables in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, meta in Krea2Transformer(config, device="meta").state_dict().items():
        official = module_to_official(name)
        if official.endswith((".scale", ".lin")):
            tensors[official] = 0.2 * torch.randn(meta.shape, generator=generator)
        else:
            tensors[official] = random_weight(meta.shape, generator).to(dtype)
    return tensors


def text_encoder_tensors(config=TEXT_ENCODER, seed=1, dtype=torch.bfloat16) -> dict:
    """A text encoder as in qwen3vl_4b files: all layers, the final norm, and vision weights."""
    generator = torch.Generator().manual_seed(seed)
    # The module stops after the last tap; a file does not.
    whole = replace(config, tap_layers=(config.num_hidden_layers,))
    tensors = {}
    for name, meta in Qwen3VLTextEncoder(whole, device="meta").state_dict().items():
        if meta.ndim == 1:
            weight = 1 + 0.1 * torch.randn(meta.shape, generator=generator)
        else:
            weight = random_weight(meta.shape, generator)
        tensors[f"model.{name}"] = weight.to(dtype)
    tensors["model.norm.weight"] = torch.ones(config.hidden_size, dtype=dtype)
    tower = replace(VISION, out_hidden_size=config.hidden_size)
    return tensors | vision_tensors(tower, seed, dtype)


def vision_tensors(config=VISION, seed=1, dtype=torch.bfloat16) -> dict:
    """A vision tower by the names in qwen3vl_4b files, whose patches have five dimensions."""
    generator = torch.Generator().manual_seed(seed)
    patch = (config.in_channels, config.temporal_patch_size, *[config.patch_size] * 2)
    tensors = {}
    for name, meta in Qwen3VLVisionTower(config, device="meta").state_dict().items():
        if "norm" in name and name.endswith("weight"):
            weight = 1 + 0.1 * torch.randn(meta.shape, generator=generator)
        else:
            weight = random_weight(meta.shape, generator)
        if name == "patch_embed.proj.weight":
            weight = weight.reshape(-1, *patch)
        tensors[f"visual.{name}"] = weight.to(dtype)
    return tensors


def vae_tensors(config=VAE, seed=2, dtype=torch.float32) -> dict:
    """A VAE by original names, with three-dimensional kernels and time convolutions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in temporal_shapes(config).items():
        if name.endswith(".gamma"):
            tensors[name] = (1 + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
        else:
            tensors[name] = random_weight(shape, generator).to(dtype)
    return tensors


def random_weight(shape, generator: torch.Generator) -> torch.Tensor:
    """Normal, scaled by the number of inputs so that activations keep their size."""
    fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 25
    return torch.randn(shape, generator=generator) * fan_in**-0.5


def write_models(folder: Path, dtype=torch.bfloat16) -> None:
    """Raw and Turbo, a text encoder and a VAE, where ComfyUI looks for them; existing ones stay."""
    files = {
        "diffusion_models/krea2_tiny_turbo.safetensors": lambda: transformer_tensors(dtype=dtype),
        "diffusion_models/krea2_tiny_raw.safetensors": lambda: transformer_tensors(
            seed=3, dtype=dtype
        ),
        "text_encoders/qwen3vl_tiny.safetensors": lambda: text_encoder_tensors(dtype=dtype),
        "vae/qwen_image_vae_tiny.safetensors": vae_tensors,
    }
    for name, tensors in files.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors(), path, {"format": "pt"})


if __name__ == "__main__":
    write_models(Path(sys.argv[1]))
