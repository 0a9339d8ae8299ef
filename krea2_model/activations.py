"""Estimates of the memory that parts need besides their weights, in bytes.

The numbers are the peaks that torch's operations reach on tensors without content (see
tests/unit/test_memory_plan.py), where attention holds no scores.
"""

from __future__ import annotations

import math

from torch import Tensor

from .memory_plan import ENCODER, TRANSFORMER, VAE
from .text_encoder import Qwen3VLTextEncoder
from .transformer import Krea2Transformer
from .vae import QwenImageVAE

# Of the text a run is planned for, before it is tokenised: the official length.
TEXT_TOKENS = 512

# Numbers of the weights' dtype that are alive at the peak of a block, a token and feature:
# of the hidden size where it attends, of the MLP's width beyond that.
_HIDDEN, _MLP = 9, 2
_ENCODER_HIDDEN, _ENCODER_MLP = 20, 2
# Numbers a pixel of an image while the VAE decodes or encodes it.
_PIXEL = 600


def token_count(images: Tensor, downscale: int = 1) -> int:
    """Tokens of an image by its latents (..., h, w), or by pixels, of which a latent has more."""
    return math.prod(-(-side // (2 * downscale)) for side in images.shape[-2:])


def activations(
    transformer: Krea2Transformer,
    text_encoder: Qwen3VLTextEncoder,
    vae: QwenImageVAE,
    *,
    batch: int,
    image: int,
    text: int = TEXT_TOKENS,
    references: int = 0,
) -> dict[str, int]:
    """Bytes by the name of the part for a run.

    image, text, references: tokens of each of `batch` sequences.
    """
    return {
        ENCODER: _of_encoder(text_encoder, text),
        TRANSFORMER: _of_transformer(transformer, batch * (image + text + references)),
        # One image at a time, so a batch needs no more.
        VAE: _of_vae(vae, 256 * max(image, references)),
    }


def _of_transformer(transformer: Krea2Transformer, tokens: int) -> int:
    config = transformer.config
    attention = _HIDDEN * config.hidden_size
    mlp = 3 * config.hidden_size + _MLP * config.intermediate_size
    return tokens * max(attention, mlp) * transformer.compute_dtype.itemsize


def _of_encoder(encoder: Qwen3VLTextEncoder, tokens: int) -> int:
    config = encoder.config
    features = _ENCODER_HIDDEN * config.hidden_size + _ENCODER_MLP * config.intermediate_size
    features += len(config.tap_layers) * config.hidden_size
    return tokens * features * encoder.embed_tokens.weight.element_size()


def _of_vae(vae: QwenImageVAE, pixels: int) -> int:
    return pixels * _PIXEL * next(vae.parameters()).element_size()
