"""The files of krea2-nano, as the training writes them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from krea2_model import save_transformer
from krea2_model.checkpoints.transformer_keys import is_norm_or_table
from krea2_model.checkpoints.vae_keys import restore_temporal
from krea2_model.transformer.model import Krea2Transformer
from krea2_model.vae.model import QwenImageVAE


def write_transformer(transformer: Krea2Transformer, file: Path) -> None:
    """Write a transformer: matrices in bfloat16, norms and tables in float32."""
    for name, parameter in transformer.named_parameters():
        if not is_norm_or_table(name):
            parameter.data = parameter.data.bfloat16()
    save_transformer(transformer.cpu(), file)


def write_vae(vae: QwenImageVAE, file: Path) -> None:
    """Write a VAE in bfloat16, in the layout of the video VAE."""
    tensors = restore_temporal(vae.state_dict(), vae.config)
    tensors = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})


def write_lora(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a LoRA in bfloat16."""
    save_file({name: t.bfloat16() for name, t in tensors.items()}, file, {"format": "pt"})
