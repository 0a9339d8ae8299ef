"""The last layer and the final norm of the language model, for generating text.

A part with a patcher of its own, loaded from the encoder's file when text is first generated and
then together with the encoder, whose layers it shares.
"""

from collections.abc import Sequence

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...krea2_model.checkpoints.gguf import dequantise
from ...krea2_model.checkpoints.text_encoder import read_language_tail
from ...krea2_model.text.language_model import LanguageModel, LanguageTail
from ...krea2_model.text.vision import ImageTokens
from .gguf import is_gguf
from .lazy_parts import LazyPart

# Rows of a GGUF head that are dequantised at a time.
_ROWS = 16384


class LazyTail(LazyPart):
    """The tail in the encoder's file."""

    def __init__(self, path, dtype, make_layers):
        super().__init__(path, dtype, make_layers, read_language_tail, "norm.weight")


def language_model(
    encoder, tail: LanguageTail, device: torch.device, images: Sequence[ImageTokens] = ()
) -> LanguageModel:
    """Encoder and tail as one model, in bfloat16 where core generates in it, else in float32."""
    half = comfy.model_management.should_use_bf16(device)
    dtype = torch.bfloat16 if half else torch.float32
    return LanguageModel(encoder, tail, head=tied_head, device=device, dtype=dtype, images=images)


def tied_head(embedding, hidden: torch.Tensor) -> torch.Tensor:
    """Logits by the embedding's table, wherever and however ComfyUI holds it."""
    weight, _, stream = comfy.ops.cast_bias_weight(embedding, hidden, offloadable=True)
    if is_gguf(weight):
        logits = _gguf_head(weight, hidden)
    else:
        plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        logits = torch.nn.functional.linear(hidden, plain.to(hidden.dtype))
    comfy.ops.uncast_bias_weight(embedding, weight, None, stream)
    return logits


def _gguf_head(weight, hidden: torch.Tensor) -> torch.Tensor:
    """Some rows at a time: the whole table dequantised is 1.6 GB."""
    form, width = weight._params.format, weight.shape[1]
    pieces = []
    for rows in weight._qdata.reshape(weight.shape[0], -1).split(_ROWS):
        values = dequantise(rows, form, (len(rows), width), hidden.dtype)
        pieces.append(torch.nn.functional.linear(hidden, values))
    return torch.cat(pieces, dim=-1)
