"""ComfyUI's attention selection and transformer patches, around our transformer."""

import inspect
from collections.abc import Callable

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch

from ...krea2_model.nn import switches
from ...krea2_model.nn.attention import attend as attend_plainly
from ...krea2_model.nn.attention import repeat_heads, takes_grouped_heads
from ...krea2_model.nn.attention_backends import preferred
from ...krea2_model.nn.kernels import (
    apply_rope,
    keeping_inputs,
    may_overwrite,
    modulated_norm,
    norm_and_rotate,
)
from ...krea2_model.nn.partial_attention import attend_partially
from ...krea2_model.transformer.backend import Backend
from ...krea2_model.transformer.extensions import AttentionExtensions
from ...krea2_model.transformer.modulation import for_blocks
from ...krea2_model.transformer.references import additive_mask
from ...krea2_model.transformer.shared_calls import attend_past_padding
from .contract import announce
from .graphs import BlockGraphs
from .run_cache import ScheduleTimes

try:
    import comfy.model_prefetch as model_prefetch
except ImportError:  # an older ComfyUI streams weights without looking ahead
    model_prefetch = None

# Key of another pack's attention function in transformer_options.
OVERRIDE = "optimized_attention_override"

# ComfyUI's attention functions take grouped heads; older versions do not.
_RESHAPE = getattr(comfy.ldm.modules.attention, "_reshape_qkv_to_heads", None)
_KNOWS_GROUPED_HEADS = (
    _RESHAPE is not None and "enable_gqa" in inspect.signature(_RESHAPE).parameters
)

# Attention functions of ComfyUI that leave a mask out, or fail on it, in one version or another.
_WITHOUT_MASKS = ("attention_sage", "attention3_sage", "attention_flash")


