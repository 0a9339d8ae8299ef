"""Our transformer behind the calling convention of ComfyUI's own Krea 2."""

from dataclasses import replace

import comfy.patcher_extension
import comfy.utils
import torch

from ...krea2_model.transformer.text_attention import TextAttention, TextStates
from . import contract
from .backend import ComfyBackend
from .layers import comfy_layers
from .references import plan_for, tokens_of


class Krea2DiffusionModel(contract.Transformer):
    """The transformer behind ComfyUI's calling convention (that of core's own Krea 2)."""

    def __init__(self, config, dtype=None, device=None, operations=None, **unet_config):
        super().__init__(config, comfy_layers(operations), device=device, dtype=dtype)

    def forward(
        self,
        x,
        timesteps,
        context,
        attention_mask=None,
        ref_latents=None,
        transformer_options={},  # noqa: B006 - the signature third-party wrappers expect
        **kwargs,
    ):
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
        )
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, wrappers
        ).execute(x, timesteps, context, attention_mask, ref_latents, transformer_options, **kwargs)

    def _forward(
        self,
        x,
        timesteps,
        context,
        attention_mask=None,
        ref_latents=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):
        if ref_latents and "reference_plan" not in kwargs and contract.has_foreign_forward():
            return contract.foreign_forward(
                self, x, timesteps, context, attention_mask,
                ref_latents=ref_latents, transformer_options=transformer_options, **kwargs,
            )  # fmt: skip
        latents = _single_frame(x)
        mask = None if attention_mask is None else attention_mask > 0.5
        # Text is fused before a run only where nobody touches the model during it.
        backend = ComfyBackend(
            transformer_options, None if self.is_fused(context) else self.is_touched
        )
        # The latents come in the dtype that ComfyUI chose for this run.
        text, lengths = context, kwargs.get("text_lengths")
        if lengths is not None and min(lengths) < context.shape[1]:
            backend.padding = [context.shape[1] - length for length in lengths]
        cache = kwargs.get("run_cache")
        if cache is not None:
            backend.times, backend.graphs = cache.times, cache.graphs
        backend.text = self._text_attention(timesteps, mask, backend, kwargs)
        if not self.is_fused(context):
            text = self.fuse_context(context.to(latents.dtype), mask, backend)
        plan = kwargs.get("reference_plan")
        plan = plan or plan_for(ref_latents or (), kwargs.get("ref_latents_method"))
        references = []
        if ref_latents:
            beside = [_single_frame(latent) for latent in ref_latents]
            beside = [comfy.utils.repeat_to_batch_size(latent, len(latents)) for latent in beside]
            references = plan.references_at(timesteps[0].item(), beside)
        if references:
            backend.options["reference_image_num_tokens"] = [
                tokens_of(r.latents) for r in references
            ]
        if plan.kept is not None and references:
            backend.references = self._recorded(plan.kept, references, text.dtype, backend)
            references = []
        velocity = super().forward(
            latents,
            timesteps,
            text,
            mask,
            references=references,
            reference_method=plan.method,
            backend=backend,
            modulation=None if cache is None else cache.modulation(self, latents.device),
        )
        return velocity.reshape(x.shape)

    def _recorded(self, kept, references, dtype, backend):
        """What attention reads of references that see themselves alone, made once a run."""

        def backend_for(recorder):
            recording = ComfyBackend(backend.options, backend.is_touched)
            recording.references, recording.times = recorder, backend.times
            return recording

        # The images of a batch mostly have the same references, which need not be kept twice.
        single = [
            replace(r, latents=r.latents[:1])
            if torch.equal(r.latents, r.latents[:1].expand_as(r.latents))
            else r
            for r in references
        ]
        key = tuple((r.index, len(r.latents)) for r in single)
        return kept.recorded(key, lambda: self.record(single, dtype, backend_for))

    def _text_attention(self, timesteps, mask, backend, conditions) -> TextAttention | None:
        """What the call's conditions ask of the blocks beyond attending to text, if anything."""
        weights, negative = conditions.get("token_weights"), conditions.get("negative_text")
        window = conditions.get("negative_window")
        if negative is None or not window.holds(timesteps[0].item()):
            return None if weights is None else TextAttention(weights, mask)
        own = conditions.get("negative_mask")
        own = None if own is None else own > 0.5
        if not self.is_fused(negative):
            negative = self.fuse_context(negative, own, backend)
        states = TextStates(negative, own, conditions.get("negative_weights"))
        return TextAttention(weights, mask, states, window.settings)

    def takes(self, context) -> bool:
        """Whether a context has the features of this model's text encoder."""
        return context.shape[-1] == self.txtlayers * self.txtdim

    def is_fused(self, context) -> bool:
        """Whether a context holds text tokens of the transformer's width, made before the run."""
        return context is not None and context.shape[-1] == self.config.hidden_size

    def fuse_context(self, context, mask, backend):
        """Conditioning (B, L, T * D), the tap axis outermost, to text tokens (B, L, width)."""
        taps, width = self.txtlayers, self.txtdim
        if context is None or not self.takes(context):
            found = "nothing" if context is None else f"{context.shape[-1]} features a token"
            raise ValueError(
                f"The conditioning has {found}; this Krea 2 needs {taps} x {width} = "
                f"{taps * width}. Encode the prompt with the Qwen3-VL text encoder that belongs "
                "to it, through Load Krea 2 Text Encoder (or CLIPLoader of type krea2)."
            )
        return self._fuse(context.unflatten(-1, (taps, width)), mask, backend)


def _single_frame(latents):
    """(B, C, 1, h, w) or (B, C, h, w) -> (B, C, h, w)."""
    if latents.ndim == 5 and latents.shape[2] != 1:
        raise ValueError(
            f"The latents have {latents.shape[2]} frames (shape {tuple(latents.shape)}); Krea 2 "
            "makes single images. Use Krea 2 Size, or a latent of one frame."
        )
    return latents[:, :, 0] if latents.ndim == 5 else latents
