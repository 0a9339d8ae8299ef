"""CLIP: our Qwen3-VL text encoder under ComfyUI's model management."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch

from ...krea2_model.checkpoints.checkpoint import Checkpoint
from ...krea2_model.checkpoints.gguf import GGUFTensor
from ...krea2_model.checkpoints.identify import TEXT_ENCODER
from ...krea2_model.checkpoints.text_encoder import read_text_encoder
from ...krea2_model.text.encoder import Qwen3VLTextEncoder
from ...krea2_model.text.generation import Sampling
from .checkpoint import check_weights, open_part
from .gguf import GGUFOperations, GGUFPatcher, wrap
from .image_tokens import cache_key, has_images, row_length
from .language_tail import LazyTail
from .text_model import Krea2TextModel, encoder_layers, joined_rows, rows_of
from .tokenizer import NAME, Krea2ClipTokenizer
from .vision import LazyVision

# Limits of cached encodings, in main memory: 100 tokens take 12 MB, eight images of
# 384 px 140.
KEPT_ENCODINGS, KEPT_BYTES = 32, 512 * 1024**2


class Krea2CLIP(comfy.sd.CLIP):
    """A CLIP that caches its last encodings, a row each, by tokens and patches.

    While a prompt is edited its negative stays the same: from the cache it needs no encoder to be
    loaded. Equal rows of a batch are encoded once.
    """

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.__class__ = Krea2CLIP
        return clone

    def load_model(self, tokens={}):  # noqa: B006 - core's own signature
        if not has_images(tokens.get(NAME, ())):
            return super().load_model(tokens)
        model, device = self.cond_stage_model, self.patcher.load_device
        needed = model.memory_estimation_function(tokens, device)
        # Together: a part loaded alone may push out the other.
        parts = [self.patcher, model.vision.load(self.patcher)]
        comfy.model_management.load_models_gpu(parts, memory_required=needed)
        return self.patcher

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        keys = self._keys(tokens)
        if keys is None:
            return super().encode_from_tokens(tokens, return_pooled, return_dict)
        encodings = self.cond_stage_model.encodings
        rows = {key: encodings[key] for key in keys if key in encodings}
        uncached = {
            key: row for key, row in zip(keys, tokens[NAME], strict=True) if key not in rows
        }
        if uncached:
            remaining = {**tokens, NAME: list(uncached.values())}
            result = super().encode_from_tokens(remaining, return_dict=True)
            encoded = rows_of(result["cond"], result.get("attention_mask"))
            rows |= zip(uncached, encoded, strict=True)
        states, mask = joined_rows([rows[key] for key in keys])
        self._remember(rows)
        if not return_dict:
            return (states, None) if return_pooled else states
        extra = {} if mask is None else {"attention_mask": mask}
        return {"cond": states, "pooled_output": None, **extra}

    def _remember(self, rows: dict[tuple, torch.Tensor]) -> None:
        """Cache a call's rows, and evict the oldest beyond the limits."""
        encodings = self.cond_stage_model.encodings
        for key, states in rows.items():
            if key not in encodings and states.nbytes <= KEPT_BYTES:
                encodings[key] = states.clone()
            if key in encodings:
                encodings.move_to_end(key)
        while len(encodings) > KEPT_ENCODINGS or (
            sum(states.nbytes for states in encodings.values()) > KEPT_BYTES
        ):
            encodings.popitem(last=False)

    def write(self, tokens, sampling: Sampling, max_tokens: int, seed: int = 0):
        """Yield the token ids that follow a text's.

        Raises CheckpointError where the file lacks the language tail, and ComfyUI's exception where
        the run was interrupted.
        """
        rows = tokens.get(NAME, ())
        if len(rows) != 1:
            raise ValueError(f"There are {len(rows)} texts to write on from; expected one.")
        row = [pair[0] for pair in rows[0]]
        model, device = self.cond_stage_model, self.patcher.load_device
        parts = [self.patcher, model.tail.load(self.patcher)]
        if has_images(rows):
            parts.append(model.vision.load(self.patcher))
        # Together: a part loaded alone may push out the other.
        needed = model.memory_estimation_function(tokens, device)
        needed += model.writing_memory(row_length(row) + min(max_tokens, 1024))
        comfy.model_management.load_models_gpu(parts, memory_required=needed)
        model.reset_clip_options()
        model.set_clip_options({"execution_device": device})
        written = model.write(row, sampling, max_tokens, seed)
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with comfy.model_management.cuda_device_context(device):
                token = next(written, None)
            if token is None:
                return
            yield token

    def generate(
        self,
        tokens,
        do_sample=True,
        max_length=256,
        temperature=1.0,
        top_k=50,
        top_p=0.95,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=None,
        presence_penalty=0.0,
    ):
        """Core's entry point for writing text (Generate Text), with its arguments and defaults."""
        sampling = Sampling()
        if do_sample:
            sampling = Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty or 0.0,
            )
        progress, written = comfy.utils.ProgressBar(max_length), []
        for token in self.write(tokens, sampling, max_length, seed or 0):
            written.append(token)
            progress.update(1)
        return written

    def state_dict_for_saving(self):
        """With the language tail and the vision tower, where the file has them."""
        state, model = super().state_dict_for_saving(), self.cond_stage_model
        for part, prefix in ((model.tail, "model."), (model.vision, "visual.")):
            try:
                tensors = part.file_tensors(self.patcher)
            except (ValueError, OSError):
                continue
            state |= {f"{NAME}.transformer.{prefix}{n}": tensor for n, tensor in tensors.items()}
        return state

    def _keys(self, tokens):
        """Cache keys of the rows; None where an encoding may change with time or by other packs."""
        if self.patcher.forced_hooks is not None or self.apply_hooks_to_conds is not None:
            return None
        if self.cond_stage_model.is_changed:
            return None
        rows = [cache_key(row) for row in tokens.get(NAME, ())]
        if not rows or not all(isinstance(token, (int, tuple)) for row in rows for token in row):
            return None
        return [(self.patcher.patches_uuid, row) for row in rows]


