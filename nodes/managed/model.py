"""MODEL: our transformer under ComfyUI's model management."""

import math
from dataclasses import replace
from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch

from ...krea2_model.checkpoints.checkpoint import Checkpoint
from ...krea2_model.checkpoints.gguf import GGUFTensor
from ...krea2_model.checkpoints.identify import TRANSFORMER
from ...krea2_model.checkpoints.quantised import is_quantised
from ...krea2_model.checkpoints.transformer import read_transformer
from ...krea2_model.checkpoints.transformer_keys import (
    is_norm_or_table,
    module_to_official,
    official_to_module,
)
from ...krea2_model.config import Preset
from ...krea2_model.features.regions import fuse_regions
from ...krea2_model.features.run_features import RunFeatures
from ...krea2_model.features.style_transfer import StyleRun
from ...krea2_model.features.tiles import TileTexts
from ...krea2_model.images.sizes import MULTIPLE
from ...krea2_model.tools.convert import STORED_FORMATS, quantise_blocks
from ...krea2_model.transformer.model import Krea2Transformer
from ...krea2_model.transformer.patches import PATCH, grid_size, token_count
from ...krea2_model.transformer.shared_calls import SMALL_IMAGE
from ...krea2_model.transformer.text_attention import TextStates
from . import contract
from .backend import OVERRIDE, ComfyBackend
from .checkpoint import check_format, check_weights, open_part
from .conditions import (
    NEGATIVE_GUIDANCE,
    FusedText,
    NegativeText,
    RunConditions,
    weights_of,
)
from .control import changes_text, controls_of
from .core_model import CoreModel, core_patcher_class, core_unet_config
from .diffusion_model import SPARSE, TILES, Krea2DiffusionModel
from .gguf import BYTES_A_VALUE, GGUFOperations, plain, wrap
from .graphs import CUDA_GRAPH, BlockGraphs
from .low_rank import branch_bytes
from .patcher import patcher_class
from .previews import latent_format
from .references import LATENTS, SETTINGS, reference_plan
from .regions import REGIONS, fused_by
from .run_cache import RunCache, ScheduleTimes, run_cache
from .styles import may_share_inversions, styles_of
from .svdquant import add_branches, file_name, take_branches
from .tile_prompts import TILE_TEXTS


