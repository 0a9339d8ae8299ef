"""Krea 2 in plain torch: the transformer, its text encoder, its VAE, and the way to an image.

Runs without ComfyUI and never imports it.
"""

from .arguments import PromptImages, References
from .checkpoints.identify import CheckpointError
from .checkpoints.text_encoder import load_text_encoder
from .checkpoints.transformer import load_transformer, save_transformer
from .checkpoints.vae import load_vae
from .config import PRESETS, RAW, TURBO, Preset, TextEncoderConfig, TransformerConfig, VAEConfig
from .guidance import GuidanceSchedule
from .pipeline import Krea2Pipeline
from .sampling import denoise
from .schedule import shift_mu, sigma_schedule
from .text.encoder import Qwen3VLTextEncoder
from .text.expander import PromptExpander
from .text.prompt_images import PromptImage
from .text.tokenizer import Krea2Tokenizer
from .transformer.model import Krea2Transformer
from .transformer.references import Reference, ReferenceSettings
from .transformer.text_attention import NegativeGuidance
from .vae.model import QwenImageVAE

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
    "PromptImages",
    "Qwen3VLTextEncoder",
    "QwenImageVAE",
    "Reference",
    "ReferenceSettings",
    "References",
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
