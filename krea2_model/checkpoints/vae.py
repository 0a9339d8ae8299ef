"""Load the Qwen-Image VAE."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..vae.model import QwenImageVAE
from .checkpoint import Checkpoint, open_checkpoint, prefix_of, raise_wrong_kind, strip_prefix
from .identify import VAE
from .loading import PartState, explain_bad_shapes, load_part, stored_dtype
from .quantised import refuse_integers
from .settings import vae_settings
from .vae_keys import infer_vae_config, slice_temporal, vae_key_map

_VAE_MARKERS = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")


def load_vae(
    path: str | Path | Checkpoint,
    *,
    device="cpu",
    dtype: torch.dtype | str | None = None,
    layers=None,
) -> QwenImageVAE:
    """Load the Qwen-Image VAE from a file (original or diffusers names) or a diffusers folder.

    Raises CheckpointError as `load_transformer` does.
    """
    return load_part(read_vae(open_checkpoint(path, "vae")), device, dtype, layers)


def read_vae(checkpoint: Checkpoint) -> PartState:
    """Translate a VAE's tensors to module names, slice its kernels and read off its sizes."""
    prefix = prefix_of(checkpoint, _VAE_MARKERS)
    if prefix is None:
        raise_wrong_kind(checkpoint, VAE)
    tensors = strip_prefix(checkpoint.tensors, prefix)
    with explain_bad_shapes(checkpoint.path, VAE):
        config = infer_vae_config({name: tuple(t.shape) for name, t in tensors.items()})
        settings = vae_settings(checkpoint.config, config.z_dim, checkpoint.config_name)
        config = replace(config, **settings)
        if _VAE_MARKERS[0] not in tensors:
            original = {theirs: ours for ours, theirs in vae_key_map(config).items()}
            tensors = {original.get(name, name): tensor for name, tensor in tensors.items()}
        refuse_integers(tensors, checkpoint.path.name)
        tensors = slice_temporal(tensors, config)
    dtype = stored_dtype(tensors["conv2.weight"])
    build = partial(QwenImageVAE, config)
    return PartState(checkpoint.path, VAE, config, tensors, build, dtype)
