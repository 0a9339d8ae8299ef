"""Parts of a text encoder's file that are loaded on first need, each with a patcher of its own.

Text alone needs neither the language tail (language_tail.py) nor the vision tower (vision.py). A
part is loaded from the encoder's file on first use, then together with the encoder, and ComfyUI
moves and frees it like any other model.
"""

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch

from ...krea2_model.checkpoints.checkpoint import Checkpoint
from ...krea2_model.checkpoints.gguf import GGUFTensor
from ...krea2_model.checkpoints.identify import TEXT_ENCODER
from .backend import encoder_attention
from .checkpoint import check_weights, open_part
from .gguf import GGUFOperations, wrap


class LazyPart:
    """A part of the encoder's file, loaded on first use; one for all clones of a CLIP.

    read: a checkpoint to the part's state: its `tensors` by module name, and `build(**options)`.
    norm: the tensor whose dtype is the part's; matrices may be in 8 bits.
    make_layers: the layer namespace for the encoder's options (`clip.encoder_layers`).
    """

    def __init__(
        self,
        path: str | Path | Checkpoint,
        dtype: torch.dtype | None,
        make_layers: Callable,
        read: Callable,
        norm: str,
    ):
        self.path = path if isinstance(path, Checkpoint) else Path(path)
        self._dtype, self._make_layers, self._read, self._norm = dtype, make_layers, read, norm
        self.patcher: comfy.model_patcher.ModelPatcher | None = None

    def load(self, like: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """Its patcher, on the devices and of the kind of the encoder's.

        Raises CheckpointError where the file lacks the part.
        """
        if self.patcher is None:
            self.patcher = self._load(like)
        return self.patcher

    def file_tensors(self, like) -> dict[str, torch.Tensor]:
        """Its tensors as they are saved, by module name. Raises as `load` does."""
        return self.load(like).model_state_dict_for_saving()

    def _load(self, like):
        checkpoint = open_part(self.path, "text_encoder")
        state = self._read(checkpoint)
        bare = state.build(device="meta")
        quantisation = check_weights(bare, state.tensors, checkpoint.path, TEXT_ENCODER)
        has_gguf = any(isinstance(tensor, GGUFTensor) for tensor in state.tensors.values())
        options = {}
        if quantisation is not None:
            options["quantization_metadata"] = quantisation
        if has_gguf:
            options["custom_operations"] = GGUFOperations
        dtype = self._dtype or state.tensors[self._norm].dtype
        part = state.build(
            layers=self._make_layers(options, dtype),
            device=like.offload_device,
            dtype=dtype,
            attend=encoder_attention(),
        )
        part.requires_grad_(False).eval()
        comfy.model_management.archive_model_dtypes(part)
        kind = comfy.model_patcher.ModelPatcher
        if like.is_dynamic() and not has_gguf:
            kind = comfy.model_patcher.CoreModelPatcher
        patcher = kind(part, load_device=like.load_device, offload_device=like.offload_device)
        patcher.set_model_compute_dtype(torch.float32)
        tensors = {name: wrap(tensor, torch.float32) for name, tensor in state.tensors.items()}
        part.load_state_dict(tensors, strict=False, assign=has_gguf or patcher.is_dynamic())
        return patcher
