"""Krea 2 in plain torch: the transformer, its text encoder, its VAE, and the way to an image.

Runs without ComfyUI and never imports it.
"""

from .checkpoint import load_transformer, load_vae, save_transformer
from .config import PRESETS, RAW, TURBO, Preset, TextEncoderConfig, TransformerConfig, VAEConfig
from .encoder_parts import load_text_encoder
from .expander import PromptExpander
from .guidance import GuidanceSchedule
from .identify import CheckpointError
from .pipeline import Krea2Pipeline
from .prompt_images import PromptImage
from .sampling import denoise, shift_mu, sigma_schedule
from .text_attention import NegativeGuidance
from .text_encoder import Qwen3VLTextEncoder
from .tokenizer import Krea2Tokenizer
from .transformer import Krea2Transformer
from .vae import QwenImageVAE

__all__ = [
    "PRESETS",
    "RAW",
    "TURBO",
    "CheckpointError",
    "GuidanceSchedule",
    "Krea2Pipeline",
    "Krea2Tokenizer",
    "Krea2Transformer",
    "NegativeGuidance",
    "Preset",
    "PromptExpander",
    "PromptImage",
    "Qwen3VLTextEncoder",
    "QwenImageVAE",
    "TextEncoderConfig",
    "TransformerConfig",
    "VAEConfig",
    "denoise",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "save_transformer",
    "shift_mu",
    "sigma_schedule",
]