class Krea2Model(comfy.model_base.Krea2):
    """ComfyUI's model object; a subclass of core's, so that checks for core's class accept it.

    `preset` holds the checkpoint's sampling defaults, or None where the file does not say.
    """

    def __init__(self, model_config, device=None):
        # Past core's Krea2.__init__, which would build core's transformer.
        comfy.model_base.BaseModel.__init__(
            self,
            model_config,
            comfy.model_base.ModelType.FLUX,
            device=device,
            unet_model=Krea2DiffusionModel,
        )
        self.memory_usage_factor_conds = ("c_crossattn", "ref_latents")
        self.preset: Preset | None = None

    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        plan = None if self._has_foreign_references(kwargs) else reference_plan(self, kwargs)
        if plan is not None:
            latents = [self.process_latent_in(latent) for latent in kwargs[LATENTS]]
            out["ref_latents"] = comfy.conds.CONDList(latents)
            # As core gives it, for nodes that wrap the model; ours reads the plan.
            out["ref_latents_method"] = comfy.conds.CONDConstant(plan.method)
        mask = _mask_of(kwargs)
        if mask is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        context = out["c_crossattn"].cond if "c_crossattn" in out else None
        may_fuse = self._may_fuse_now(kwargs)
        cache = self._run_cache() if may_fuse else None
        conditions = RunConditions(
            run_cache=cache,
            token_weights=None if context is None else weights_of(kwargs, context),
            negative=None if context is None else self._negative(kwargs),
            reference_plan=plan,
            features=replace(
                self._features(kwargs, may_fuse),
                style=self._style(kwargs, cache),
                tile_texts=self._tile_texts(kwargs, may_fuse),
            ),
        )
        # Text that does not fit is refused where it is used: a negative at guidance 0 never is.
        if may_fuse and context is not None and self.diffusion_model.takes(context):
            text = self._fuse_now(context, mask, kwargs["device"])
            shared = (
                mask is None
                and conditions.token_weights is None
                and conditions.negative is None
                and (plan is None or (plan.caches is None and not plan.has_boosts))
                and not conditions.features
                and self._may_share_calls(kwargs["noise"])
            )
            out["c_crossattn"] = FusedText(text, shared)
            if mask is None:
                conditions = replace(conditions, text_lengths=(text.shape[1],) * len(text))
        return out | conditions.to_conds()

    def extra_conds_shapes(self, **kwargs):
        """Sizes of the reference latents, for `memory_required`, as core gives them."""
        references = kwargs.get(LATENTS)
        if not references:
            return {}
        return {"ref_latents": [1, 16, sum(latent.numel() for latent in references) // 16]}

    def _run_cache(self) -> RunCache:
        cache = run_cache(self.current_patcher)
        if self._streams():
            cache.times = cache.times or ScheduleTimes()
        elif self._records():
            cache.graphs = cache.graphs or BlockGraphs()
        return cache

    def _features(self, conditioning, may_fuse: bool) -> RunFeatures:
        """Regions of a conditioning, their texts fused where this is possible now."""
        regions = conditioning.get(REGIONS)
        if regions is None:
            return RunFeatures()
        # A region without a place in an image of this size is refused before the first step.
        regions.shares_at(*grid_size(conditioning["noise"], PATCH))
        features = regions.features(self.model_sampling.percent_to_sigma)
        if not may_fuse:
            return features

        def fuse(states, mask):
            return self._fuse_now(states, mask, conditioning["device"])

        return fuse_regions(features, self.diffusion_model, fused_by(fuse))

    def _tile_texts(self, conditioning, may_fuse: bool) -> TileTexts | None:
        """The texts of tiles of a conditioning, fused where this is possible now."""
        tiles = conditioning.get(TILE_TEXTS)
        if tiles is None:
            return None

        def fuse(states, mask):
            return self._fuse_now(states, mask, conditioning["device"])

        return tiles.run_texts(fused_by(fuse) if may_fuse else lambda text: text)

    def _style(self, conditioning, cache: RunCache | None) -> StyleRun | None:
        """The style pictures of a run, for any conditioning but a negative.

        One object for all conditionings, where that is safe.
        """
        styles = styles_of(self.current_patcher)
        if styles is None or conditioning.get("prompt_type") == "negative":
            return None
        patcher, noise = self.current_patcher, conditioning["noise"]
        if styles.share_at is not None:
            styles.share_at(*grid_size(noise, self.diffusion_model.config.patch_size))
        if cache is not None and cache.style is not None:
            return cache.style
        config, context, key = self.diffusion_model.config, styles.text, None
        if context is None:
            text = torch.zeros(1, 0, config.hidden_size)
        elif cache is not None:
            text = self._fuse_now(context, None, conditioning["device"])
        else:
            text = context
        if cache is not None and may_share_inversions(patcher):
            key = patcher.patches_uuid
        run = styles.run(self, TextStates(text), self.model_sampling.percent_to_sigma, key)
        if cache is not None:
            cache.style = run
        return run

    def _tile_tokens(self) -> int | float:
        """Tokens along the side of a tile, where an image is denoised in tiles."""
        options = getattr(self.current_patcher, "model_options", {})
        tiles = options.get("transformer_options", {}).get(TILES)
        return math.inf if tiles is None else tiles.size // MULTIPLE

    def _tile_batch(self) -> int:
        """Tiles in one call, 1 for those that take what memory is left."""
        options = getattr(self.current_patcher, "model_options", {})
        tiles = options.get("transformer_options", {}).get(TILES)
        return 1 if tiles is None else max(1, tiles.batch)

    def _negative(self, conditioning) -> NegativeText | None:
        """The negative of Krea 2 Negative (NAG), for any conditioning but a negative."""
        options = getattr(self.current_patcher, "model_options", {})
        chosen = options.get("transformer_options", {}).get(NEGATIVE_GUIDANCE)
        if chosen is None or conditioning.get("prompt_type") == "negative":
            return None
        settings, context, extra = chosen
        mask, weights = _mask_of(extra), weights_of(extra, context)
        if self._may_fuse_now(conditioning):
            context = self._fuse_now(context, mask, conditioning["device"])
        window = settings.window(self.model_sampling.percent_to_sigma)
        return NegativeText(context, settings, window, mask, weights)

    def _has_foreign_references(self, conditioning) -> bool:
        """True if another pack's forward pass handles the references of a conditioning."""
        return bool(
            conditioning.get(LATENTS)
            and SETTINGS not in conditioning
            and contract.has_foreign_forward()
        )

    def _may_fuse_now(self, conditioning) -> bool:
        """True if text can be fused here, once a run, instead of at each step.

        ComfyUI calls this once a run, the model loaded and patched. False where weights change with
        the step (hooks), with gradients, or where others may read or change the encoder's states at
        each step (wrappers of other packs, ControlNets, replaced parts of the model), and with
        control LoRAs that change the fusion in some steps.
        """
        if self.current_patcher is None:
            return False
        patcher, options = self.current_patcher, self.current_patcher.model_options
        wrappers = []
        for kind in ("diffusion_model", "apply_model", "calc_cond_batch"):
            wrappers += patcher.get_all_wrappers(kind)
            wrappers += comfy.patcher_extension.get_all_wrappers(kind, options, True)
        if "model_function_wrapper" in options:
            wrappers.append(options["model_function_wrapper"])
        return (
            conditioning.get("device") is not None
            and "hooks" not in conditioning
            and ("control" not in conditioning or bool(controls_of(conditioning)))
            and not changes_text(conditioning, self)
            and not torch.is_grad_enabled()
            and all(_is_from_comfyui(function) for function in wrappers)
            and not self._has_foreign_references(conditioning)
            and not any(key.startswith("diffusion_model.") for key in patcher.object_patches)
            and not self.diffusion_model.is_touched()
        )

    def _may_share_calls(self, noise) -> bool:
        """True if texts of different length should share a call, see `conditions`.

        Where weights stream to the device they then stream once a step; for a small image, reading
        weights takes as long as computing with them. With patches, each text gets its own call.
        """
        patcher = self.current_patcher
        options = patcher.model_options.get("transformer_options", {})
        others = "patches", "patches_replace", OVERRIDE, CUDA_GRAPH, SPARSE
        if any(options.get(key) for key in others):
            return False
        return self._streams() or len(noise) * token_count(noise) <= SMALL_IMAGE

    def _streams(self) -> bool:
        """True if the device cannot hold all weights, so that some are copied at each step."""
        patcher = self.current_patcher
        if patcher is None:
            return False
        held = patcher.loaded_size()
        if getattr(patcher, "is_dynamic", bool)():
            # Dynamic VRAM loads weights as they are used; what will fit counts.
            held = 0.9 * comfy.model_management.get_total_memory(patcher.load_device)
        return held < patcher.model_size()

    def _records(self) -> bool:
        """True if Compile Krea 2 asks for the blocks as a CUDA graph."""
        options = getattr(self.current_patcher, "model_options", {})
        return CUDA_GRAPH in options.get("transformer_options", {})

    def _fuse_now(self, context, mask, device):
        transformer = self.diffusion_model
        if transformer.is_fused(context):
            return context
        options = self.current_patcher.model_options.get("transformer_options", {})
        backend = ComfyBackend(options)
        context = context.to(device, self.get_dtype_inference())
        mask = None if mask is None else mask.to(device) > 0.5
        return transformer.fuse_context(context, mask, backend)

    def memory_required(self, input_shape, cond_shapes={}):  # noqa: B006
        """Bytes of activations and workspace.

        The peak is in a block's MLP: two tensors of its width (gate, up) and three of the hidden
        state's (state, normed input, one for patches). Then keys and values of cached references
        and, of one step, of style pictures, and the dequantised matrix of a GGUF file.
        """
        config = self.diffusion_model.config
        tokens = math.prod(
            min(self._tile_tokens(), -(-size // config.patch_size)) for size in input_shape[-2:]
        )
        for kind in ("c_crossattn", "negative_text"):
            tokens += sum(shape[1] for shape in cond_shapes.get(kind, ()))
        tokens += sum(shape[0] for shape in cond_shapes.get("run_features", ()))
        for shape in cond_shapes.get("ref_latents", ()):
            tokens += shape[-1] // config.patch_size**2
        styles = styles_of(self.current_patcher)
        style_tokens = [] if styles is None else styles.tokens
        tokens = max(input_shape[0] * self._tile_batch() * tokens, *style_tokens, 0)
        # Attention to style pictures is merged in float32: two states more.
        states = 3 + 2 * bool(style_tokens)
        elements = tokens * (states * config.hidden_size + 2 * config.intermediate_size)
        cached = sum(shape[0] for shape in cond_shapes.get("reference_plan", ()))
        cached += sum(style_tokens)
        heads = config.num_key_value_heads * config.attention_head_dim
        elements += 2 * cached * config.num_layers * heads
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        workspace = 0.45 * 1024**3
        if self.model_config.custom_operations is GGUFOperations:
            largest = config.hidden_size * max(config.intermediate_size, config.hidden_size)
            workspace += largest * BYTES_A_VALUE
            if self.current_patcher is not None:
                workspace += branch_bytes(self.current_patcher.patches, size)
        if self._records():
            elements *= 2  # a graph has its own memory
        return elements * size * 1.15 + workspace


class Krea2ModelConfig(comfy.supported_models_base.BASE):
    """ComfyUI's description of a model family; instantiated directly, never registered."""

    unet_extra_config: dict = {}
    sampling_settings = {"multiplier": 1.0, "shift": 1.15}
    memory_usage_factor = 2.2
    latent_format = comfy.latent_formats.Wan21
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def get_model(self, state_dict, prefix="", device=None):
        return Krea2Model(self, device=device)

    def process_unet_state_dict(self, state_dict):
        return {official_to_module(name): tensor for name, tensor in state_dict.items()}

    def process_unet_state_dict_for_saving(self, state_dict):
        official = {module_to_official(file_name(name)): plain(t) for name, t in state_dict.items()}
        return super().process_unet_state_dict_for_saving(official)


class CoreModelConfig(Krea2ModelConfig):
    """For ComfyUI's own implementation, whose names are those of the files."""

    def get_model(self, state_dict, prefix="", device=None):
        return CoreModel(self, device=device)

    def process_unet_state_dict(self, state_dict):
        return {module_to_official(name): tensor for name, tensor in state_dict.items()}


def load_model(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    quantise: str | None = None,
    by_core: bool = False,
    *,
    disable_dynamic=False,
):
    """Load a transformer file or diffusers folder as a MODEL.

    dtype: of the stored matrices; None follows the file and ComfyUI's flags.
    quantise: one of `convert.QUANTISATIONS` for the blocks of a file that is not quantised yet.
    by_core: build ComfyUI's own implementation in place of ours.
    Raises CheckpointError that says what the file is and what was expected.
    """
    checkpoint = open_part(path, "transformer")
    state = read_transformer(checkpoint)
    bare = Krea2Transformer(state.config, device="meta")
    tensors, branches = take_branches(state.tensors, checkpoint.path.name)
    if quantise and not any(map(is_quantised, tensors.values())):
        check_format(STORED_FORMATS[quantise], f"dtype {quantise}")
        tensors = quantise_blocks(tensors, quantise, comfy.model_management.get_torch_device())
    quantisation = check_weights(bare, tensors, checkpoint.path, TRANSFORMER)
    is_gguf = any(isinstance(tensor, GGUFTensor) for tensor in tensors.values())

    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    if by_core:
        model_config = CoreModelConfig(core_unet_config(state.config, checkpoint.path))
    else:
        # Core builds its LoRA aliases from `layers`.
        layers = state.config.num_layers
        model_config = Krea2ModelConfig(
            {"image_model": "krea2", "config": state.config, "layers": layers}
        )
    model_config.quant_config = quantisation
    supported = model_config.supported_inference_dtypes
    weight_dtype = None if quantisation or is_gguf else state.weight_dtype
    if dtype is None:
        parameters = sum(weight.numel() for weight in bare.parameters())
        dtype = management.unet_dtype(
            model_params=parameters, supported_dtypes=supported, weight_dtype=weight_dtype
        )
    manual_cast = management.unet_manual_cast(
        None if quantisation else dtype, load_device, supported
    )
    model_config.set_inference_dtype(dtype, manual_cast)
    if is_gguf:
        model_config.custom_operations = GGUFOperations
    tensors = {
        name: tensor.float() if is_norm_or_table(name) else wrap(tensor, manual_cast or dtype)
        for name, tensor in tensors.items()
    }

    model = model_config.get_model(tensors, "")
    tensors |= add_branches(model.diffusion_model, branches, checkpoint.path.name)
    model.preset = state.preset
    model.latent_format = latent_format(state.config) or model.latent_format
    make_class = core_patcher_class if by_core else patcher_class
    patcher = make_class(load_device, disable_dynamic, is_gguf)(
        model, load_device=load_device, offload_device=offload_device
    )
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(tensors, "", assign=is_gguf or patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (path, dtype, quantise, by_core))
    return patcher


def _mask_of(conditioning):
    """The mask (B, L) of a conditioning's text, or None where it hides nothing."""
    mask = conditioning.get("attention_mask")
    return None if mask is None or bool((mask > 0.5).all()) else mask


def _is_from_comfyui(function) -> bool:
    return getattr(function, "__module__", "").partition(".")[0] in (
        "comfy",
        "comfy_api",
        "comfy_extras",
    )
