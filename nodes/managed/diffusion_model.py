"""Our transformer behind the calling convention of ComfyUI's own Krea 2."""

from dataclasses import replace
from functools import partial

import comfy.patcher_extension
import comfy.utils
import torch

from ...krea2_model.features.regions import fuse_regions
from ...krea2_model.features.tiles import ENOUGH, fuse
from ...krea2_model.lora.live import live_loras_of_text
from ...krea2_model.transformer.extensions import AttentionExtensions
from ...krea2_model.transformer.patches import grid_size, token_count
from ...krea2_model.transformer.references import ReferenceKVCache
from ...krea2_model.transformer.text_attention import TextAttention, TextStates
from . import contract
from .backend import OVERRIDE, ComfyBackend
from .conditions import RunConditions
from .control import with_controls
from .layers import comfy_layers
from .references import default_plan
from .regions import fused_by
from .run_cache import RunCache
from .tile_prompts import rows_for

# Keys of `TileSettings`, `RotaryScaling` and `SparseAttention` in transformer_options.
TILES, ROTARY, SPARSE = "krea2_tiles", "krea2_rotary_scaling", "krea2_sparse_attention"


class Krea2DiffusionModel(contract.Transformer):
    """The transformer behind ComfyUI's calling convention (that of core's own Krea 2)."""

    def __init__(self, config, dtype=None, device=None, operations=None, **unet_config):
        super().__init__(config, comfy_layers(operations), device=device, dtype=dtype)

    def forward(  # type: ignore[override] # as core's
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
                self,
                x,
                timesteps,
                context,
                attention_mask,
                ref_latents=ref_latents,
                transformer_options=transformer_options,
                **kwargs,
            )
        latents = _single_frame(x)
        mask = None if attention_mask is None else attention_mask > 0.5
        conditions = RunConditions.from_kwargs(kwargs)
        # Text that is already fused means that `extra_conds` found no foreign changes.
        is_touched = None if self.is_fused(context) else self.is_touched
        text = context
        sigma = timesteps[0].item()
        features = self._fused_features(conditions.features, latents, transformer_options)
        features = replace(
            with_controls(features, kwargs.get("control")),
            tiles=transformer_options.get(TILES),
            rotary=transformer_options.get(ROTARY),
            sparse=transformer_options.get(SPARSE),
        )
        with live_loras_of_text(self, features.uses_on_all_text(sigma)):
            if not self.is_fused(context):
                # The latents come in the dtype that ComfyUI chose for this run.
                fusing = ComfyBackend(transformer_options, is_touched)
                text = self.fuse_context(context.to(latents.dtype), mask, fusing)
            negative = self._fused_negative(
                conditions.negative, sigma, latents, transformer_options
            )
        frames = [_single_frame(latent) for latent in ref_latents or ()]
        plan = conditions.reference_plan or default_plan(
            len(frames), kwargs.get("ref_latents_method")
        )
        conditions = replace(conditions, features=features, reference_plan=plan, negative=negative)
        velocity_of = partial(
            self._velocity,
            timesteps=timesteps,
            sigma=sigma,
            text=text,
            mask=mask,
            frames=[comfy.utils.repeat_to_batch_size(frame, len(latents)) for frame in frames],
            conditions=conditions,
            options=transformer_options,
            is_touched=is_touched,
            image=(image := grid_size(latents, self.config.patch_size)),
        )
        if features.style is not None:
            place = text.dtype, text.device
            self._prepare_style(features.style, sigma, *place, conditions, transformer_options)
        tiles = features.tiles_at(sigma, image)
        if tiles is None:
            return velocity_of((), latents).reshape(x.shape)
        features.check_tiles(plan)
        batch = 1
        if conditions.token_weights is None and conditions.negative is None:
            batch = self._tiles_at_once(features, plan, latents, text, transformer_options)
        return fuse(latents, tiles, velocity_of, batch).to(x.dtype).reshape(x.shape)

    def _tiles_at_once(self, features, plan, latents, text, options) -> int:
        """Tiles in one call; one where others' patches count the batch as ComfyUI made it."""
        patched = any(options.get(key) for key in ("patches", "patches_replace", OVERRIDE))
        batch = 1 if patched else features.tiles_at_once(plan)
        if batch > 0:
            return batch
        config = self.config
        states = 3 * config.hidden_size + 2 * config.intermediate_size
        tokens = len(latents) * (features.tiles.tokens(latents) + text.shape[1])
        tile = tokens * states * latents.element_size()
        free = comfy.model_management.get_free_memory(latents.device)
        return max(1, min(ENOUGH, int(0.8 * free / tile)))

    def _velocity(
        self,
        tiles,
        latents,
        *,
        timesteps,
        sigma,
        text,
        mask,
        frames,
        conditions,
        options,
        is_touched,
        image,
    ):
        """The velocity (B, C, h, w) of an image's latents, or (N * B, C, h, w) of N tiles.

        tiles: of one size; several have the same features. sigma: the first of timesteps, read from
        the device once a step. text, mask: fused. frames: latents of references. image: rows and
        columns of the image's tokens.
        """
        plan, tile, times = conditions.reference_plan, tiles[0] if tiles else None, len(tiles) or 1
        if conditions.features.tile_texts is not None:
            own = self._tile_text(conditions.features, tile, sigma, latents, options)
            text, mask = own.states, own.mask
            conditions = replace(conditions, token_weights=own.weights, text_lengths=None)
        step = conditions.features.at(sigma, image, latents.device, tiles)
        if times > 1:
            timesteps, text = timesteps.repeat(times), text.repeat(times, 1, 1)
            mask = None if mask is None else mask.repeat(times, 1)
        attention = _text_attention(conditions, mask, step.texts)
        lengths, padding = conditions.text_lengths, None
        if lengths is not None and min(lengths) < text.shape[1]:
            padding = times * [text.shape[1] - length for length in lengths]
        text, mask = step.join(text, mask)
        references = plan.active(sigma, frames)
        references = conditions.features.references_of(references, tile, image)
        references = [reference.repeated(times) for reference in references]
        groups, style = step.with_references(references).groups, step.style_keys(self)
        if references:
            counts = [token_count(reference.latents) for reference in references]
            options = {**options, "reference_image_num_tokens": counts}
        cache, kv_cache = conditions.run_cache or RunCache(), None
        if plan.caches is not None and references:
            kv_cache = self._kv_cache(plan.caches, references, text.dtype, options, cache.times)
            references = []
        extensions = None
        if any(part is not None for part in (attention, kv_cache, groups, style)):
            extensions = AttentionExtensions(attention, kv_cache, groups, style)
        backend = ComfyBackend(
            options,
            is_touched,
            extensions=extensions,
            padding=padding,
            times=cache.times,
            graphs=cache.graphs,
            has_live_loras=any(own.lora.changes_blocks for own in step.loras),
        )
        front = 0 if attention is None else attention.front
        reference_tokens = sum(token_count(reference.latents) for reference in references)
        with step.live(self, text.shape[1], reference_tokens, front):
            return super().forward(
                latents,
                timesteps,
                text,
                mask,
                references=references,
                reference_method=plan.method,
                backend=backend,
                modulation=cache.modulation(self, latents.device) if conditions.run_cache else None,
                **step.places,
            )

    def _kv_cache(self, caches, references, dtype, options, times) -> ReferenceKVCache:
        """Keys and values of cached references, computed once a run."""
        # The images of a batch mostly have the same references, which are then cached once.
        single = [
            replace(r, latents=r.latents[:1])
            if torch.equal(r.latents, r.latents[:1].expand_as(r.latents))
            else r
            for r in references
        ]

        def backend_for(recorder):
            extensions = AttentionExtensions(references=recorder)
            return ComfyBackend(options, self.is_touched, extensions=extensions, times=times)

        return caches.get(single, lambda: self.cache_references(single, dtype, backend_for))

    def _prepare_style(self, style, sigma, dtype, device, conditions, options):
        """Compute the keys and values of style pictures for a step."""
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            raise ValueError(
                "Krea 2 Style Transfer needs the sigmas of the run, which this sampler does not "
                "give the model. Use Krea 2 Sampler or a sampler of ComfyUI's own."
            )
        cache, text = conditions.run_cache or RunCache(), style.text.states.to(device, dtype)
        modulation = cache.modulation(self, device) if conditions.run_cache else None
        if not self.is_fused(text):
            text = self.fuse_context(text, None, ComfyBackend(options, self.is_touched))

        def evaluate(latents, at, recorder):
            comfy.model_management.throw_exception_if_processing_interrupted()
            extensions = None if recorder is None else AttentionExtensions(references=recorder)
            backend = ComfyBackend(
                options, self.is_touched, extensions=extensions, times=cache.times
            )
            batch = len(latents)
            timestep = torch.full((batch,), at, device=device)
            return self._call(
                latents.to(device),
                timestep,
                text.expand(batch, -1, -1),
                backend=backend,
                modulation=modulation,
            ).float()

        style.prepare(sigma, sigmas.tolist(), len(self.blocks), evaluate)

    def _call(self, *inputs, **options):
        return super().forward(*inputs, **options)

    def _fused_features(self, features, latents, options):
        """Features with the texts of regions fused, which `extra_conds` may have left to do."""
        if features.regions is None or all(
            self.is_fused(text.states) for text in features.regions.texts
        ):
            return features

        def fuse(states, mask):
            fusing = ComfyBackend(options, self.is_touched)
            mask = None if mask is None else mask.to(latents.device)
            return self.fuse_context(states.to(latents), mask, fusing)

        return fuse_regions(features, self, fused_by(fuse))

    def _tile_text(self, features, tile, sigma, latents, options) -> TextStates:
        """The text of a tile, with a row for each image; fused here where it is not yet."""
        text = features.tile_texts.of(tile)(sigma)
        if not self.is_fused(text.states):

            def fuse(states, mask):
                fusing = ComfyBackend(options, self.is_touched)
                return self.fuse_context(states.to(latents), mask, fusing)

            with live_loras_of_text(self, features.uses_on_all_text(sigma)):
                text = fused_by(fuse)(text)
        return rows_for(text, latents)

    def _fused_negative(self, negative, sigma, latents, options):
        """The negative of NAG with fused states; None in steps without it."""
        if negative is None or not negative.window.contains(sigma):
            return None
        mask = None if negative.mask is None else negative.mask > 0.5
        states = negative.states
        if not self.is_fused(states):
            fusing = ComfyBackend(options, self.is_touched)
            states = self.fuse_context(states.to(latents.dtype), mask, fusing)
        return replace(negative, states=states, mask=mask)

    def takes(self, context) -> bool:
        """True if a context has the features of this model's text encoder."""
        return context.shape[-1] == self.txtlayers * self.txtdim

    def is_fused(self, context) -> bool:
        """True if a context is text of the transformer's width, fused before the run."""
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


def _text_attention(conditions, mask, before) -> TextAttention | None:
    """Text weights and NAG of a call, and texts before its own; None without any."""
    weights, negative = conditions.token_weights, conditions.negative
    if negative is None:
        return (
            None if weights is None and not before else TextAttention(weights, mask, before=before)
        )
    text = TextStates(negative.states, negative.mask, negative.weights)
    return TextAttention(weights, mask, text, negative.settings, before)


def _single_frame(latents):
    """(B, C, 1, h, w) or (B, C, h, w) -> (B, C, h, w)."""
    if latents.ndim == 5 and latents.shape[2] != 1:
        raise ValueError(
            f"The latents have {latents.shape[2]} frames (shape {tuple(latents.shape)}); Krea 2 "
            "makes single images. Use Krea 2 Size, or a latent of one frame."
        )
    return latents[:, :, 0] if latents.ndim == 5 else latents
