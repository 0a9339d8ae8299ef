"""ComfyUI's attention selection and transformer patches, around our transformer."""

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import torch

from ...krea2_model.attention import repeat_heads
from ...krea2_model.transformer import Hooks

try:
    import comfy.model_prefetch as model_prefetch
except ImportError:  # an older ComfyUI streams weights without looking ahead
    model_prefetch = None


class PatchHooks(Hooks):
    """Applies a run's `transformer_options`.

    Honoured are the attention override, `post_input`, `attn1_patch` (queries and keys normed, not
    yet rotated), `attn1_output_patch` and `patches_replace["dit"][("single_block", i)]`.
    """

    def __init__(self, transformer_options):
        self.options = transformer_options.copy()
        self.patches = self.options.get("patches", {})
        self.replacements = self.options.get("patches_replace", {}).get("dit", {})

    def attend(self, query, key, value, rope=None, mask=None):
        in_block = "block_index" in self.options
        if in_block:
            for patch in self.patches.get("attn1_patch", ()):
                out = patch(
                    query, key, value, pe=rope, attn_mask=mask, extra_options=self.options.copy()
                )
                query, key, value = out.get("q", query), out.get("k", key), out.get("v", value)
                rope, mask = out.get("pe", rope), out.get("attn_mask", mask)
        if rope is not None:
            query, key = comfy.ldm.flux.math.apply_rope(query, key, rope)
        if mask is not None and mask.dtype == torch.bool:
            # Some of ComfyUI's attention functions add a boolean mask to the scores as 0 and 1.
            hidden = torch.zeros_like(mask, dtype=query.dtype)
            mask = hidden.masked_fill(~mask, -torch.finfo(query.dtype).max)
        key, value = repeat_heads(query, key, value)
        # Looked up at call time: command line flags and other packs choose the function.
        out = comfy.ldm.modules.attention.optimized_attention(
            query,
            key,
            value,
            query.shape[1],
            mask=mask,
            skip_reshape=True,
            transformer_options=self.options,
        )
        if in_block:
            for patch in self.patches.get("attn1_output_patch", ()):
                out = patch(out, self.options.copy())
        return out

    def tokens(self, text, image, text_positions, image_positions):
        for patch in self.patches.get("post_input", ()):
            batch = len(image)
            out = patch(
                {
                    "img": image,
                    "txt": text,
                    "img_ids": image_positions.expand(batch, -1, -1).to(image.device),
                    "txt_ids": text_positions.expand(batch, -1, -1).to(image.device),
                    "transformer_options": self.options,
                }
            )
            image, text = out["img"], out["txt"]
            image_positions, text_positions = out["img_ids"].cpu(), out["txt_ids"].cpu()
        self.options["img_slice"] = [text.shape[1], text.shape[1] + image.shape[1]]
        return text, image, text_positions, image_positions

    def blocks(self, blocks, hidden, vector, rope, mask, split):
        self.options["total_blocks"] = len(blocks)
        self.options["block_type"] = "single"
        device, queue = hidden.device, None
        if model_prefetch is not None:
            queue = model_prefetch.make_prefetch_queue(list(blocks), device, self.options)
        for index, block in enumerate(blocks):
            self.options["block_index"] = index
            if queue is not None:
                model_prefetch.prefetch_queue_pop(queue, device, block)
            hidden = self._block(index, block, hidden, vector, rope, mask, split)
        if queue is not None:
            model_prefetch.prefetch_queue_pop(queue, device, None)
        del self.options["block_index"]
        return hidden

    def _block(self, index, block, hidden, vector, rope, mask, split):
        replacement = self.replacements.get(("single_block", index))
        if replacement is None:
            return block(hidden, vector, rope, mask, split, self.attend)

        def original(args):
            conditions = (args["vec"], args["pe"], args.get("attn_mask"), split)
            return {"img": block(args["img"], *conditions, self.attend)}

        args = {"img": hidden, "vec": vector, "pe": rope, "attn_mask": mask}
        args["transformer_options"] = self.options
        return replacement(args, {"original_block": original})["img"]
