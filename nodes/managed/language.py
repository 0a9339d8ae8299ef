"""What the text encoder lacks for writing, under ComfyUI's management.

The last layer and the final norm are a part of their own with a patcher of its own, loaded from
the encoder's file when text is first written and then beside the encoder, whose layers it shares.
"""

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...krea2_model.gguf import GGUFTensor, dequantise
from ...krea2_model.identify import TEXT_ENCODER
from ...krea2_model.language import LanguageModel, LanguageTail, read_language_tail
from .gguf import GGUFOperations, is_blocks, wrap
from .hooks import PatchHooks
from .weights import check_weights, open_part

# Rows of a head in blocks that are turned into numbers at a time.
_ROWS = 16384


class LazyTail:
    """The tail of the encoder in a file, loaded on first use; one for all clones of a CLIP.

    make_layers: the layer namespace for the encoder's options (`clip.encoder_layers`).
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None, make_layers: Callable):
        self.path = Path(path)
        self._dtype = dtype
        self._make_layers = make_layers
        self.patcher: comfy.model_patcher.ModelPatcher | None = None

    def load(self, like: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """Its patcher, on the devices and of the kind of the encoder's.

        Raises CheckpointError where the file ends with the encoder.
        """
        if self.patcher is None:
            self.patcher = self._load(like)
        return self.patcher

    def _load(self, like):
        checkpoint = open_part(self.path, "text_encoder")
        state = read_language_tail(checkpoint)
        bare = state.build(device="meta")
        quantisation = check_weights(bare, state.tensors, checkpoint.path, TEXT_ENCODER)
        blocks = any(isinstance(tensor, GGUFTensor) for tensor in state.tensors.values())
        options = {}
        if quantisation is not None:
            options["quantization_metadata"] = quantisation
        if blocks:
            options["custom_operations"] = GGUFOperations
        dtype = self._dtype or state.tensors["norm.weight"].dtype
        tail: LanguageTail = state.build(
            layers=self._make_layers(options, dtype),
            device=like.offload_device,
            dtype=dtype,
            attend=PatchHooks({}).attention,
        )
        tail.requires_grad_(False).eval()
        comfy.model_management.archive_model_dtypes(tail)
        kind = comfy.model_patcher.ModelPatcher
        if like.is_dynamic() and not blocks:
            kind = comfy.model_patcher.CoreModelPatcher
        patcher = kind(tail, load_device=like.load_device, offload_device=like.offload_device)
        patcher.set_model_compute_dtype(torch.float32)
        tensors = {name: wrap(tensor, torch.float32) for name, tensor in state.tensors.items()}
        tail.load_state_dict(tensors, strict=False, assign=blocks or patcher.is_dynamic())
        return patcher


def language_model(encoder, tail: LanguageTail, device: torch.device) -> LanguageModel:
    """Encoder and tail as one; in bfloat16 where core writes in it too, else in float32."""
    half = comfy.model_management.should_use_bf16(device)
    dtype = torch.bfloat16 if half else torch.float32
    return LanguageModel(encoder, tail, head=tied_head, device=device, dtype=dtype)


def tied_head(embedding, hidden: torch.Tensor) -> torch.Tensor:
    """Logits by the embedding's table, wherever and however ComfyUI holds it."""
    weight, _, stream = comfy.ops.cast_bias_weight(embedding, hidden, offloadable=True)
    if is_blocks(weight):
        logits = _head_of_blocks(weight, hidden)
    else:
        plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        logits = torch.nn.functional.linear(hidden, plain.to(hidden.dtype))
    comfy.ops.uncast_bias_weight(embedding, weight, None, stream)
    return logits


def _head_of_blocks(weight, hidden: torch.Tensor) -> torch.Tensor:
    """A run of rows at a time: the whole table in numbers is 1.6 GB."""
    form, width = weight._params.format, weight.shape[1]
    pieces = []
    for rows in weight._qdata.reshape(weight.shape[0], -1).split(_ROWS):
        values = dequantise(rows, form, (len(rows), width)).to(hidden.dtype)
        pieces.append(torch.nn.functional.linear(hidden, values))
    return torch.cat(pieces, dim=-1)
