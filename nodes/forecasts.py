"""Numbers for the forecast that the sampler shows before a run (web/js/forecast.js)."""

from functools import cache

import comfy.model_management

from ..krea2_model import nano
from ..krea2_model.checkpoints.checkpoint import open_checkpoint
from ..krea2_model.checkpoints.transformer import read_transformer
from ..krea2_model.config import RAW, TURBO, TransformerConfig
from . import model_files
from .model_files import TRANSFORMER

# Key of a transformer input's options, beside its tooltip.
FORECAST = "krea2_forecast"


def numbers() -> dict:
    """Sizes of the released model and of krea2-nano, of the device, and of the files, in bytes."""
    management = comfy.model_management
    return {
        "released": _sizes(TransformerConfig(), RAW.size, 2),
        "nano": _sizes(*_nano(), 4),
        "device": int(management.get_total_memory(management.get_torch_device())),
        "files": model_files.sizes_of_models(TRANSFORMER),
    }


@cache
def _nano() -> tuple[TransformerConfig, int]:
    """krea2-nano's sizes, and the side of the pictures that it was trained with."""
    state = read_transformer(open_checkpoint(nano.TRANSFORMERS["turbo"], "transformer"))
    return state.config, (state.preset or TURBO).size


def _sizes(config: TransformerConfig, side: int, itemsize: int) -> dict[str, int]:
    return {
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "layers": config.num_layers,
        "keys": config.num_key_value_heads * config.attention_head_dim,
        "channels": config.in_channels,
        "time": config.timestep_embed_dim,
        "itemsize": itemsize,
        "side": side,
    }