class ComfyBackend(Backend):
    """Applies a run's `transformer_options`, with ComfyUI's kernels and choice of attention.

    Honoured are the attention override, `post_input`, `attn1_patch` (queries and keys normed, not
    yet rotated), `attn1_output_patch` and `patches_replace["dit"][("single_block", i)]`.
    """

    def __init__(
        self,
        transformer_options: dict,
        is_touched: Callable | None = None,
        *,
        extensions: AttentionExtensions | None = None,
        padding: list[int] | None = None,
        times: ScheduleTimes | None = None,
        graphs: BlockGraphs | None = None,
        has_live_loras: bool = False,
    ):
        """A backend for one call.

        is_touched: tells whether others changed something in a block, see `contract`; None where
            nobody did.
        extensions: of attention, None without any.
        padding: padding tokens at the front of each sequence.
        times: time embeddings of the run's schedule. graphs: CUDA graphs of the run's blocks.
        has_live_loras: layers of blocks have hooks, which compiled blocks would pass over.
        """
        self.options = transformer_options.copy()
        announce(self, self.options)
        self.patches = self.options.get("patches", {})
        self.replacements = self.options.get("patches_replace", {}).get("dit", {})
        self.is_touched = is_touched
        self.extensions, self.padding = extensions, padding
        self.times, self.graphs = times, graphs
        self.has_live_loras = has_live_loras
        self._has_attended = False

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        self._has_attended = True
        in_block = "block_index" in self.options
        patches = self.patches.get("attn1_patch", ()) if in_block else ()
        if patches:
            query, key = norm_and_rotate(query, key, norm)
            for patch in patches:
                out = patch(
                    query, key, value, pe=rope, attn_mask=mask, extra_options=self.options.copy()
                )
                query, key, value = out.get("q", query), out.get("k", key), out.get("v", value)
                rope, mask = out.get("pe", rope), out.get("attn_mask", mask)
            if rope is not None:
                query, key = apply_rope(query, rope), apply_rope(key, rope)
        elif rope is not None and query_slice is None and _has_kernels(query):
            if not (may_overwrite() or torch.compiler.is_compiling()):
                query, key = query.clone(), key.clone()
            kernels = comfy.quant_ops.ck
            query, key = kernels.rms_rope_(query, key, rope, norm.query, norm.key, norm.eps)
        else:
            query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        if self.padding is not None and in_block:
            return attend_past_padding(
                self.attention, self.padding, query, key, value, mask, query_slice
            )
        if self.extensions is not None and in_block:
            # An attention function of another pack is called with masks: it returns no sums.
            partial = None if OVERRIDE in self.options else attend_partially
            block = self.options["block_index"]
            out = self.extensions.attend(
                self.attention, partial, block, query, key, value, mask, query_slice
            )
        else:
            out = self.attention(query, key, value, mask)
        patches = self.patches.get("attn1_output_patch", ()) if in_block else ()
        for patch in patches:
            out = patch(out, self.options.copy())
        # The caller overwrites it, and other packs may hold what they were passed.
        return out.clone() if patches or OVERRIDE in self.options else out

    def attention(self, query, key, value, mask=None):
        """Attention over heads (B, H, L, D) by the function that ComfyUI's user chose."""
        # Looked up at call time: command line flags and other packs choose the function.
        attend = comfy.ldm.modules.attention.optimized_attention
        if "cudnn" in switches.active and self._is_left_to_table(attend, query, key, value, mask):
            return attend_plainly(query, key, value)
        if mask is not None:
            mask = _additive(mask, query.dtype)
        options = {"mask": mask, "skip_reshape": True, "transformer_options": self.options}
        if query.shape[1] != key.shape[1]:
            grouped = mask is None and takes_grouped_heads(query) and _KNOWS_GROUPED_HEADS
            if grouped and OVERRIDE not in self.options:
                options["enable_gqa"] = True
            else:
                key, value = repeat_heads(query, key, value)
        if mask is not None and attend.__name__ in _WITHOUT_MASKS:
            attend = comfy.ldm.modules.attention.attention_pytorch
        return attend(query, key, value, query.shape[1], **options)

    def _is_left_to_table(self, attend, query, key, value, mask) -> bool:
        """True if the table names a kernel, ComfyUI attends by plain torch, and nobody chose that.

        The order in which ComfyUI has torch try its kernels is not a user's choice.
        """
        own = comfy.ldm.modules.attention
        return (
            preferred(query, key, value, mask) is not None
            and OVERRIDE not in self.options
            and not comfy.model_management.args.use_pytorch_cross_attention
            and attend is own.attention_pytorch
            and attend.__module__ == own.__name__
            and comfy.ops.scaled_dot_product_attention.__module__ == comfy.ops.__name__
        )

    def modulated_norm(self, hidden, scale, shift, eps):
        if _has_kernels(hidden):
            return comfy.quant_ops.ck.rms_adaln(hidden, scale, shift, eps)
        return modulated_norm(hidden, scale, shift, eps)

    def embed_time(self, embed, timestep):
        sigmas = self.options.get("sample_sigmas")
        if self.times is None or sigmas is None:
            return embed(timestep)
        return self.times.embed(embed, timestep, sigmas)

    def prepare_tokens(self, text, image, text_positions, image_positions):
        for patch in self.patches.get("post_input", ()):
            batch = len(image)
            out = patch(
                {
                    "img": image,
                    "txt": text,
                    "img_ids": image_positions.repeat(batch, 1, 1).to(image.device),
                    "txt_ids": text_positions.repeat(batch, 1, 1).to(image.device),
                    "transformer_options": self.options,
                }
            )
            image, text = out["img"], out["txt"]
            image_positions, text_positions = out["img_ids"].cpu(), out["txt_ids"].cpu()
        self.options["img_slice"] = [text.shape[1], text.shape[1] + image.shape[1]]
        return text, image, text_positions, image_positions

    def run_blocks(self, blocks, hidden, query_slice, vector, rope, mask, split, modulation=None):
        touched = [self.is_touched is not None and self.is_touched(block) for block in blocks]
        conditions = (query_slice, vector, rope, mask, split)
        graphs = self.graphs if self._may_record() else None
        if graphs is None or modulation is None or mask is not None or any(touched):
            return self._run(blocks, touched, hidden, *conditions, modulation)

        def run(hidden, rows):
            step = modulation._replace(rows=rows)
            return self._run(blocks, touched, hidden, *conditions, step)

        rows = modulation.rows
        key = (
            hidden.shape,
            hidden.dtype,
            rows.shape,
            query_slice,
            split,
            id(rope),
        )
        return graphs.run(key, run, hidden, rows)

    def _may_record(self) -> bool:
        """True if the blocks of this call depend on nothing but tokens, times and weights."""
        others = (
            self.extensions,
            self.padding,
            self.patches,
            self.replacements,
            self.has_live_loras,
        )
        return OVERRIDE not in self.options and not any(others)

    def _run(self, blocks, touched, hidden, query_slice, vector, rope, mask, split, modulation):
        by_block = for_blocks(modulation, len(blocks))
        if self.extensions is not None:
            hidden, query_slice, rope, mask, split = self.extensions.prepare(
                hidden, query_slice, rope, mask, split
            )
            front = self.extensions.front
            self.options["img_slice"] = [front + at for at in self.options["img_slice"]]
        self.options["total_blocks"] = len(blocks)
        self.options["block_type"] = "single"
        device, queue = hidden.device, None
        if model_prefetch is not None:
            queue = model_prefetch.make_prefetch_queue(list(blocks), device, self.options)
        if self.has_live_loras:
            blocks = [getattr(block, "_orig_mod", block) for block in blocks]
        last = len(blocks) - 1
        # Others' attention may expect a query for every key.
        needs_all = (
            touched[last]
            or OVERRIDE in self.options
            or any(self.patches.get(kind) for kind in ("attn1_patch", "attn1_output_patch"))
        )
        for index, block in enumerate(blocks):
            self.options["block_index"] = index
            if queue is not None:
                model_prefetch.prefetch_queue_pop(queue, device, block)
            conditions = (vector, rope, mask, split)
            replacement = self.replacements.get(("single_block", index))
            run = self._in_core_s_way(block) if touched[index] else block
            if replacement is not None:
                hidden = self._replaced(replacement, run, hidden, *conditions)
            elif touched[index]:
                hidden = run(hidden, *conditions, self)
            else:
                queries = query_slice if index == last and not needs_all else None
                hidden = block(hidden, *conditions, self, queries, by_block[index])
                if queries is not None:
                    query_slice = (0, hidden.shape[1])
        if queue is not None:
            model_prefetch.prefetch_queue_pop(queue, device, None)
        del self.options["block_index"]
        return hidden[:, slice(*query_slice)]

    def _in_core_s_way(self, block):
        """A block that others changed, called as ComfyUI's own Krea 2 calls it."""

        def run(hidden, vector, rope, mask, split, _):
            options = {"transformer_options": self.options}
            if split is not None:
                options["timestep_zero_index"] = split
            # Core stacks the vectors of the step and of time zero in the batch.
            vector = torch.cat(vector.to(hidden.dtype).split(1, dim=1))
            if mask is not None:
                mask = _additive(mask, hidden.dtype)
            self._has_attended = False
            with keeping_inputs():
                out = block(hidden, vector, rope, mask, **options)
            if not self._has_attended and self.extensions is not None:
                raise ValueError(
                    "A node of another pack has replaced the model's attention, where prompt "
                    "weights, regions, Krea 2 Negative (NAG), style pictures, boosts and cached "
                    "references have no effect. Remove that node, or these."
                )
            return out

        return run

    def _replaced(self, replacement, block, hidden, vector, rope, mask, split):
        def original(args):
            # A copy: blocks work in place, and a patch may use its tensor again.
            conditions = (args["vec"], args["pe"], args.get("attn_mask"), split)
            return {"img": block(args["img"].clone(), *conditions, self)}

        args = {"img": hidden, "vec": vector, "pe": rope, "attn_mask": mask}
        args["transformer_options"] = self.options
        # The next block overwrites it, and the patch may hold it.
        return replacement(args, {"original_block": original})["img"].clone()


def encoder_attention() -> Callable:
    """Attention for the text encoder and its parts, which raises where the run is cancelled.

    So encoding a long prompt or a large image is cancelled within a layer.
    """
    attention = ComfyBackend({}).attention

    def attend(query, key, value, mask=None):
        comfy.model_management.throw_exception_if_processing_interrupted()
        return attention(query, key, value, mask)

    return attend


def _additive(mask, dtype):
    """An additive mask: some attention functions would add a boolean one as 0 and 1."""
    return additive_mask(mask).clamp(min=torch.finfo(dtype).min).to(dtype)


def _has_kernels(tensor) -> bool:
    """True if ComfyUI has fused kernels, which have no gradients, for a tensor's device."""
    kernels = getattr(comfy.quant_ops, "ck", None)
    return (
        kernels is not None
        and tensor.device.type == "cuda"
        and not torch.is_grad_enabled()
        and hasattr(kernels, "rms_rope_")
        and hasattr(kernels, "rms_adaln")
        and any(kernels.registry.is_available(name) for name in ("cuda", "hip"))
    )
