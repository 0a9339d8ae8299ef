"""Estimates of the memory that parts need besides their weights, in bytes.

They are upper bounds of the peaks that torch's operations reach on tensors without content, where
attention holds no scores; tests/unit/test_memory_plan.py counts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..checkpoints.quantised_layers import temporary_bytes
from ..text.encoder import Qwen3VLTextEncoder
from ..transformer.model import Krea2Transformer
from ..vae.model import TILE, QwenImageVAE, tiled_bytes
from .plan import ENCODER, TRANSFORMER, VAE

# Text of a run that is planned before it is tokenised: the official length.
TEXT_TOKENS = 512

# Hidden states of the weights' dtype that are alive at the peak, a token: of the transformer's
# blocks, of its text fusion (a token is one state a tap there), of the encoder beside its taps.
_BLOCK_STATES, _FUSION_STATES, _ENCODER_STATES = 8.5, 10.1, 15
# More of the image's where attention to style pictures is merged, in float32.
_MERGE_STATES = 2
# Keys and values of some thousand tokens, logits, and the layer and head that only writing needs.
WRITING_BYTES = 1_500_000_000
# Hidden states of the VAE's first width that are alive while it decodes or encodes an image.
_VAE_STATES = 8.4
# Larger images are decoded in tiles at once, which give the same picture.
WHOLE_PIXELS = 2048 * 2048


def activations(
    transformer: Krea2Transformer,
    text_encoder: Qwen3VLTextEncoder,
    vae: QwenImageVAE,
    *,
    batch: int,
    image: int,
    text: int = TEXT_TOKENS,
    references: int = 0,
    styles: Sequence[int] = (),
) -> dict[str, int]:
    """Bytes by the name of the part for a run.

    image, text, references: tokens of each of `batch` sequences. styles: of each style picture,
    whose keys and values of one step are held.
    """
    sequence = image + text + references
    calls = max(
        _transformer_bytes(transformer, batch, sequence, text),
        _transformer_bytes(transformer, 1, max(styles, default=0) + text, text),
    )
    return {
        ENCODER: _encoder_bytes(text_encoder, text),
        TRANSFORMER: calls + _style_bytes(transformer, batch * sequence, sum(styles), batch),
        # One image at a time, so a batch needs no more.
        VAE: vae_bytes(vae, 256 * max(image, references, *styles)),
    }


def _style_bytes(transformer: Krea2Transformer, image: int, tokens: int, batch: int) -> int:
    """Keys and values of style pictures: in all blocks, and twice in one for a batch; the merge."""
    if not tokens:
        return 0
    config = transformer.config
    heads = config.num_key_value_heads * config.attention_head_dim
    numbers = 2 * tokens * heads * (config.num_layers + 2 * batch)
    numbers += image * _MERGE_STATES * config.hidden_size
    return numbers * transformer.compute_dtype.itemsize


def _transformer_bytes(transformer: Krea2Transformer, batch: int, tokens: int, text: int) -> int:
    config = transformer.config
    step = tokens * _BLOCK_STATES * config.hidden_size
    fusion = text * _FUSION_STATES * config.num_text_layers * config.text_hidden_dim
    numbers = batch * max(step, fusion)
    return round(numbers * transformer.compute_dtype.itemsize) + temporary_bytes(transformer)


def _encoder_bytes(encoder: Qwen3VLTextEncoder, tokens: int) -> int:
    states = _ENCODER_STATES + len(encoder.config.tap_layers)
    numbers = tokens * states * encoder.config.hidden_size
    return numbers * encoder.embed_tokens.weight.element_size() + temporary_bytes(encoder)


def vae_bytes(vae: QwenImageVAE, pixels: int) -> int:
    """Bytes that a VAE needs besides its weights for one image of so many pixels."""
    itemsize = next(vae.parameters()).element_size()
    if pixels <= WHOLE_PIXELS:
        return round(pixels * _VAE_STATES * vae.config.base_dim * itemsize)
    cells = math.isqrt(pixels) // vae.config.downscale
    return round(tiled_bytes(vae.config, (cells, cells), TILE, itemsize, _VAE_STATES))
