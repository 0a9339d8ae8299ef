"""The names of `from krea2_model import ...`; `krea2_model` imports it on first use."""

# ruff: noqa: F401

from __future__ import annotations

from .checkpoints.identify import CheckpointError
from .checkpoints.text_encoder import load_text_encoder
from .checkpoints.transformer import load_transformer, save_transformer
from .checkpoints.vae import load_vae
from .config import PRESETS, RAW, TURBO, Preset, TextEncoderConfig, TransformerConfig, VAEConfig
from .features.arguments import PromptImages, References
from .features.controls import Control
from .features.edits import Edit
from .features.inpainting import Inpaint
from .features.regions import Region, Regions
from .features.style_library import SavedStyle, StyleError, StyleLibrary
from .features.style_mixing import MixedStyle
from .features.styles import StyleTransfer
from .features.tiles import TilePrompts, TileSettings
from .features.upscaling import Upscale
from .features.variations import PromptBlend, Variation
from .guidance import GuidanceSchedule
from .pipeline.detail import DetailAreas
from .pipeline.grid import PictureGrid
from .pipeline.pipeline import Krea2Pipeline
from .sampling import denoise
from .schedule import shift_mu, sigma_schedule
from .text.describer import Describer
from .text.encoder import Qwen3VLTextEncoder
from .text.expander import PromptExpander
from .text.prompt_images import PromptImage
from .text.tokenizer import Krea2Tokenizer
from .tools.extract import Extraction, extract_lora
from .transformer.model import Krea2Transformer
from .transformer.references import Reference, ReferenceSettings
from .transformer.rotary_scaling import RotaryScaling
from .transformer.sparse_attention import SparseAttention
from .transformer.text_attention import NegativeGuidance
from .vae.model import QwenImageVAE
