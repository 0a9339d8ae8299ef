"""The names of `from krea2_model import ...`; `krea2_model` imports it on first use."""

# ruff: noqa: F401

from __future__ import annotations

from .arguments import PromptImages, References
from .checkpoints.identify import CheckpointError
from .checkpoints.text_encoder import load_text_encoder
from .checkpoints.transformer import load_transformer, save_transformer
from .checkpoints.vae import load_vae
from .config import PRESETS, RAW, TURBO, Preset, TextEncoderConfig, TransformerConfig, VAEConfig
from .controls import Control
from .detail import DetailAreas
from .edits import Edit
from .guidance import GuidanceSchedule
from .inpainting import Inpaint
from .picture_grid import PictureGrid
from .pipeline import Krea2Pipeline
from .regions import Region, Regions
from .sampling import denoise
from .schedule import shift_mu, sigma_schedule
from .style_library import SavedStyle, StyleError, StyleLibrary
from .style_mixing import MixedStyle
from .styles import StyleTransfer
from .text.describer import Describer
from .text.encoder import Qwen3VLTextEncoder
from .text.expander import PromptExpander
from .text.prompt_images import PromptImage
from .text.tokenizer import Krea2Tokenizer
from .tiles import TilePrompts, TileSettings
from .tools.extract import Extraction, extract_lora
from .transformer.model import Krea2Transformer
from .transformer.references import Reference, ReferenceSettings
from .transformer.rotary_scaling import RotaryScaling
from .transformer.sparse_attention import SparseAttention
from .transformer.text_attention import NegativeGuidance
from .upscaling import Upscale
from .vae.model import QwenImageVAE
from .variations import PromptBlend, Variation