def load_clip(
    path: str | Path | Checkpoint, dtype: torch.dtype | None = None, *, disable_dynamic=False
):
    """Load a Qwen3-VL text encoder file or folder as a CLIP.

    dtype: of the stored weights; None keeps the file's. Activations are float32.
    Raises CheckpointError that says what the file is and what was expected.
    """
    checkpoint = open_part(path, "text_encoder")
    state = read_text_encoder(checkpoint)
    bare = Qwen3VLTextEncoder(state.config, device="meta")
    quantisation = check_weights(bare, state.tensors, checkpoint.path, TEXT_ENCODER)
    # A norm's dtype: embeddings and matrices may be in 8 bits, which is no dtype for the rest.
    stored = state.tensors["layers.0.input_layernorm.weight"].dtype
    options: dict[str, Any] = {"dtype": dtype or stored}
    if quantisation is not None:
        options["quantization_metadata"] = quantisation
    has_gguf = any(isinstance(tensor, GGUFTensor) for tensor in state.tensors.values())
    if has_gguf:
        options["custom_operations"] = GGUFOperations
    target = comfy.supported_models_base.ClipTarget(Krea2ClipTokenizer, Krea2TextModel)
    target.params["config"] = state.config
    clip = Krea2CLIP(
        target,
        parameters=sum(weight.numel() for weight in bare.parameters()),
        state_dict=[{name: wrap(t, torch.float32) for name, t in state.tensors.items()}],
        model_options=options,
        disable_dynamic=disable_dynamic or has_gguf,
    )
    if has_gguf:
        clip.patcher.__class__ = type("BlockPatcher", (GGUFPatcher, type(clip.patcher)), {})
    clip.patcher.cached_patcher_init = (_load_patcher, (path, dtype))
    clip.cond_stage_model.tail = LazyTail(path, dtype, encoder_layers)
    clip.cond_stage_model.section.vision = LazyVision(path, dtype, encoder_layers)
    return clip


def _load_patcher(path, dtype, disable_dynamic=False):
    return load_clip(path, dtype, disable_dynamic=disable_dynamic).patcher
